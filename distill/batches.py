"""From a store to batches: the held-out split, the order of every epoch, padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from distill.errors import UserError
from distill.objective import Batch
from teachers.records import join
from teachers.store import SoftTargetStore

MAX_HELD_OUT = 128
SORTED_TOGETHER = 16  # batches whose sequences are sorted by length together, to pad less


@dataclass(frozen=True)
class Split:
    """Indices of training and held-out sequences; no held-out sequence occurs in training."""

    train: NDArray[np.int64]
    held_out: NDArray[np.int64]


def split(store: SoftTargetStore, share: float, seed: int) -> Split:
    """Hold out a random ``share`` of the sequences (1 to 128).

    A sequence that occurs several times counts once: all its copies go to the same side.

    Raises:
        UserError: fewer than two different sequences.
    """
    copies: dict[bytes, list[int]] = {}
    for index in range(len(store)):
        copies.setdefault(store.tokens(index).tobytes(), []).append(index)
    groups = list(copies.values())
    if len(groups) < 2:
        raise UserError(f"only {len(groups)} different sequence in {len(store)}; give more varied data")
    order = np.random.default_rng([seed, 1]).permutation(len(groups))
    count = min(MAX_HELD_OUT, len(groups) - 1, max(1, round(share * len(groups))))
    held_out = [groups[group][0] for group in order[:count]]
    train = [index for group in order[count:] for index in groups[group]]
    return Split(np.sort(train), np.sort(held_out))


def epoch_order(
    train: NDArray[np.int64], lengths: NDArray[np.int64], batch_size: int, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """The batches of one epoch as sequence indices; depends on nothing but its arguments.

    Sequences of like length share a batch, batches come in random order. The last, smaller batch is kept.
    """
    random = np.random.default_rng([seed, 2, epoch])
    order = random.permutation(train)
    span = batch_size * SORTED_TOGETHER
    batches = []
    for start in range(0, len(order), span):
        group = order[start : start + span]
        group = group[np.argsort(lengths[group], kind="stable")]
        batches += [group[at : at + batch_size] for at in range(0, len(group), batch_size)]
    return [batches[place] for place in random.permutation(len(batches))]


def load_batch(store: SoftTargetStore, indices: NDArray[np.int64]) -> Batch:
    """Read some sequences and their targets; pad tokens with 0 on the right."""
    rows = [store.tokens(int(index)) for index in indices]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return Batch(tokens, lengths, join([store.targets(int(index)) for index in indices]))


def micro_batches(indices: NDArray[np.int64], accumulation: int) -> Iterator[NDArray[np.int64]]:
    """Divide one optimizer step's sequences into at most ``accumulation`` parts."""
    return (part for part in np.array_split(indices, accumulation) if len(part))
