"""Whether llama.cpp captures faster with a copy of the teacher in floating point, by trying."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from distill.capture.teachers import open_teacher
from distill.capture.temporary_files.widened import copy_bytes, is_cheap, scoring_speed
from distill.errors import UserError
from distill.pipeline.budget.measure import Measured
from distill.runtime.format import human_bytes
from distill.runtime.progress import Console
from teachers import example_teacher
from teachers.errors import TeacherError
from teachers.gguf.file import read_gguf

# float16 multiplies in float32, which every processor does; bfloat16 is up to 1.7 times as fast
# where the processor has products of it, and slower elsewhere (docs/machines.md).
KINDS = ("f16", "bf16")
WORTH_A_COPY = 1.2  # times as fast, that a copy is recommended from


@dataclass(frozen=True)
class TeacherCopy:
    """A copy as ``teacher.weights_as`` asks for, how many times as fast as the file llama.cpp
    scores with it, and its size in bytes."""

    kind: str
    faster: float
    size: int

    @property
    def setting(self) -> str:
        """As the command line takes it."""
        return f"--set teacher.weights_as={self.kind}"

    @property
    def takes(self) -> str:
        """What it takes, in words."""
        return f"{human_bytes(self.size)} of memory and disk meanwhile"


def faster_copy(measured: Measured, console: Console) -> TeacherCopy | None:
    """The fastest copy, where one may be worth a trial and is worth it; none of a teacher that
    writes its text itself, token by token."""
    asked = measured.config.teacher
    here = asked.path is None or Path(asked.path).is_file()
    if asked.weights_as or asked.mix_with or not here or measured.corpus.spoken:
        return None
    file = read_gguf(Path(asked.path) if asked.path else example_teacher())
    if measured.on_device or not is_cheap(file):
        return None
    speeds = {}
    with console.stage("Try copies", total=1 + len(KINDS)) as stage:
        try:
            for kind in (None, *KINDS):
                with open_teacher(asked.model_copy(update={"weights_as": kind})) as teacher:
                    speeds[kind] = scoring_speed(teacher, measured.probe.sequences)
                stage.update(len(speeds))
        except (UserError, TeacherError, OSError) as error:  # of the copy: the file was probed
            stage.finish(f"not possible: {error}")
            return None
        words = [f"{speeds[kind]:,.0f} as {kind}" for kind in KINDS]
        stage.finish(f"{speeds[None]:,.0f} tokens/s with the file, {', '.join(words)}")
    best = max(KINDS, key=speeds.__getitem__)
    if speeds[best] < WORTH_A_COPY * speeds[None]:
        return None
    return TeacherCopy(best, speeds[best] / speeds[None], copy_bytes(file, best))


def with_copy(measured: Measured, copy: TeacherCopy) -> Measured:
    """The same for a run that captures with the copy."""
    teacher = measured.config.teacher.model_copy(update={"weights_as": copy.kind})
    config = measured.config.model_copy(update={"teacher": teacher})
    probe = replace(
        measured.probe,
        seconds_per_token=measured.probe.seconds_per_token / copy.faster,
        faster=copy.faster,
        memory_bytes=measured.probe.memory_bytes + copy.size,
    )
    return replace(measured, resolved=replace(measured.resolved, config=config), probe=probe)
