"""Where a student begins: at its teacher's weights, at its token embeddings alone, or at random
numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from distill.config.schema import RunConfig
from distill.errors import UserError
from distill.initialization.from_teacher import head_start, require_head_start
from distill.initialization.shape import new_student, student_shape
from distill.runtime.launch import Launch
from distill.runtime.progress import Console
from students.model.build import build_student
from students.model.decoder import SO8TForCausalLM
from students.weights import plain_weights, set_weights
from teachers.atomic_files import write_whole
from teachers.base import TeacherInfo, Tokens
from teachers.gguf.file import TeacherFileError, read_gguf
from teachers.store.teacher_record import Inheritance


def settle_beginning(
    config: RunConfig, info: TeacherInfo, gguf: Path | None, console: Console
) -> RunConfig:
    """The settings with the student's beginning.

    ``gguf``: whose weights the student can begin at, if that file is here. Where it cannot, and
    why, is said.

    Raises:
        UserError: the teacher's weights are asked for, and it is not here.
    """
    init = config.student.init
    if init == "teacher" and gguf is None:
        raise UserError(
            "student.init = teacher needs the teacher's weights, which a store does not hold; give "
            "its file with "
            "--teacher, or --init embeddings"
        )
    if init in ("auto", "teacher"):
        reason = (
            "its file is not here (--teacher)" if gguf is None else _obstacle(config, info, gguf)
        )
        init = "teacher" if reason is None else "embeddings"
        if reason is not None:
            tell = console.warn if config.student.init == "teacher" else console.note
            tell(
                f"the student cannot begin at the teacher's weights: {reason}; it begins at random "
                "ones, with the "
                "teacher's token embeddings (--init embeddings)"
            )
    return config.model_copy(update={"student": config.student.model_copy(update={"init": init})})


def begin(
    config: RunConfig,
    inheritance: Inheritance,
    gguf: Path | None,
    sequences: Sequence[Tokens],
    kept: Path,
    launch: Launch,
    console: Console,
) -> SO8TForCausalLM:
    """The student as training begins; the same settings give the same bytes.

    A head start is computed once, by the first process, and kept in the file ``kept``.
    ``sequences``: training text on which the teacher's weights are looked at.
    """
    shape = student_shape(config, inheritance.info)
    if config.student.init == "random":
        return build_student(shape, config.seed)
    if config.student.init == "embeddings":
        return new_student(shape, config.seed, inheritance.embeddings)
    student = build_student(shape, config.seed)
    if launch.first and not _restore(student, kept):
        assert gguf is not None
        with console.stage("Head start", total=shape.num_hidden_layers) as stage:
            made = head_start(shape, read_gguf(gguf), sequences, config.seed, stage.update)
            write_whole(kept, safetensors.torch.save(plain_weights(made)))
            stage.finish("the student begins at the teacher's weights")
    launch.wait()
    if not _restore(student, kept):
        raise UserError(f"{kept} cannot be read; delete it and run the same command again")
    return student


def _obstacle(config: RunConfig, info: TeacherInfo, gguf: Path) -> str | None:
    """Why the student cannot begin at the weights of this file, or nothing if it can."""
    try:
        require_head_start(student_shape(config, info), read_gguf(gguf))
    except TeacherFileError as error:
        return str(error)
    return None


def _restore(student: SO8TForCausalLM, kept: Path) -> bool:
    """Fill the student from the file, if that is there and whole."""
    try:
        set_weights(student, safetensors.torch.load_file(kept))
    except (
        SafetensorError,
        OSError,
        KeyError,
        ValueError,
    ):  # not there, cut off, or of another shape
        return False
    return True
