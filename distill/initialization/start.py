"""Where a student begins: at its teacher's weights, at its token embeddings alone, or at random
numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from distill.config.schema import RunConfig
from distill.errors import UserError
from distill.initialization.from_teacher import require_usable_weights, student_from_teacher
from distill.initialization.shape import new_student, student_shape
from distill.runtime.launch import Launch
from distill.runtime.progress import Console
from students.model.build import build_student
from students.model.config import SO8TConfig
from students.model.decoder import SO8TForCausalLM
from students.weights import as_safetensors, plain_weights, set_weights
from teachers.atomic_files import write_whole
from teachers.base import Tokens
from teachers.gguf.file import TeacherFileError, read_gguf
from teachers.store.teacher_record import TeacherRecord


def resolve_initialization(
    init: str, shape: SO8TConfig, gguf: Path | None, console: Console
) -> str:
    """Where a student of this shape starts: at the teacher's weights where ``init`` wants and the
    file ``gguf`` allows it; prints why not.

    Raises:
        UserError: the teacher's weights are asked for, and its file is not here.
    """
    if init not in ("auto", "teacher"):
        return init
    if gguf is None and init == "teacher":
        raise UserError(
            "student.init = teacher needs the teacher's weights, which neither a store nor a "
            "server gives; give its file with --teacher, or --init embeddings"
        )
    reason = "its file is not here (--teacher FILE)"
    if gguf is not None:
        try:
            require_usable_weights(shape, read_gguf(gguf))
            return "teacher"
        except TeacherFileError as error:
            reason = str(error)
    report = console.warn if init == "teacher" else console.note
    report(
        f"the student cannot start from the teacher's weights: {reason}; it starts from random "
        "ones, with the teacher's token embeddings (--init embeddings)"
    )
    return "embeddings"


def begin(
    config: RunConfig,
    teacher_record: TeacherRecord,
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
    shape = student_shape(config, teacher_record.info)
    if config.student.init == "random":
        return build_student(shape, config.seed)
    if config.student.init == "embeddings":
        return new_student(shape, config.seed, teacher_record.embeddings)
    student = build_student(shape, config.seed)
    if launch.first and not _restore(student, kept):
        assert gguf is not None
        with console.stage("Head start", total=shape.num_hidden_layers) as stage:
            del student  # with a large vocabulary, a copy is a gigabyte
            student = student_from_teacher(
                shape, read_gguf(gguf), sequences, config.seed, stage.update
            )
            write_whole(kept, as_safetensors(plain_weights(student)))
            stage.finish("the student begins at the teacher's weights")
    launch.wait()
    if not _restore(student, kept):
        raise UserError(f"{kept} cannot be read; delete it and run the same command again")
    return student


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
