"""One batch of sequences with its soft targets, and prompts for the safety head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill.losses.divergences import IGNORE_INDEX
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

    def to(self, device: torch.device) -> Prompts:
        """The same prompts on another device."""
        return Prompts(*(part.to(device) for part in vars(self).values()))


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
    """

    tokens: Tensor
    lengths: Tensor
    targets: Targets
    given: Tensor | None = None
    layers: dict[int, Tensor] = field(default_factory=dict)
    prompts: Prompts | None = None
    rooms: Tensor | None = None
    keep: Tensor | None = None

    def of_each(self, values: Tensor) -> Tensor:
        """One value of each sequence, ``[S]``, for every token: broadcastable to ``[B, T]``."""
        return values[:, None] if self.rooms is None else values.repeat_interleave(self.rooms)[None]

    @property
    def steps(self) -> Tensor:
        """The position of every token in its sequence, broadcastable to ``[B, T]``."""
        steps = torch.arange(self.tokens.shape[1], device=self.tokens.device)[None]
        return (
            steps if self.rooms is None else steps - self.of_each(self.rooms.cumsum(0) - self.rooms)
        )

    @property
    def valid(self) -> Tensor:
        """``[B, T]``: the positions that count: that predict a token of their own sequence, and are
        kept."""
        predict = self.steps < self.of_each(self.lengths - 1)
        return predict if self.keep is None else predict.masked_scatter(predict, self.keep)

    def inside(self, start: int) -> Tensor:
        """``[B, T]``: the tokens of each sequence from number ``start`` on."""
        return (self.steps >= start) & (self.steps < self.of_each(self.lengths))

    @property
    def padding(self) -> int:
        """Number of positions that are computed for nothing."""
        return self.tokens.numel() - int(self.lengths.sum())

    def run(self, student: nn.Module, **outputs: Unpack[Outputs]) -> SO8TOutput:
        """A student's forward pass over the sequences."""
        if self.rooms is not None:
            outputs["lengths"] = self.rooms
        output: SO8TOutput = student(self.tokens, **outputs)
        return output

    @property
    def labels(self) -> Tensor:
        """The token that follows each valid position, or ``IGNORE_INDEX`` if the student
        generated it, ``[n]``."""
        following = self.tokens.roll(-1, dims=1)
        if self.given is not None:
            generated = self.steps + 1 >= self.of_each(self.given)
            following = following.masked_fill(generated, IGNORE_INDEX)
        return following[self.valid]

    def count(self) -> int:
        """Number of valid positions."""
        return int((self.lengths - 1).sum() if self.keep is None else self.keep.sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            lengths=self.lengths.to(device),
            targets=self.targets.to(device),
            given=None if self.given is None else self.given.to(device),
            layers={layer: states.to(device) for layer, states in self.layers.items()},
            prompts=None if self.prompts is None else self.prompts.to(device),
            rooms=None if self.rooms is None else self.rooms.to(device),
            keep=None if self.keep is None else self.keep.to(device),
        )
