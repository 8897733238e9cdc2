"""From a store to batches: the validation split, the order of every epoch, packing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import overload

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
WATCH_SHARE = 0.01  # of the tokens of a training, that all its points may score together
WATCH_LEAST, WATCH_SEQUENCES = 512, 4  # positions and sequences, without which a point says little
WATCHED = 12  # stream of random numbers
WINDOW = 64  # shards whose sequences are shuffled together
WINDOWS_KEPT = 4  # in memory: at a border two are looked at, and where a batch is replaced others
AHEAD = 64  # steps, by which a shard is read back before it is needed
ORDER, SHARDS = 2, 9  # streams of random numbers
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
    contents = store.files.overview.hashes
    firsts = np.sort(np.unique(contents, return_index=True)[1])  # of the copies of each
    if len(firsts) < 2:
        raise UserError(
            f"only {len(firsts)} different sequence in {len(store)}; give more varied data"
        )
    order = np.random.default_rng([seed, 1]).permutation(len(firsts))
    count = min(MAX_HELD_OUT, len(firsts) - 1, max(1, round(share * len(firsts))))
    held_out = firsts[order[:count]]
    train = np.flatnonzero(~np.isin(contents, contents[held_out]))
    return Split(train, np.sort(held_out))


def shuffled(
    sequences: NDArray[np.int64],
    lengths: NDArray[np.int32],
    batch_size: int,
    random: np.random.Generator,
    batch_tokens: int | None = None,
) -> list[NDArray[np.int64]]:
    """Batches of some sequences, by index; depends on nothing but its arguments.

    Sequences of like length share a batch of so many, or of up to ``batch_tokens``; batches come in
    random order. The last, smaller batch is kept.
    """
    order = random.permutation(sequences)
    own = lengths[order]
    sizes = own if batch_tokens else np.ones_like(own)
    budget = batch_tokens or batch_size
    batches = []
    for span in budget_slices(sizes.tolist(), budget * SORTED_TOGETHER):
        group = order[span]
        group = group[np.argsort(lengths[group], kind="stable")]
        fitting = lengths[group] if batch_tokens else sizes[span]
        batches += [group[part] for part in budget_slices(fitting.tolist(), budget)]
    return [batches[index] for index in random.permutation(len(batches))]


class Plan(Sequence[list[int]]):
    """Sequence indices of every optimizer step over all epochs, made when they are asked for.

    In every epoch the shards come in another order; the sequences of ``window`` of them are
    shuffled together. A store of no more shards than that is shuffled as a whole. In memory is what
    is at hand, and two numbers of each window of each epoch.
    """

    def __init__(
        self, data: TrainingData, epochs: int, batch_size: int, window: int | None = None
    ) -> None:
        self.data, self.batch_size = data, batch_size
        manifest = data.store.manifest
        self._lengths = data.store.lengths()
        starts = np.arange(manifest.shards + 1) * manifest.sequences_per_shard
        self._firsts = np.searchsorted(data.split.train, starts)
        self._each = -(-manifest.shards // (window or WINDOW))  # windows of an epoch
        self._made = lru_cache(WINDOWS_KEPT)(self._make)
        before = np.concatenate([[0], np.cumsum(self._lengths[data.split.train], dtype=np.int64)])
        of_shards = np.diff(before[self._firsts])
        counts, tokens = [0], [0]
        for number in range(epochs * self._each):
            shards = self._shards(number)
            by_number = -(-int(np.diff(self._firsts)[shards].sum()) // batch_size)
            counts.append(len(self._make(number)[0]) if data.batch_tokens else by_number)
            tokens.append(int(of_shards[shards].sum()))
        self._steps, self._tokens = np.cumsum(counts), np.cumsum(tokens)  # before each window
        self._count, self._total = int(self._steps[-1]), int(self._tokens[-1])

    @property
    def tokens(self) -> int:
        """All that its steps see."""
        return self._total

    def first(self, steps: int | None) -> Plan:
        """The plan of so many first steps; ``None``: of all."""
        if steps is None or steps >= len(self):
            return self
        plan = copy.copy(self)
        plan._count, plan._total = steps, self._seen(steps)
        return plan

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, chosen: int) -> list[int]: ...
    @overload
    def __getitem__(self, chosen: slice) -> Sequence[list[int]]: ...
    def __getitem__(self, chosen: int | slice) -> list[int] | Sequence[list[int]]:
        if isinstance(chosen, slice):
            if chosen.start is None and chosen.step is None:
                return self.first(chosen.indices(len(self))[1])
            return [self[step] for step in range(*chosen.indices(len(self)))]
        step = chosen + len(self) * (chosen < 0)
        if not 0 <= step < len(self):
            raise IndexError(chosen)
        number, place = self._find(step)
        indices: list[int] = self._made(number)[0][place].tolist()
        return indices

    def share(self, steps: int) -> float:
        """The share of all tokens that so many steps have seen."""
        if steps == len(self):
            return 1.0
        return self._seen(steps) / self._total

    def _seen(self, steps: int) -> int:
        """The tokens of so many steps, not all that there are."""
        number, place = self._find(steps)
        return int(self._tokens[number] + self._made(number)[1][place])

    def _find(self, step: int) -> tuple[int, int]:
        """The window of a step, and its place there."""
        number = int(np.searchsorted(self._steps, step, side="right")) - 1
        return number, step - int(self._steps[number])

    def _shards(self, number: int) -> NDArray[np.int64]:
        """The shards of a window, ascending."""
        epoch, window = divmod(number, self._each)
        shards = np.arange(len(self._firsts) - 1)
        if self._each > 1:
            shards = np.random.default_rng([self.data.seed, SHARDS, epoch]).permutation(shards)
        each, more = divmod(len(shards), self._each)  # the first windows have one more
        start = window * each + min(window, more)
        return np.sort(shards[start : start + each + (window < more)])

    def _sequences(self, number: int) -> NDArray[np.int64]:
        """The training sequences of a window, ascending."""
        train, firsts = self.data.split.train, self._firsts
        return np.concatenate(
            [train[firsts[shard] : firsts[shard + 1]] for shard in self._shards(number)]
        )

    def _make(self, number: int) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
        """The batches of a window, and the tokens before each."""
        epoch, window = divmod(number, self._each)
        random = np.random.default_rng([self.data.seed, ORDER, epoch, window])
        batches = shuffled(
            self._sequences(number), self._lengths, self.batch_size, random, self.data.batch_tokens
        )
        return batches, np.cumsum([0, *(self._lengths[batch].sum() for batch in batches)])


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
    optimizer step at most, instead of a number of sequences. ``watched``: the validation
    sequences that training scores, ascending; none: all."""

    store: SoftTargetStore
    split: Split
    seed: int
    prompts: PromptSet | None = None
    prompts_every: int = 1
    prompts_together: int = 0
    batch_tokens: int | None = None
    watched: NDArray[np.int64] | None = None

    def batches(self, epochs: int, batch_size: int) -> Sequence[list[int]]:
        """Sequence indices of every optimizer step, over all epochs."""
        return Plan(self, epochs, batch_size)

    def padding(self, plan: Sequence[list[int]], parts: int, pack: bool) -> float:
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

    @property
    def watched_count(self) -> int:
        """Validation sequences that training scores."""
        return len(self.split.held_out if self.watched is None else self.watched)

    def watching(self, trained: float, points: int) -> TrainingData:
        """The same, of whose validation sequences each of so many points scores some: those that a
        share of the ``trained`` tokens pays for, and enough to say something.

        Drawn by the seed alone: another number of them has the same ones first.
        """
        drawn = np.random.default_rng([self.seed, WATCHED]).permutation(self.split.held_out)
        store, lengths = self.store, self.store.lengths()[drawn]
        kept = (
            [store.keep(index).sum() for index in drawn] if store.manifest.masked else lengths - 1
        )
        paid = int((np.cumsum(lengths) <= watched_tokens(trained, points)).sum())
        enough = int((np.cumsum(kept) < WATCH_LEAST).sum()) + 1
        return replace(self, watched=np.sort(drawn[: max(paid, enough, WATCH_SEQUENCES)]))

    def held_out(
        self, batch_size: int, device: torch.device, pack: bool = False
    ) -> Iterator[Batch]:
        """The validation sequences in batches, as many of them as are ``watched``."""
        indices = self.split.held_out if self.watched is None else self.watched
        for start in range(0, len(indices), batch_size):
            yield load_batch(self.store, indices[start : start + batch_size], pack).to(device)


