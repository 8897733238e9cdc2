"""Pure measures of a training step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """Euclidean norm over all gradients together (before clipping), a scalar on the gradients' device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def non_finite(values: dict[str, Tensor]) -> list[str]:
    """Names of the values that hold a NaN or an infinity, decided on the device and read back once."""
    flags = torch.stack([torch.isfinite(value).all() for value in values.values()])
    return [name for name, finite in zip(values, flags.tolist(), strict=True) if not finite]
