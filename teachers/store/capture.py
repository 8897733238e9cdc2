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
from teachers.base import WHOLE, Progress, Sampling, Share, Teacher, Tokens
from teachers.store.shared import Companion
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
    tail_metric,
)

Report = Callable[[int, str], None]
"""Called with the number of finished sequences (over the whole store) and what is being done."""

LINEAR_POSITIONS = 64
LINEAR_ROWS = 4096
# llama.cpp rounds a hidden state to eight bits before it multiplies it with a quantised matrix:
# logits then differ by about 0.3 % of their spread from the exact product. An output that bends its
# logits differs more.
LINEAR_TOLERANCE = 0.02
WAIT_SECONDS = 0.5
PATIENCE_SECONDS = 60.0  # how long another process waits for a first one that is not there


class CaptureError(ValueError):
    """A teacher whose answer cannot be kept in the way asked for; says why and what to choose
    instead."""


class SequenceSource(Protocol):
    """Where the token sequences come from. ``take`` must give the same sequences every time."""

    def __len__(self) -> int:
        """Number of sequences."""
        ...

    def take(self, teacher: Teacher, start: int, stop: int, progress: Progress) -> list[Tokens]:
        """Sequences ``start`` to ``stop``; the teacher may have to write them. Each has ≥ 2
        tokens."""
        ...

    def requests(self, start: int, stop: int) -> tuple[list[Sequence[Tokens]], Sampling] | None:
        """What to ask the teacher for if it writes all of these sequences (see
        ``Teacher.speak``)."""
        ...


@dataclass(frozen=True)
class CaptureSummary:
    """What one capture did: shards taken over from before, recaptured because damaged, and
    written."""

    reused: int
    damaged: tuple[int, ...]
    written: int


_linear: WeakSet[Teacher] = WeakSet()  # teachers whose output has been found to be a matrix product


