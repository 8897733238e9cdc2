"""This process's part of its machine, where ``torchrun`` or ``accelerate`` started several."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import psutil

from teachers.base import ProcessRank
from teachers.errors import SettingRefused


def local_place() -> ProcessRank:
    """This process among those of its launch on this machine."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    return ProcessRank(rank, max(rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def own_cores() -> int:
    """Cores for what a process computes beside a GPU; launchers give each a single thread."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    physical = psutil.cpu_count(logical=False)
    return max(1, min(usable or 1, physical or usable or 1) // local_place().world)


class OwnGPU(NamedTuple):
    """One GPU by its number, and how many processes of the launch use it."""

    number: int
    processes: int


def own_gpu(names: Sequence[str], main_gpu: int | None, place: ProcessRank) -> OwnGPU:
    """The GPU that this process uses, of those that it sees by ``names``: ``main_gpu``, where that
    is set, else the one of its place, in turn.

    Raises:
        SettingRefused: there is no such GPU.
    """
    if main_gpu is None:
        count = len(names)
        return OwnGPU(place.rank % count, -(-place.world // count))
    if main_gpu >= len(names):
        seen = ", ".join(f"{number}: {name}" for number, name in enumerate(names)) or "none"
        raise SettingRefused(
            f"teacher.main_gpu = {main_gpu}: there is no such GPU; this process sees {seen}, as "
            "far as CUDA_VISIBLE_DEVICES lets it. "
            + ("Choose one of them" if names else "Leave it out")
        )
    return OwnGPU(main_gpu, place.world)
