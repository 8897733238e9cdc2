"""Corpus → teacher → store, shard by shard; a rerun does only what is missing or damaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from teachers.base import Progress, Teacher, Tokens
from teachers.store import SoftTargetStore

Report = Callable[[int, str], None]
"""Called with the number of finished sequences (over the whole store) and what is being done."""


class SequenceSource(Protocol):
    """Where the token sequences come from. ``take`` must give the same sequences every time."""

    def __len__(self) -> int:
        """Number of sequences."""
        ...

    def take(self, teacher: Teacher, start: int, stop: int, progress: Progress) -> list[Tokens]:
        """Sequences ``start`` to ``stop``; the teacher may have to write them. Each has ≥ 2 tokens."""
        ...


@dataclass(frozen=True)
class CaptureSummary:
    """What one capture did: shards taken over from before, recaptured because damaged, and written."""

    reused: int
    damaged: tuple[int, ...]
    written: int


def capture(
    teacher: Teacher, source: SequenceSource, store: SoftTargetStore, report: Report
) -> CaptureSummary:
    """Fill ``store`` with the teacher's soft targets of every sequence of ``source``."""
    identity = store.manifest.identity
    states = [store.state(shard) for shard in range(store.manifest.shards)]
    finished = sum(
        stop - start
        for shard, state in enumerate(states)
        if state == "complete"
        for start, stop in [store.span(shard)]
    )
    for shard, state in enumerate(states):
        if state == "complete":
            continue
        start, stop = store.span(shard)

        def speaking(done: int, base: int = finished) -> None:
            report(base + done // 2, "the teacher writes")

        sequences = source.take(teacher, start, stop, speaking)
        total = sum(len(tokens) - 1 for tokens in sequences)

        def scoring(done: int, base: int = finished, total: int = total, count: int = stop - start) -> None:
            report(base + count * (total + done) // (2 * total), "the teacher scores")

        arrays = teacher.score(sequences, identity["num_topk"], tuple(identity["nodes"]), scoring)
        store.write_shard(shard, sequences, arrays)
        finished += stop - start
        report(finished, "saved")
    damaged = tuple(shard for shard, state in enumerate(states) if state == "damaged")
    return CaptureSummary(states.count("complete"), damaged, len(states) - states.count("complete"))
