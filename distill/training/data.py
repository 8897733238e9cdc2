"""From a store to batches: the validation split, the order of every epoch, packing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.errors import UserError
from distill.heads.prompt_set import PromptSet
from distill.losses.batch import Batch, arrange, places
from distill.training.embedding_rows import used_tokens
from distill.training.student_probe import SEQUENCES
from teachers.base import ProcessRank, budget_slices
from teachers.store.store import SoftTargetStore
from teachers.targets.stored_arrays import join

MAX_HELD_OUT = 128
SORTED_TOGETHER = 16  # batches whose sequences are sorted by length together, to pad less


@dataclass(frozen=True)
class Split:
    """Indices of training and validation sequences; no validation sequence occurs in training."""

    train: NDArray[np.int64]
    held_out: NDArray[np.int64]


def split(store: SoftTargetStore, share: float, seed: int) -> Split:
    """Hold out a random ``share`` of the sequences (1 to 128) for validation.

    A sequence that occurs several times counts once: all its copies go to the same side.

    Raises:
        UserError: fewer than two different sequences.
    """
    copies: dict[bytes, list[int]] = {}
    for index in range(len(store)):
        copies.setdefault(store.tokens(index).tobytes(), []).append(index)
    groups = list(copies.values())
    if len(groups) < 2:
        raise UserError(
            f"only {len(groups)} different sequence in {len(store)}; give more varied data"
        )
    order = np.random.default_rng([seed, 1]).permutation(len(groups))
    count = min(MAX_HELD_OUT, len(groups) - 1, max(1, round(share * len(groups))))
    held_out = [groups[group][0] for group in order[:count]]
    train = [index for group in order[count:] for index in groups[group]]
    return Split(np.sort(train), np.sort(held_out))


def epoch_order(
    train: NDArray[np.int64],
    lengths: NDArray[np.int64],
    batch_size: int,
    seed: int,
    epoch: int,
    batch_tokens: int | None = None,
) -> list[NDArray[np.int64]]:
    """The batches of one epoch as sequence indices; depends on nothing but its arguments.

    Sequences of like length share a batch of so many, or of up to ``batch_tokens``; batches come in
    random order. The last, smaller batch is kept.
    """
    random = np.random.default_rng([seed, 2, epoch])
    order = random.permutation(train)
    sizes = lengths if batch_tokens else np.ones_like(lengths)
    budget = batch_tokens or batch_size
    batches = []
    for span in budget_slices(sizes[order].tolist(), budget * SORTED_TOGETHER):
        group = order[span]
        group = group[np.argsort(lengths[group], kind="stable")]
        batches += [group[part] for part in budget_slices(sizes[group].tolist(), budget)]
    return [batches[index] for index in random.permutation(len(batches))]


def load_batch(
    store: SoftTargetStore, indices: Sequence[int] | NDArray[np.int64], pack: bool = False
) -> Batch:
    """Read some sequences, their targets and their kept layer states; pack them, or pad tokens with
    0 on the right."""
    numbers = [int(index) for index in indices]
    targets = join([store.targets(index) for index in numbers])
    kept = [store.layer_states(index) for index in numbers]
    layers = {layer: torch.cat([states[layer] for states in kept]) for layer in kept[0]}
    keep = None
    if store.manifest.masked:
        keep = torch.from_numpy(np.concatenate([store.keep(index) for index in numbers]))
    tokens, lengths, rooms = arrange([store.tokens(index) for index in numbers], pack)
    return Batch(tokens, lengths, targets, layers=layers, rooms=rooms, keep=keep)


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that one process computes together. ``counts``: false for a stand-in whose loss is
    not added, where a process has fewer sequences than another but must take part in the same
    communication. ``number`` of ``count``: its position among the step's micro-batches that count,
    over all processes."""

    indices: list[int]
    counts: bool = True
    number: int = 0
    count: int = 1


def micro_batches(
    indices: Sequence[int], accumulation: int, rank: int = 0, world: int = 1
) -> list[MicroBatch]:
    """One process's part of an optimizer step, divided into at most ``accumulation`` micro-batches.

    Over all ranks every sequence occurs once; every rank gets equally many micro-batches.
    """
    parts = [part.tolist() for part in np.array_split(np.array(indices), accumulation * world)]
    rounds = [parts[start : start + world] for start in range(0, len(parts), world)]
    count = sum(map(bool, parts))
    mine = [(turn * world + rank, group[rank]) for turn, group in enumerate(rounds) if any(group)]
    stand_in = MicroBatch([int(indices[0])], counts=False, count=count)
    return [MicroBatch(part, True, number, count) if part else stand_in for number, part in mine]


