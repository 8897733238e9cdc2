"""A student's weights as a plain state dict.

Whether FSDP has sharded a tensor is told by its attributes, not by its class: importing that takes
as long as PyTorch, for commands too that train nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from students.model.interface import Student


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, on this process; a collective call for all that hold a part."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def laid_out_like(whole: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, distributed as ``tensor`` is if that is."""
    layout: Any = tensor
    if not hasattr(layout, "placements"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(tensor.device), layout.device_mesh, layout.placements)


Weights = dict[str, Tensor]
# In the order in which the library writes their tensors.
SAFETENSORS_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
SAFETENSORS_DTYPES = tuple(SAFETENSORS_NAMES)


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


def as_safetensors(
    weights: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Iterator[bytes | memoryview]:
    """A safetensors file of the weights (in ``dtype``, else as they are), piece by piece: the bytes
    that ``safetensors.torch.save`` gives, with one tensor in memory twice instead of all of
    them."""

    def stored(name: str) -> torch.dtype:
        return dtype or weights[name].dtype

    names = sorted(weights)
    names.sort(key=lambda name: SAFETENSORS_DTYPES.index(stored(name)))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name in names:
        start, end = end, end + weights[name].numel() * stored(name).itemsize
        header[name] = {
            "dtype": SAFETENSORS_NAMES[stored(name)],
            "shape": list(weights[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        values = weights[name].detach().to("cpu", stored(name)).contiguous()
        yield values.flatten().view(torch.uint8).numpy().data
