"""Arithmetic as some processes and devices have it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tests.support import pretended_gpu

GPU: Any = torch.backends.cuda.matmul
ONEDNN: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def as_pytorch_starts() -> None:
    """No switch that lets products of float32 matrices be rounded is on."""
    torch.set_float32_matmul_precision("highest")
    every: Any = torch.backends
    every.fp32_precision = GPU.fp32_precision = ONEDNN.fp32_precision = "none"


@contextmanager
def rounded_products() -> Iterator[None]:
    """TF32 on a GPU, bfloat16 on a processor with AMX, as somebody else may have switched on."""
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
        assert (GPU.fp32_precision, ONEDNN.fp32_precision) == ("tf32", "bf16")
    finally:
        as_pytorch_starts()


@contextmanager
def without_float64() -> Iterator[None]:
    """The pretended GPU has none, as Metal has none."""
    made: Any = pretended_gpu._OnGPU.__new__

    def refusing(kind: Any, held: Tensor) -> Any:
        if held.dtype == torch.float64:
            raise TypeError(f"{pretended_gpu.DEVICE} has no float64")
        return made(kind, held)

    with (
        patch.object(pretended_gpu._OnGPU, "__new__", refusing),
        patch("numerics.precision.has_float64", lambda device: device.type != pretended_gpu.NAME),
    ):
        yield
