"""Matrix products of activations, in bfloat16 where that is several times as fast."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.runtime.faster_precision import LEAST_WIDTH
from students.model.packing import has_bfloat16_products


def are_narrow(width: int) -> bool:
    """Whether products of a stream of ``width`` are computed in bfloat16. Its rounding is a
    hundredth of what a student's layer is off (docs/benchmarks.md)."""
    return has_bfloat16_products() and width >= LEAST_WIDTH


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, narrow: bool) -> Tensor:
    """``x [N, I]`` through a matrix ``[O, I]``, in float32; ``narrow``: by way of bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
        return F.linear(x, weight, bias).float()