def capture(
    teacher: Teacher,
    source: SequenceSource,
    store: SoftTargetStore,
    report: Report,
    share: Share = WHOLE,
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
    spans = {shard: store.span(shard) for shard in mine}
    finished = sum(
        spans[shard][1] - spans[shard][0] for shard in mine if states[shard] == "complete"
    )
    bases: Mapping[str, Basis] = {}
    taken: dict[int, list[Tokens]] = {}
    if store.needs_companion:
        bases = _companion(teacher, source, store, report, share, taken).bases
    for shard, state in states.items():
        if state == "complete":
            continue
        start, stop = spans[shard]

        def watch(words: str, base: int = finished) -> Progress:
            return lambda done: report(base + done, words)

        # The first shard's sequences are written before it is known how to keep what is said of
        # them.
        first = shard == 0 and store.needs_companion
        asked = None if first else source.requests(start, stop)
        if asked is not None:
            requests, sampling = asked
            sequences, arrays = teacher.speak_and_score(
                requests,
                sampling,
                recipe,
                bases,
                first_index=start,
                progress=watch("the teacher writes"),
            )
        else:
            sequences = taken.pop(shard, []) or source.take(
                teacher, start, stop, watch("the teacher writes")
            )
            share_done = _per_sequence(sequences, watch("the teacher scores"))
            arrays = teacher.score(sequences, recipe, bases, share_done)
        store.write_shard(shard, sequences, arrays)
        finished += stop - start
        report(finished, "saved")
    counts = list(states.values())
    damaged = tuple(shard for shard, state in states.items() if state == "damaged")
    return CaptureSummary(counts.count("complete"), damaged, len(counts) - counts.count("complete"))


def _per_sequence(sequences: Sequence[Tokens], progress: Progress) -> Progress:
    """Turn a count of positions into one of sequences."""
    total = max(1, sum(len(tokens) - 1 for tokens in sequences))
    return lambda positions: progress(len(sequences) * positions // total)


def _companion(
    teacher: Teacher,
    source: SequenceSource,
    store: SoftTargetStore,
    report: Report,
    share: Share,
    taken: dict[int, list[Tokens]],
) -> Companion:
    """The store's companion: as it is there, or fitted to the first shard's sequences by the
    first process."""
    alone = 0.0
    while (found := store.companion()) is None and share.rank > 0:
        report(0, "waiting for the first process")
        time.sleep(WAIT_SECONDS)
        alone = 0.0 if is_held(store.folder) else alone + WAIT_SECONDS
        if alone > PATIENCE_SECONDS:
            raise CaptureError(
                f"process {share.rank} of {share.world} waits for the first one to begin store "
                f"{store.folder}, and "
                "none is at work there; start all of them together"
            )
    if found is not None:
        return found
    start, stop = store.span(0)
    if store.state(0) == "complete":
        sequences = [store.tokens(index) for index in range(start, stop)]
    else:
        sequences = taken[0] = source.take(
            teacher, start, stop, lambda done: report(0, f"the teacher writes, {done} of {stop}")
        )
    report(0, "fitting what is kept of hidden states")
    # The first shard stands for the others. What it holds alone is known to every process.
    positions = sum(len(tokens) - 1 for tokens in sequences) * store.manifest.shards
    limit = min(FIT_POSITIONS, max(FIT_LEAST, round(FIT_SHARE * positions)))
    companion = fit_companion(teacher, sequences, store.manifest.recipe, limit=limit)
    store.write_companion(companion)
    return companion


def fit_companion(
    teacher: Teacher, sequences: Sequence[Tokens], recipe: Recipe, *, limit: int = FIT_POSITIONS
) -> Companion:
    """Fit how hidden states are encoded to some of the sequences, and take the output matrix along.

    ``limit``: positions it is fitted on, at most.

    Raises:
        CaptureError: see ``capture``.
    """
    chosen = _first_positions(sequences, limit)
    vocab_size = teacher.info.vocab_size
    bases: dict[str, Basis] = {}
    head = None
    if recipe.needs_states:
        require_linear_output(teacher, chosen[0])
    found = teacher.states(chosen, recipe.layers)
    final = torch.from_numpy(found["final"])
    if recipe.has_sketch:
        some = final[:: max(1, len(final) // METRIC_POSITIONS)][:METRIC_POSITIONS]
        metric = tail_metric(some, teacher.output_rows, vocab_size)
        bases["final"] = fit_basis(final, metric, min(recipe.sketch_bytes, final.shape[1]))
        head = bases["final"].head(teacher.output_rows, vocab_size)
    elif recipe.kind == "hidden":
        rows = [
            torch.from_numpy(
                teacher.output_rows(start, min(vocab_size, start + LINEAR_ROWS))
            ).half()
            for start in range(0, vocab_size, LINEAR_ROWS)
        ]
        head = OutputHead(
            torch.cat(rows).float(), torch.zeros(vocab_size)
        )  # as it will be read back
    for layer in recipe.layers:
        states = torch.from_numpy(found[f"layer{layer}"])
        bases[f"layer{layer}"] = fit_basis(states, None, min(recipe.layer_bytes, states.shape[1]))
    return Companion(bases, head)


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
            "from its final "
            "hidden state times its output matrix, so hidden states cannot stand for them; choose "
            "targets.kind=compact with targets.sketch_bytes=0, or targets.kind=dense"
        )
    _linear.add(teacher)


def _first_positions(sequences: Sequence[Tokens], limit: int) -> list[Tokens]:
    """Evenly chosen sequences with about ``limit`` positions together, the last one cut."""
    average = max(1, sum(len(tokens) - 1 for tokens in sequences) // len(sequences))
    count = min(len(sequences), max(1, -(-limit // average)))
    chosen, room = [], limit
    for place in np.linspace(0, len(sequences) - 1, count).round().astype(int):
        if room < 1:
            break
        chosen.append(sequences[place][: room + 1])
        room -= len(chosen[-1]) - 1
    return chosen
