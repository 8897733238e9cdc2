"""A student's weights as files."""

from __future__ import annotations

import safetensors.torch
import torch

from students.weights import as_safetensors


def test_safetensors_piece_by_piece() -> None:
    """The same bytes as the library's, in every dtype that is written."""
    weights = {
        "z.weight": torch.randn(3, 5).T,
        "a.bias": torch.randn(7),
        "é": torch.randn(2, 2, 2),
        "scale": torch.tensor(1.5),
    }
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        narrow = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
        expected = safetensors.torch.save(narrow, metadata={"format": "pt"})
        assert b"".join(as_safetensors(weights, dtype)) == expected, dtype
