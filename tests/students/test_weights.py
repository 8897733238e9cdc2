"""A student's weights as files."""

from __future__ import annotations

import safetensors.torch
import torch

from students.weights import SAFETENSORS_NAMES, as_safetensors


def test_safetensors_piece_by_piece() -> None:
    """The same bytes as the library's, in one dtype or in all that there are, with or without
    metadata."""
    weights = {
        "z.weight": torch.randn(3, 5).T,
        "a.bias": torch.randn(7),
        "é": torch.randn(2, 2, 2),
        "scale": torch.tensor(1.5),
    }
    several = {
        f"{n % 3}.{name}": torch.ones(3).to(dtype)
        for n, (dtype, name) in enumerate(SAFETENSORS_NAMES.items())
    }
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        narrow = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
        expected = safetensors.torch.save(narrow, metadata={"format": "pt"})
        assert b"".join(as_safetensors(weights, dtype, {"format": "pt"})) == expected, dtype
    assert b"".join(as_safetensors(several)) == safetensors.torch.save(several)
