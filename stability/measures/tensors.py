"""Norms and finiteness of weights and gradients, sharded or not. N: number of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, a scalar on their device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def non_finite(values: dict[str, Tensor]) -> list[str]:
    """Names of the values with a NaN or an infinity; one transfer from the device."""
    flags = torch.stack([torch.isfinite(value).all() for value in values.values()])
    return [name for name, finite in zip(values, flags.tolist(), strict=True) if not finite]


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, unless FSDP has sharded it."""
    # Not by its class: importing that takes as long as PyTorch, for a capture too.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def norms(tensors: Sequence[Tensor | None]) -> Tensor:
    """Euclidean norm of each tensor's local part, ``[N]`` float32; 0 where there is no tensor."""
    present = [index for index, tensor in enumerate(tensors) if tensor is not None]
    if not present:
        return torch.zeros(len(tensors))
    values = torch._foreach_norm([_dense(t) for t in tensors if t is not None], 2, torch.float32)
    device = values[0].device
    known = dict(zip(present, (value.float().to(device) for value in values), strict=True))
    absent = torch.zeros((), device=device)
    return torch.stack([known.get(index, absent) for index in range(len(tensors))])


def _dense(tensor: Tensor) -> Tensor:
    part = local(tensor.detach())
    return part.coalesce().values() if part.is_sparse else part
