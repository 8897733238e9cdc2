"""What would make training fit in memory: smaller batches, rank, length, 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from distill.config.schema import USUAL_LENGTH, RunConfig
from distill.runtime.format import human_bytes

LEAST_RANK, LEAST_LENGTH = 4, 64


def how_to_fit(limit: int, config: RunConfig, total: Callable[[RunConfig], int]) -> list[str]:
    """Changes of settings that together make training fit into ``limit`` bytes, those that harm
    least first; empty where it fits as it is.

    ``total``: what training takes with some settings. Each line says what it saves beside those
    before it. Where all of them do not suffice, the last line says so.
    """
    lines: list[str] = []
    needed = total(config)
    for ways in _CHANGES:
        if needed <= limit:
            return lines
        least, setting, best = needed, "", config
        for text, changed in ways(config):
            size = total(changed)
            if size < least:
                least, setting, best = size, text, changed
            if size <= limit:
                break
        if least < needed:
            saved = human_bytes(needed - least)
            lines.append(f"{setting} saves {saved} (then {human_bytes(least)})")
        needed, config = least, best
    if needed <= limit:
        return lines
    smaller = "base" if config.student.base is not None else "--student-size"
    return [*lines, f"no change makes it fit; choose a smaller {smaller}"]


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
    if config.student.base is not None and not config.student.load_in_4bit:
        yield _changed(config, "student", load_in_4bit=True)


def _rank(config: RunConfig) -> Ways:
    rank = config.student.lora_rank if config.student.base is not None else LEAST_RANK
    while rank > LEAST_RANK:
        rank = max(rank // 2, LEAST_RANK)
        yield _changed(config, "student", lora_rank=rank)


def _length(config: RunConfig) -> Ways:
    length = config.data.max_length or USUAL_LENGTH
    while length > LEAST_LENGTH:
        length = max(length // 2, LEAST_LENGTH)
        yield _changed(config, "data", max_length=length)


# The first two change nothing in the result, and the third only how far a rollback can go.
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
    text = ", ".join(f"{section}.{name}={str(value).lower()}" for name, value in values.items())
    return text, config.model_copy(
        update={section: getattr(config, section).model_copy(update=values)}
    )
