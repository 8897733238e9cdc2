"""A student's weights as a plain state dict."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from students.model.interface import Student


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, on this process; a collective call for all that hold a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_out_like(whole: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, distributed as ``tensor`` is if that is."""
    if not isinstance(tensor, DTensor):
        return whole
    return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements)


Weights = dict[str, Tensor]


def plain_weights(student: Student) -> Weights:
    """The student's own weights by name, whole."""
    return {
        name: full_tensor(tensor.detach()).contiguous()
        for name, tensor in student.own_weights().items()
    }


@torch.no_grad()
def set_weights(student: Student, weights: Weights) -> None:
    """The inverse of ``plain_weights``.

    Raises:
        KeyError, ValueError: names or shapes do not fit; nothing has been changed.
    """
    own = student.own_weights()
    if odd := own.keys() ^ weights.keys():
        raise KeyError(f"tensors do not match: {sorted(odd)}")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise ValueError(
                f"{name} has shape {list(weights[name].shape)}, not {list(tensor.shape)}"
            )
    for name, tensor in own.items():
        tensor.copy_(laid_out_like(weights[name], tensor))
