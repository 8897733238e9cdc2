"""One batch of sequences with its soft targets, and prompts for the safety head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.losses.divergences import IGNORE_INDEX
from teachers.base import Keep
from teachers.targets.stored_arrays import Targets


def padded(rows: Sequence[NDArray[np.int32]]) -> tuple[Tensor, Tensor]:
    """Token sequences as ``[B, T]``, padded with 0 on the right, and their lengths ``[B]``."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return tokens, lengths


def padded_masks(masks: Sequence[Keep]) -> Tensor:
    """Masks of predictions as ``[B, T]`` for sequences of T tokens at most, false in padding."""
    keep = torch.zeros(len(masks), max(map(len, masks)) + 1, dtype=torch.bool)
    for row, mask in zip(keep, masks, strict=True):
        row[: len(mask)] = torch.from_numpy(mask)
    return keep


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
    """Sequences padded on the right, with the teacher's answer at every valid position.

    Attributes:
        tokens: ``[B, T]`` token ids; padding is 0 and never looked at.
        lengths: ``[B]`` real tokens of each sequence.
        targets: soft targets of all valid positions in row order, ``[n, …]``. Position t of a
            sequence of n tokens is valid for t < n − 1, where it is kept: it predicts token t + 1.
        given: ``[B]`` first tokens of each sequence that are given text; the student generated
            those after them, and they are no labels. ``None``: all are given.
        keep: ``[B, T]`` the positions that have targets and count; ``None``: all valid ones.
        layers: kept states of the teacher's layers at all valid positions, ``[n, R]`` each; may be
            empty.
        prompts: for the safety head; ``None`` where there are none in this step.
    """

    tokens: Tensor
    lengths: Tensor
    targets: Targets
    given: Tensor | None = None
    keep: Tensor | None = None
    layers: dict[int, Tensor] = field(default_factory=dict)
    prompts: Prompts | None = None

    @property
    def valid(self) -> Tensor:
        """``[B, T]``: the positions that predict a token of their own sequence, and are kept."""
        steps = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        inside = steps[None, :] < (self.lengths - 1)[:, None]
        return inside if self.keep is None else inside & self.keep

    @property
    def labels(self) -> Tensor:
        """The token that follows each valid position, or ``IGNORE_INDEX`` if the student
        generated it, ``[n]``."""
        following = self.tokens[:, 1:]
        if self.given is not None:
            steps = torch.arange(1, self.tokens.shape[1], device=self.tokens.device)
            following = following.masked_fill(steps[None, :] >= self.given[:, None], IGNORE_INDEX)
        return following[self.valid[:, :-1]]

    def count(self) -> int:
        """Number of valid positions."""
        return int(self.valid.sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            lengths=self.lengths.to(device),
            targets=self.targets.to(device),
            given=None if self.given is None else self.given.to(device),
            keep=None if self.keep is None else self.keep.to(device),
            layers={layer: states.to(device) for layer, states in self.layers.items()},
            prompts=None if self.prompts is None else self.prompts.to(device),
        )