@dataclass(frozen=True)
class TrainingData:
    """The store, its split, the seed of the order, and prompts for the safety head: in every
    ``prompts_every``-th optimizer step ``prompts_together`` of them. ``batch_tokens``: of an
    optimizer step at most, instead of a number of sequences."""

    store: SoftTargetStore
    split: Split
    seed: int
    prompts: PromptSet | None = None
    prompts_every: int = 1
    prompts_together: int = 0
    batch_tokens: int | None = None

    def batches(self, epochs: int, batch_size: int) -> list[list[int]]:
        """Sequence indices of every optimizer step, over all epochs."""
        lengths = self.store.lengths()
        return [
            batch.tolist()
            for epoch in range(epochs)
            for batch in epoch_order(
                self.split.train, lengths, batch_size, self.seed, epoch, self.batch_tokens
            )
        ]

    def padding(self, plan: list[list[int]], parts: int, pack: bool) -> float:
        """The share of all positions computed in ``plan`` that are padding, with every step divided
        into ``parts``."""
        lengths, used, computed = self.store.lengths(), 0, 0
        for part in (part for step in plan for part in np.array_split(lengths[step], parts)):
            if len(part):
                used += int(part.sum())
                computed += sum(places(part.tolist())) if pack else len(part) * int(part.max())
        return 1.0 - used / computed

    def used_tokens(self) -> Tensor:
        """Every token that training looks up, ascending."""
        return used_tokens(self.store, self.prompts.tokens if self.prompts is not None else ())

    def fixed_text(self) -> Batch:
        """The few validation sequences that the guard probes the student with."""
        indices = self.split.held_out
        some = np.linspace(0, len(indices) - 1, min(len(indices), SEQUENCES)).astype(int)
        return load_batch(self.store, indices[some])

    def held_out(
        self, batch_size: int, device: torch.device, pack: bool = False
    ) -> Iterator[Batch]:
        """The validation sequences in batches."""
        indices = self.split.held_out
        for start in range(0, len(indices), batch_size):
            yield load_batch(self.store, indices[start : start + batch_size], pack).to(device)


class StepLoader(AbstractContextManager["StepLoader"]):
    """Loads one process's micro-batches of one optimizer step after another into main memory.

    ``read``: makes the batch of some sequences for the step after so many others. ``on_gpu``: a GPU
    trains, and reads the batches from memory by itself; ``ahead``: if so, a thread loads those of
    the step that is expected next. ``read`` then depends on nothing but its arguments.
    """

    def __init__(
        self,
        data: TrainingData,
        read: Callable[[list[int], int], Batch],
        *,
        accumulation: int,
        process: ProcessRank,
        on_gpu: bool,
        ahead: bool,
    ) -> None:
        self.data, self.read, self.accumulation, self.process = data, read, accumulation, process
        self.on_gpu = on_gpu
        self._thread = ThreadPoolExecutor(1, "loader") if on_gpu and ahead else None
        self._expected: tuple[int, list[int]] | None = None
        self._loading: Future[list[tuple[MicroBatch, Batch]]] | None = None

    def load(self, step: int, sequences: list[int]) -> list[tuple[MicroBatch, Batch]]:
        """The micro-batches of the step after ``step`` others, made of some sequences."""
        parts = micro_batches(sequences, self.accumulation, self.process.rank, self.process.world)
        return [(part, self._load(part, step)) for part in parts]

    def take(self, step: int, sequences: list[int]) -> list[tuple[MicroBatch, Batch]]:
        """The same, if possible as the thread has loaded it; what went wrong there is raised."""
        if self._loading is not None and self._expected == (step, sequences):
            return self._loading.result()
        return self.load(step, sequences)

    def expect(self, step: int, sequences: list[int]) -> None:
        """Tell which step probably comes next."""
        if self._thread is not None:
            self._expected = step, sequences
            self._loading = self._thread.submit(self.load, step, sequences)

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _load(self, part: MicroBatch, step: int) -> Batch:
        batch, data = self.read(part.indices, step), self.data
        turn, off = divmod(step, data.prompts_every)
        if data.prompts is not None and not off:
            prompts = data.prompts.batch(turn, data.prompts_together, part.number, part.count)
            batch = replace(batch, prompts=prompts)
        return batch.pinned() if self.on_gpu else batch
