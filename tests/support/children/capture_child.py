"""Captures in a process of its own that a test can kill: what ``tests.teachers.store.test_capture``
starts.

Reads one line of JSON for each capture and forks for it, so that heavy modules are imported once.
The child says ``held`` when it has the folder or the teacher, and ``capturing`` when it begins,
which it does once the file ``gate`` exists if the order names one; on ``wait``, the parent tells
how each child has ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from teachers.atomic_files import exclusive
from teachers.base import (
    GenerationRequest,
    Keep,
    Progress,
    Sampling,
    Teacher,
    Tokens,
)
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.store.capture import capture
from teachers.store.manifest import TASKS, Manifest
from teachers.store.store import SoftTargetStore
from teachers.store.tasks import Tasks
from teachers.targets.recipe import Recipe

SEQUENCES, PER_SHARD = 14, 4
LEASE_SECONDS = 1.0  # after which a process without a sign of life is given up
RECIPE = Recipe(num_topk=6, sketch_bytes=24)


@dataclass(frozen=True)
class Source:
    """Seeded sequences of many lengths, or requests for the teacher (``SequenceSource``)."""

    spoken: bool | int = False
    masked: bool = False

    def __len__(self) -> int:
        return SEQUENCES

    def generation_request(self, start: int, stop: int) -> GenerationRequest | None:
        """See ``SequenceSource.generation_request``."""
        if not self.spoken:
            return None
        prompts = [[np.array([0, *range(5, 5 + n % 5)], np.int32)] for n in range(start, stop)]
        sampling = Sampling(temperature=2.0, max_length=24, seed=3)
        return GenerationRequest(prompts, sampling, start, self.keep(start, stop))

    def keep(self, start: int, stop: int) -> list[Keep] | None:
        """See ``SequenceSource.keep``: the first and every third prediction, and what follows."""
        return [np.arange(1 + n % 9) % 3 == 0 for n in range(start, stop)] if self.masked else None

    def take(self, teacher: Teacher, start: int, stop: int, progress: Progress) -> list[Tokens]:
        """See ``SequenceSource.take``."""
        request = self.generation_request(start, stop)
        if request is not None:
            return teacher.generate(request, progress)
        randoms = [np.random.default_rng([5, index]) for index in range(start, stop)]
        return [
            random.integers(3, teacher.info.vocab_size, random.integers(2, 40)).astype(np.int32)
            for random in randoms
        ]


def begin(
    folder: Path, teacher: Teacher, source: Source, recipe: Recipe = RECIPE
) -> SoftTargetStore:
    """The store of this teacher's answers in ``folder``, as far as it is there."""
    identity: dict[str, Any] = {
        "teacher_sha256": teacher.info.sha256,
        "vocab_size": teacher.info.vocab_size,
        "spoken": bool(source.spoken),
        "recipe": recipe.to_json(),
        **({"train_on": "assistant"} if source.masked else {}),
    }
    return SoftTargetStore.create_or_open(folder, Manifest(identity, len(source), PER_SHARD))


def say(*words: object) -> None:
    """One line, written at once: several processes share the pipe."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def die_at(sync: int) -> None:
    """Be killed while a file is written: before its numbered call for the disk returns."""
    calls, fsync = [0], os.fsync

    def deadly(handle: int) -> None:
        if calls[0] == sync:
            os.kill(os.getpid(), signal.SIGKILL)
        calls[0] += 1
        fsync(handle)

    os.fsync = deadly  # type: ignore[assignment]


def work(order: dict[str, Any]) -> None:
    """One capture, or only holding a folder until killed."""
    folder = Path(order["folder"])
    if "die_at" in order:
        die_at(order["die_at"])
    if "teacher" not in order:
        with exclusive(folder, order["rank"]):
            say("held")
            time.sleep(600)
    source = Source(order.get("spoken", False))
    with GGUFTeacher(Path(order["teacher"]), threads=1) as teacher:
        say("held")
        store = begin(folder, teacher, source)
        teacher.logits([np.arange(2, 5, dtype=np.int32)])  # loads what its process needs
        while "gate" in order and not Path(order["gate"]).exists():
            time.sleep(0.005)
        say("capturing")
        slow, tasks = order.get("slow", 0.0), Tasks(folder / TASKS, seconds=LEASE_SECONDS)
        capture(teacher, source, store, lambda done, words: time.sleep(slow), tasks)


def main() -> None:
    """Fork for each order; several run side by side, and each end is told in order of beginning."""
    children: list[int] = []
    for line in sys.stdin:
        if line == "wait\n":
            for child in children:
                say("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            children = []
            continue
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(json.loads(line))
                status = 0
            finally:
                os._exit(status)
        say(child)
        children.append(child)


if __name__ == "__main__":
    main()
