"""A student's weights as a plain state dict."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

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
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


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


def as_safetensors(weights: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[bytes]:
    """A safetensors file of the weights in ``dtype``, piece by piece: the bytes that
    ``safetensors.torch.save`` gives, with one tensor in memory twice instead of all of them."""
    name_of_dtype = SAFETENSORS_DTYPES[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(weights):
        start, end = end, end + weights[name].numel() * dtype.itemsize
        shape = list(weights[name].shape)
        header[name] = {"dtype": name_of_dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in sorted(weights):
        values = weights[name].detach().to("cpu", dtype).contiguous()
        yield memoryview(values.flatten().view(torch.uint8).numpy())
