"""Corpus → teacher → store, shard by shard; a rerun does only what is missing or damaged."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakSet

import numpy as np
import torch

from teachers.atomic_files import is_held
from teachers.base import (
    SINGLE_PROCESS,
    GenerationRequest,
    ProcessRank,
    Progress,
    Teacher,
    Tokens,
)
from teachers.store.shared import SharedCodec
from teachers.store.store import SoftTargetStore
from teachers.targets.distributions import OutputHead
from teachers.targets.recipe import Recipe
from teachers.targets.state_codec import (
    FIT_LEAST,
    FIT_POSITIONS,
    FIT_SHARE,
    METRIC_POSITIONS,
    Basis,
    fit_basis,
    output_parts,
    tail_metric,
)

Report = Callable[[float, str], None]
"""Called with the number of finished sequences (over the whole store), those of the shard at work
by the share of its tokens, and what is being done."""

LINEAR_POSITIONS = 64
LINEAR_ROWS = 4096
# llama.cpp rounds a hidden state to eight bits before it multiplies it with a quantized matrix:
# logits then differ by about 0.3 % of their spread from the exact product. An output that bends its
# logits differs more.
LINEAR_TOLERANCE = 0.02
WRITING_SHARE = 0.5  # of a shard's progress, where the teacher writes it before it scores it
WAIT_SECONDS = 0.5
PATIENCE_SECONDS = 60.0  # how long another process waits for a first one that is not there


class CaptureError(ValueError):
    """A teacher whose answer cannot be kept as asked; says why and what to choose instead."""


class SequenceSource(Protocol):
    """Where the token sequences come from. ``take`` must give the same sequences every time."""

    def __len__(self) -> int:
        """Number of sequences."""
        ...

    def take(self, teacher: Teacher, start: int, stop: int, progress: Progress) -> list[Tokens]:
        """Sequences ``start`` to ``stop``, ≥ 2 tokens each; the teacher may have to write them."""
        ...

    def generation_request(self, start: int, stop: int) -> GenerationRequest | None:
        """What to ask the teacher for, if it writes all of these sequences."""
        ...


@dataclass(frozen=True)
class CaptureSummary:
    """Shards taken over from before, recaptured because damaged, and written."""

    reused: int
    damaged: tuple[int, ...]
    written: int


_linear: WeakSet[Teacher] = WeakSet()  # teachers whose output is known to be a matrix product


def capture(
    teacher: Teacher,
    source: SequenceSource,
    store: SoftTargetStore,
    report: Report,
    share: ProcessRank = SINGLE_PROCESS,
) -> CaptureSummary:
    """Fill ``store`` with the teacher's soft targets of every sequence of ``source`` (this
    process's share).

    Raises:
        CaptureError: the teacher's logits are not its final hidden state times a matrix, which the
            store's recipe needs.
    """
    recipe = store.manifest.recipe
    if share.world == 1:
        store.remove_leftovers()
    mine = range(share.rank, store.manifest.shards, share.world)
    states = {shard: store.state(shard) for shard in mine}
    missing = [shard for shard in mine if states[shard] != "complete"]
    sizes = {shard: stop - start for shard in mine for start, stop in [store.span(shard)]}
    finished = sum(sizes[shard] for shard in mine if shard not in missing)
    reached = float(finished)

    def tell(done: float, text: str) -> None:
        nonlocal reached
        reached = max(reached, done)
        report(reached, text)

    bases: Mapping[str, Basis] = {}
    first: list[Tokens] = []  # the first shard's, generated before it is known how to keep states
    if store.needs_shared_codec:
        codec, first = _shared_codec(teacher, source, store, tell, share)
        bases = codec.bases
    for shard in missing:
        start, stop = store.span(shard)

        def writing(part: float, base: int = finished) -> Progress:
            return lambda done: tell(base + part * done, "the teacher writes")

        alone = shard == 0 and store.needs_shared_codec
        request = None if alone else source.generation_request(start, stop)
        if request is not None:
            sequences, arrays = teacher.generate_and_score(request, recipe, bases, writing(1.0))
        else:
            sequences = first if shard == 0 else []
            if not sequences:
                sequences = source.take(teacher, start, stop, writing(WRITING_SHARE))
            begin, rest = reached, finished + sizes[shard] - reached
            total = max(1, sum(len(tokens) - 1 for tokens in sequences))

            def scored(positions: float, begin: float = begin, each: float = rest / total) -> None:
                tell(begin + each * positions, "the teacher scores")

            arrays = teacher.score(sequences, recipe, bases, scored)
        store.write_shard(shard, sequences, arrays)
        finished += sizes[shard]
        tell(finished, "saved")
    damaged = tuple(shard for shard in missing if states[shard] == "damaged")
    return CaptureSummary(len(states) - len(missing), damaged, len(missing))


def _shared_codec(
    teacher: Teacher,
    source: SequenceSource,
    store: SoftTargetStore,
    report: Report,
    share: ProcessRank,
) -> tuple[SharedCodec, list[Tokens]]:
    """The store's codec: as it is there, or fitted to the first shard's sequences by the first
    process; and those sequences, where the teacher wrote them for it."""
    alone = 0.0
    while (codec := store.shared_codec()) is None and share.rank > 0:
        report(0, "waiting for the first process")
        time.sleep(WAIT_SECONDS)
        alone = 0.0 if is_held(store.folder) else alone + WAIT_SECONDS
        if alone > PATIENCE_SECONDS:
            raise CaptureError(
                f"process {share.rank} of {share.world} waits for the first one to begin store "
                f"{store.folder}, and none is at work there; start all of them together"
            )
    if codec is not None:
        return codec, []
    start, stop = store.span(0)
    written: list[Tokens] = []
    if store.state(0) == "complete":
        sequences = [store.tokens(index) for index in range(start, stop)]
    else:
        sequences = written = source.take(
            teacher, start, stop, lambda done: report(WRITING_SHARE * done, "the teacher writes")
        )
    report(0, "fitting what is kept of hidden states")
    # The first shard stands for the others. What it holds alone is known to every process.
    positions = sum(len(tokens) - 1 for tokens in sequences) * store.manifest.shards
    limit = min(FIT_POSITIONS, max(FIT_LEAST, round(FIT_SHARE * positions)))
    codec = fit_shared_codec(teacher, sequences, store.manifest.recipe, limit=limit)
    store.write_shared_codec(codec)
    return codec, written


def fit_shared_codec(
    teacher: Teacher, sequences: Sequence[Tokens], recipe: Recipe, *, limit: int = FIT_POSITIONS
) -> SharedCodec:
    """Fit how hidden states are encoded to ``limit`` positions at most; with the output matrix.

    Raises:
        CaptureError: see ``capture``.
    """
    chosen = _first_positions(sequences, limit)
    rows, vocab_size = teacher.output_rows, teacher.info.vocab_size
    if recipe.needs_states:
        require_linear_output(teacher, chosen[0])
    states = {
        name: torch.from_numpy(s) for name, s in teacher.states(chosen, recipe.layers).items()
    }
    bases: dict[str, Basis] = {}
    head = None
    final = states["final"]
    if recipe.has_sketch:
        some = final[:: max(1, len(final) // METRIC_POSITIONS)][:METRIC_POSITIONS]
        metric = tail_metric(some, rows, vocab_size)
        bases["final"] = fit_basis(final, metric, min(recipe.sketch_bytes, final.shape[1]))
        head = bases["final"].head(rows, vocab_size)
    elif recipe.needs_states:
        matrix = torch.cat([part.half() for _, part in output_parts(rows, vocab_size)])
        head = OutputHead(matrix.float(), torch.zeros(vocab_size))  # as it will be read back
    for layer in recipe.layers:
        name = f"layer{layer}"
        bases[name] = fit_basis(states[name], None, min(recipe.layer_bytes, states[name].shape[1]))
    return SharedCodec(bases, head)


def require_linear_output(teacher: Teacher, tokens: Tokens) -> None:
    """Check on one sequence that logits are the final hidden state times the output matrix.

    Raises:
        CaptureError: they are not (a cap, a scale or a bias comes after the product).
    """
    if teacher in _linear:
        return
    some = tokens[: LINEAR_POSITIONS + 1]
    logits = torch.from_numpy(teacher.logits([some]))
    states = torch.from_numpy(teacher.states([some])["final"])
    stop = min(LINEAR_ROWS, logits.shape[1])
    product = states @ torch.from_numpy(teacher.output_rows(0, stop)).T
    difference = product - logits[:, :stop]
    difference = difference - difference.mean(dim=-1, keepdim=True)
    spread = float(logits[:, :stop].std(dim=-1).mean())
    error = float(difference.std(dim=-1).mean()) / max(spread, 1e-9)
    if not error <= LINEAR_TOLERANCE:
        raise CaptureError(
            f"{teacher.info.name} ({teacher.info.architecture}): its logits differ by {error:.0%} "
            "from its final hidden state times its output matrix, so hidden states cannot stand "
            "for them; choose targets.kind=compact with targets.sketch_bytes=0, or "
            "targets.kind=dense"
        )
    _linear.add(teacher)


def _first_positions(sequences: Sequence[Tokens], limit: int) -> list[Tokens]:
    """Evenly chosen sequences with about ``limit`` positions together, the last one cut."""
    average = max(1, sum(len(tokens) - 1 for tokens in sequences) // len(sequences))
    count = min(len(sequences), max(1, -(-limit // average)))
    chosen, room = [], limit
    for index in np.linspace(0, len(sequences) - 1, count).round().astype(int):
        if room < 1:
            break
        chosen.append(sequences[index][: room + 1])
        room -= len(chosen[-1]) - 1
    return chosen
