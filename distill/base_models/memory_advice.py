"""What would make training a base model fit in memory: smaller batches, rank, length, 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from distill.base_models.memory_estimate import memory_of
from distill.config.schema import RunConfig
from distill.runtime.format import human_bytes

LEAST_RANK, LEAST_LENGTH = 4, 64
NOTHING_FITS = "no change makes it fit; choose a smaller base"


def how_to_fit(
    limit: int, base: Any, config: RunConfig, vocab_size: int, device: torch.device | None = None
) -> list[str]:
    """Changes of settings that together make training fit into ``limit`` bytes, those that harm
    least first; empty where it fits as it is.

    Each says what it saves beside those before it. Where all of them do not suffice, the last line
    says so. Arguments otherwise as for ``memory_of``.
    """
    lines: list[str] = []
    needed = memory_of(base, config, vocab_size, device).total
    for ways in _CHANGES:
        if needed <= limit:
            return lines
        found: tuple[int, str, RunConfig] | None = None
        for words, changed in ways(config):
            total = memory_of(base, changed, vocab_size, device).total
            if total < (needed if found is None else found[0]):
                found = total, words, changed
            if total <= limit:
                break
        if found is None:
            continue
        lines.append(
            f"{found[1]} saves {human_bytes(needed - found[0])} (then {human_bytes(found[0])})"
        )
        needed, config = found[0], found[2]
    return lines if needed <= limit else [*lines, NOTHING_FITS]


Ways = Iterator[tuple[str, RunConfig]]


def _checkpointing(config: RunConfig) -> Ways:
    if config.train.gradient_checkpointing is False:
        yield _changed(config, "train", gradient_checkpointing=True)


def _micro_batches(config: RunConfig) -> Ways:
    count = config.train.accumulation
    while count < config.train.batch_size:
        count = min(2 * count, config.train.batch_size)
        yield _changed(config, "train", accumulation=count)


def _snapshots(config: RunConfig) -> Ways:
    guard = config.train.guard
    for count in range(guard.snapshots - 1, 0, -1):
        changed = _changed(config, "train", guard=guard.model_copy(update={"snapshots": count}))[1]
        yield f"train.guard.snapshots={count}", changed


def _four_bits(config: RunConfig) -> Ways:
    if not config.student.load_in_4bit:
        yield _changed(config, "student", load_in_4bit=True)


def _rank(config: RunConfig) -> Ways:
    rank = config.student.lora_rank
    while rank > LEAST_RANK:
        rank = max(rank // 2, LEAST_RANK)
        yield _changed(config, "student", lora_rank=rank)


def _length(config: RunConfig) -> Ways:
    length = config.data.max_length
    while length > LEAST_LENGTH:
        length = max(length // 2, LEAST_LENGTH)
        yield _changed(config, "data", max_length=length)


# The first two change nothing in the result, and the third only how far back a spoilt training can
# go.
_CHANGES: Sequence[Callable[[RunConfig], Ways]] = (
    _checkpointing,
    _micro_batches,
    _snapshots,
    _four_bits,
    _rank,
    _length,
)


def _changed(config: RunConfig, section: str, **values: Any) -> tuple[str, RunConfig]:
    """The settings with others in one section, and how that is written."""
    words = ", ".join(f"{section}.{name}={str(value).lower()}" for name, value in values.items())
    return words, config.model_copy(
        update={section: getattr(config, section).model_copy(update=values)}
    )
