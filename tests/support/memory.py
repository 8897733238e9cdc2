"""What a student's tensors take in memory, counted storage by storage."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from students.model.interface import Student


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


def state_tensors(module: nn.Module) -> list[Tensor]:
    """What bitsandbytes keeps beside NF4 weights."""
    found = []
    for parameter in module.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            found += [state.absmax, state.code]
            if state.nested:
                found += [state.state2.absmax, state.state2.code, state.offset]
    return found


def own_tensors(student: Student) -> list[Tensor]:
    """All that is there before a step."""
    return [*student.parameters(), *student.buffers(), *state_tensors(student)]


class Saved:
    """Counts what a forward pass saves for its backward pass, beside what is the student's own."""

    def __init__(self, student: Student) -> None:
        self.own = {one.untyped_storage().data_ptr() for one in own_tensors(student)}
        self.tensors: list[Tensor] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in self.own:
            self.tensors.append(tensor)  # kept, so that its place is not used again
        return tensor


def saved_bytes(
    student: Student, tokens: Tensor, within: AbstractContextManager[object] | None = None
) -> int:
    """What a forward pass saves, and its result."""
    saved = Saved(student)
    keeping = torch.autograd.graph.saved_tensors_hooks(saved, lambda one: one)
    with keeping, within or nullcontext():
        output = student(tokens, with_logits=False)
    assert output.last_hidden_state is not None
    return size_of([*saved.tensors, output.last_hidden_state])


def some_loss(logits: Tensor, span: slice) -> Tensor:
    """A loss of a chunk of logits that takes one more buffer (see
    ``distill.losses.chunked_lm_head``)."""
    total = logits.sum().float()
    logits.copy_(logits.softmax(-1))
    return total


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once, of what has been made since it was entered."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.known = {one.untyped_storage()._cdata for one in own_tensors(student)}
        self.now = self.most = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = call(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
                self.most = max(self.most, self.now)
        return result

    def _gone(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size
