"""Tensors that FSDP has spread over processes, and whole ones, treated alike."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on this process; every process that holds a part must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_out_like(whole: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor spread as ``tensor`` is, on its device; as it is where that is not spread."""
    if not isinstance(tensor, DTensor):
        return whole
    return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements)
