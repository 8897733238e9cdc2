"""The student before training: its size, its shape, its first weights."""

from __future__ import annotations

import numpy as np
import psutil
from numpy.typing import NDArray

from distill.config import RunConfig
from distill.console import Console, human_bytes, human_count
from distill.errors import UserError
from students.builder import (
    StudentSize,
    build_student,
    count_parameters,
    default_size,
    parse_size,
    student_config,
)
from students.config import SO8TConfig
from students.initialise import initialise_embeddings
from students.model import SO8TForCausalLM
from teachers.base import TeacherInfo

TRAINING_COPIES = 4  # float32 weights, gradients and two moments: what training needs at the very least


def student_size(config: RunConfig, info: TeacherInfo) -> StudentSize:
    """The size asked for; where none is, half the teacher's width and depth."""
    return parse_size(config.student.size) if config.student.size else default_size(info.width, info.layers)


def with_size(config: RunConfig, info: TeacherInfo) -> RunConfig:
    """The settings with what depends on the teacher filled in: the student's default size."""
    size = str(student_size(config, info))
    return config.model_copy(update={"student": config.student.model_copy(update={"size": size})})


def student_shape(config: RunConfig, info: TeacherInfo) -> SO8TConfig:
    """Every setting of the student's model."""
    return student_config(
        student_size(config, info),
        vocab_size=info.vocab_size,
        context_length=info.context_length,
        tie_embeddings=config.student.tie_embeddings,
        bos=info.bos,
        eos=info.eos,
    )


def judge_size(config: RunConfig, shape: SO8TConfig, info: TeacherInfo, console: Console) -> None:
    """Say how large the student is, before anything of that size is allocated.

    Raises:
        UserError: this machine has not the memory to train it.
    """
    parameters = count_parameters(shape)
    console.note(f"student {config.student.size}: {human_count(parameters)} parameters")
    needed, memory = 4 * parameters * TRAINING_COPIES, psutil.virtual_memory().total
    if needed > memory:
        raise UserError(
            f"student {config.student.size} has {human_count(parameters)} parameters; training it needs at least "
            f"{human_bytes(needed)} of memory, this machine has {human_bytes(memory)}; choose a smaller size"
        )
    if parameters >= info.parameters:
        console.warn(
            f"student {config.student.size} has {human_count(parameters)} parameters, not fewer than the "
            f"teacher's {human_count(info.parameters)}; choose a smaller --student-size to compress"
        )


def new_student(shape: SO8TConfig, seed: int, embeddings: NDArray[np.float16]) -> SO8TForCausalLM:
    """The student as training begins: random weights from the seed, embeddings from the teacher's scores."""
    student = build_student(shape, seed)
    initialise_embeddings(student, embeddings)
    return student
