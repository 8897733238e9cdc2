"""One batch of sequences with its soft targets, and prompts for the safety head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill.losses.divergences import IGNORE_INDEX
from teachers.targets.distributions import each_tensor
from teachers.targets.stored_arrays import Targets

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from students.model.interface import Outputs, SO8TOutput


def padded(rows: Sequence[NDArray[np.int32]]) -> tuple[Tensor, Tensor]:
    """Token sequences as ``[B, T]``, padded with 0 on the right, and their lengths ``[B]``."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return tokens, lengths


SLACK = 4  # places that a packed sequence may leave empty, so that more are attended over together


def arrange(rows: Sequence[NDArray[np.int32]], pack: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Token sequences packed one after another into a row ``[1, N]``, their lengths ``[S]``, and
    the places of each ``[S]``: as many as its longer neighbors need, up to ``SLACK`` more than its
    tokens.

    ``padded``, without places, where all are equally long, or unless ``pack``.
    """
    lengths = [len(row) for row in rows]
    if not pack or len(set(lengths)) == 1:
        return *padded(rows), None
    rooms = places(lengths)
    tokens = torch.zeros(1, sum(rooms), dtype=torch.int64)
    for row, start, room in zip(rows, np.cumsum(rooms), rooms, strict=True):
        begin = int(start) - room
        tokens[0, begin : begin + len(row)] = torch.from_numpy(row.astype(np.int64))
    return tokens, torch.tensor(lengths), torch.tensor(rooms)


def places(lengths: Sequence[int]) -> list[int]:
    """The places that sequences of some lengths take in a packed row (see ``arrange``)."""
    rooms = list(lengths)
    for order in (range(1, len(rooms)), range(len(rooms) - 2, -1, -1)):
        for index in order:
            beside = rooms[index - order.step]
            if rooms[index] <= beside <= lengths[index] + SLACK:
                rooms[index] = beside
    return rooms


@dataclass(frozen=True)
class Prompts:
    """Prompts to decide on: padded ``tokens [P, T]``, ``lengths [P]``, ``labels [P, 3]``
    (probabilities of the decisions) and ``weights [P]``, what each counts in the optimizer step's
    mean."""

    tokens: Tensor
    lengths: Tensor
    labels: Tensor
    weights: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> Prompts:
        """The same with every tensor changed."""
        return each_tensor(self, change)


VERIFICATION_STRIDE = 16  # the verification head's inputs cost passes over the logits


@dataclass(frozen=True)
class Layout:
    """Where the positions of a batch are.

    Worked out in main memory: how many there are, a device would have to be waited for.

    Attributes:
        steps: the position of every token in its sequence, broadcastable to ``[B, T]``.
        valid: ``[B, T]``: the positions that count: that predict a token of their own sequence, and
            are kept.
        rows: ``[n]``: the same as numbers among all B · T.
        labels: ``[n]``: the token that follows each, or ``IGNORE_INDEX`` if the student generated
            it.
        bends: ``[B, T]``: the tokens with two others before them in their sequence, the middle one
            of which counts.
        verified: ``[m]``: what the verification head learns from, as rows of the n, ascending:
            every 16th position of a sequence, counted from its end, whatever the batch.
    """

    steps: Tensor
    valid: Tensor
    rows: Tensor
    labels: Tensor
    bends: Tensor
    verified: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> Layout:
        """The same with every tensor changed."""
        return each_tensor(self, change)


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right, or packed into one row, with the teacher's answer at every
    valid position.

    Attributes:
        tokens: ``[B, T]`` token ids, or packed ``[1, N]``; padding is 0 and never looked at.
        lengths: ``[S]`` real tokens of each sequence; S is B unless they are packed.
        targets: soft targets of all valid positions in row order, ``[n, …]``. Position t of a
            sequence of n tokens is valid for t < n − 1, where it predicts token t + 1, if ``keep``
            does not leave it out.
        given: ``[S]`` first tokens of each sequence that are given text; the student generated
            those after them, and they are no labels. ``None``: all are given.
        layers: kept states of the teacher's layers at all valid positions, ``[n, R]`` each; may be
            empty.
        prompts: for the safety head; ``None`` where there are none in this step.
        rooms: ``[S]`` places of each sequence in the packed row, its padding included; ``None``:
            padded.
        keep: which positions that predict a token count, over all sequences in order; ``None``:
            all of them.

    ``lengths``, ``given``, ``rooms`` and ``keep`` always lie in main memory.
    """

    tokens: Tensor
    lengths: Tensor
    targets: Targets
    given: Tensor | None = None
    layers: dict[int, Tensor] = field(default_factory=dict)
    prompts: Prompts | None = None
    rooms: Tensor | None = None
    keep: Tensor | None = None

    @cached_property
    def layout(self) -> Layout:
        """Where its positions are."""
        steps = torch.arange(self.tokens.shape[1])[None]
        if self.rooms is not None:
            steps = steps - self._of_each(self.rooms.cumsum(0) - self.rooms)
        lengths = self._of_each(self.lengths)
        valid = steps < lengths - 1
        if self.keep is not None:
            valid = valid.masked_scatter(valid, self.keep)
        rows = valid.flatten().nonzero().squeeze(-1)
        following = self.tokens.roll(-1, dims=1)
        if self.given is not None:
            following = following.masked_fill(steps + 1 >= self._of_each(self.given), IGNORE_INDEX)
        chosen = (steps + lengths) % VERIFICATION_STRIDE == 0
        verified = chosen.flatten()[rows].nonzero().squeeze(-1)
        return Layout(
            steps,
            valid,
            rows,
            labels=following.flatten()[rows],
            bends=(steps >= 2) & (steps < lengths) & valid.roll(1, dims=1),
            verified=verified,
        )

    def _of_each(self, values: Tensor) -> Tensor:
        """One value of each sequence, ``[S]``, for every token: broadcastable to ``[B, T]``."""
        return values[:, None] if self.rooms is None else values.repeat_interleave(self.rooms)[None]

    @property
    def valid(self) -> Tensor:
        """``[B, T]``: the positions that count."""
        return self.layout.valid

    @property
    def labels(self) -> Tensor:
        """The token that follows each valid position, or ``IGNORE_INDEX``, ``[n]``."""
        return self.layout.labels

    def at_valid(self, states: Tensor) -> Tensor:
        """``states [B, T, D]`` at the valid positions, ``[n, D]``."""
        return states.flatten(0, 1)[self.layout.rows]

    @property
    def padding(self) -> int:
        """Number of positions that are computed for nothing."""
        return self.tokens.numel() - int(self.lengths.sum())

    def run(self, student: nn.Module, **outputs: Unpack[Outputs]) -> SO8TOutput:
        """A student's forward pass over the sequences."""
        packed: dict[str, Tensor] = {}
        if self.rooms is not None:
            packed = {"lengths": self.rooms, "position_ids": self.layout.steps}
        output: SO8TOutput = student(self.tokens, **outputs, **packed)
        return output

    def count(self) -> int:
        """Number of valid positions."""
        return len(self.layout.rows)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device; nothing waits for what is pinned."""
        waits = device.type == "cpu"
        targets = self.targets.to(device)
        return self._each(lambda one: one.to(device, non_blocking=not waits), targets)

    def pinned(self) -> Batch:
        """The same batch in memory that a GPU reads by itself."""
        return self._each(Tensor.pin_memory, self.targets.each(Tensor.pin_memory))

    def _each(self, change: Callable[[Tensor], Tensor], targets: Targets) -> Batch:
        changed = replace(
            self,
            tokens=change(self.tokens),
            targets=targets,
            layers={layer: change(states) for layer, states in self.layers.items()},
            prompts=None if self.prompts is None else self.prompts.each(change),
        )
        vars(changed)["layout"] = self.layout.each(change)
        return changed
