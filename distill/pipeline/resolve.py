"""Settings resolved against the teacher: what a run works with from its first stage on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil

from distill.base_models.base_model import Base, open_base
from distill.base_models.memory_check import judge_base, require_fit
from distill.base_models.memory_estimate import least_memory, snapshot_bytes
from distill.base_models.new_student_memory import memory_of_new
from distill.config.schema import RunConfig
from distill.errors import UserError
from distill.initialization.shape import describe_parameters, student_shape, student_size
from distill.initialization.start import resolve_initialization
from distill.runtime.device import training_device
from distill.runtime.format import human_bytes, human_count
from distill.runtime.launch_environment import fsdp_is_asked_for
from distill.runtime.progress import Console
from students.model.config import SO8TConfig
from students.model.sizes import decoder_parameters
from teachers.base import TeacherInfo
from teachers.gguf.file import Field


@dataclass(frozen=True)
class Resolved:
    """Settings with the student's size, initialization and checkpointing, and one of two:
    ``shape`` of a new student, or the ``base`` model that it is made of."""

    config: RunConfig
    shape: SO8TConfig | None
    base: Base | None

    def with_length(self, longest: int) -> Resolved:
        """The same with the length of sequences that the data has led to."""
        data = self.config.data.model_copy(update={"max_length": longest})
        return replace(self, config=self.config.model_copy(update={"data": data}))

    @property
    def layers(self) -> int:
        """The student's decoder layers."""
        if self.base is not None:
            return self.base.layers
        assert self.shape is not None
        return self.shape.num_hidden_layers


def resolve(
    config: RunConfig,
    info: TeacherInfo,
    tokenizer: Mapping[str, Field],
    gguf: Path | None,
    console: Console,
) -> Resolved:
    """Decide what the settings leave to the teacher.

    ``tokenizer``: the teacher's, for a base model. ``gguf``: whose weights a new student may start
    from, if that file is here.

    Raises:
        UserError: no student of this teacher is like that, or the base does not suit it.
    """
    student, train = config.student, config.train
    shape, base = None, None
    if student.base is not None:
        base = open_base(config, tokenizer, info.vocab_size)
    else:
        size = str(student_size(config, info))
        student = student.model_copy(update={"size": size})
        shape = student_shape(config.model_copy(update={"student": student}), info)
        init = resolve_initialization(student.init, shape, gguf, console)
        student = student.model_copy(update={"init": init})
    if train.gradient_checkpointing is None:
        train = train.model_copy(update={"gradient_checkpointing": base is not None})
    return Resolved(config.model_copy(update={"student": student, "train": train}), shape, base)


def require_memory(resolved: Resolved, info: TeacherInfo, longest: int, console: Console) -> None:
    """Print how large the student is, before anything of that size is allocated. ``longest``:
    tokens of a sequence, 0 where that is not known.

    Raises:
        UserError: it cannot be trained on this machine.
    """
    resolved = resolved.with_length(longest) if longest else resolved
    if resolved.base is None:
        _require_memory_of_new(resolved, info, console)
        return
    if fsdp_is_asked_for():
        raise UserError(
            "--student-base cannot be spread over processes by FSDP: its frozen weights are there "
            "whole in each; leave out --use_fsdp"
        )
    judge_base(resolved.base, resolved.config, info.vocab_size, console)


def _require_memory_of_new(resolved: Resolved, info: TeacherInfo, console: Console) -> None:
    config, shape = resolved.config, resolved.shape
    assert shape is not None
    parameters, trained = decoder_parameters(shape), decoder_parameters(shape, gates=True)
    console.note(f"student {config.student.size}: {describe_parameters(shape, info)}")
    what = f"training student {config.student.size} ({human_count(trained)} parameters)"
    on_cpu = training_device().type == "cpu"
    if not on_cpu and not fsdp_is_asked_for():
        require_fit(what, config, partial(memory_of_new, shape))
    # Activations are less than estimated where sequences are shorter than the longest, and main
    # memory may be swapped out: there only the very least is asked for.
    needed, memory = least_memory(config, trained), psutil.virtual_memory().total
    if on_cpu and needed > memory:
        snapshots = human_bytes(snapshot_bytes(config, trained))
        guard = f", {snapshots} of that for the guard's snapshots (train.guard.snapshots)"
        raise UserError(
            f"{what} takes at least {human_bytes(needed)} of memory"
            f"{guard if config.train.guard.enabled else ''}, this machine has "
            f"{human_bytes(memory)}; choose a smaller size"
        )
    if parameters >= info.parameters > 0:
        console.warn(
            f"student {config.student.size} has {human_count(parameters)} parameters, not fewer "
            f"than the teacher's {human_count(info.parameters)}; choose a smaller --student-size "
            "to compress"
        )