def watched_tokens(trained: float, points: int) -> float:
    """Validation tokens that each of so many points may score in a training on ``trained``."""
    return WATCH_SHARE * trained / points


class StepLoader(AbstractContextManager["StepLoader"]):
    """Loads one process's micro-batches of one optimizer step after another into main memory.

    ``read``: makes the batch of some sequences for the step after so many others. ``on_gpu``: a GPU
    trains, and reads the batches from memory by itself; ``ahead``: if so, a thread loads those of
    the step that is expected next, and reads what is to be checked of later ones. ``read`` then
    depends on nothing but its arguments.
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
        self._unchecked: dict[int, None] = {}  # shards, in the order in which they are needed
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

    def expect(self, step: int, sequences: list[int], later: Sequence[int] = ()) -> None:
        """Tell which step probably comes next, and which sequences ``AHEAD`` steps later."""
        if self._thread is not None:
            self._expected = step, sequences
            self._loading = self._thread.submit(self.load, step, sequences)
            self._thread.submit(self._check, later)

    def _check(self, later: Sequence[int]) -> None:
        """Read one shard back in good time, if it has not been: a window's shards are needed nearly
        all at once. Of the processes of a launch each reads others, and finds in the store what
        those have read. That one is damaged is said where its targets are wanted."""
        store, process = self.data.store, self.process
        for index in later:
            shard = index // store.manifest.sequences_per_shard
            if shard % process.world == process.rank and not store.is_known(shard):
                self._unchecked[shard] = None
        if self._unchecked:
            shard = next(iter(self._unchecked))
            del self._unchecked[shard]
            store.known_state(shard)

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
