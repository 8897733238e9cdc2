"""Where a student begins: at its teacher's weights, at its token embeddings alone, or at random numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from distill.checkpoint import plain_weights, set_weights
from distill.config import LossConfig, RunConfig, TrainConfig
from distill.console import Console
from distill.errors import UserError
from distill.head_start import head_start, require_head_start
from distill.held_out import held_out_score
from distill.launch import Launch
from distill.new_student import new_student, student_shape
from distill.objective import Batch, Objective
from distill.schedule import peak_learning_rate
from distill.training_module import TrainingModule
from students.builder import build_student
from students.model import SO8TForCausalLM
from students.student import Student
from teachers import example_teacher
from teachers.base import TeacherInfo, Tokens
from teachers.files import write_whole
from teachers.gguf_file import TeacherFileError, file_sha256, read_gguf
from teachers.inheritance import Inheritance

# Weights that mean something already are spoilt by steps as large as random ones need, and the more so the nearer they
# are to the teacher (docs/benchmarks.md).
HEAD_START_RATE, LEAST_RATE = 0.5, 0.02


def settle_beginning(config: RunConfig, info: TeacherInfo, gguf: Path | None, console: Console) -> RunConfig:
    """The settings with the student's beginning.

    ``gguf``: whose weights the student can begin at, if that file is here. Where it cannot, and why, is said.

    Raises:
        UserError: the teacher's weights are asked for, and it is not here.
    """
    init = config.student.init
    if init == "teacher" and gguf is None:
        raise UserError(
            "student.init = teacher needs the teacher's weights, which a store does not hold; give its file with "
            "--teacher, or --init embeddings"
        )
    if init in ("auto", "teacher"):
        reason = "its file is not here (--teacher)" if gguf is None else _obstacle(config, info, gguf)
        init = "teacher" if reason is None else "embeddings"
        if reason is not None:
            tell = console.warn if config.student.init == "teacher" else console.note
            tell(
                f"the student cannot begin at the teacher's weights: {reason}; it begins at random ones, with the "
                "teacher's token embeddings (--init embeddings)"
            )
    return config.model_copy(update={"student": config.student.model_copy(update={"init": init})})


def with_learning_rate(
    config: TrainConfig, student: Student, init: str, held_out: Iterable[Batch]
) -> TrainConfig:
    """The settings with a peak learning rate that suits the beginning, where none is given.

    From the teacher's weights it is √KL / 2 of the usual one (at most half of it, at least a fiftieth), with the KL
    that the student begins at on the held-out text, in nats per token.
    """
    if config.learning_rate is not None:
        return config
    share = 1.0
    if init == "teacher":
        score = held_out_score(TrainingModule(student, Objective(LossConfig())), held_out)
        share = min(HEAD_START_RATE, max(LEAST_RATE, HEAD_START_RATE * math.sqrt(max(0.0, score.kl))))
    rate = share * peak_learning_rate(config, student.config.hidden_size)
    return config.model_copy(update={"learning_rate": rate})


def find_teacher(path: str | None, info: TeacherInfo) -> Path | None:
    """The file of a store's teacher: ``path`` where it is given, or the example teacher where it is that one.

    Raises:
        UserError: ``path`` is another teacher.
        TeacherFileError: it is no GGUF file.
    """
    if path is None:
        return example_teacher() if file_sha256(example_teacher()) == info.sha256 else None
    read_gguf(Path(path))
    if file_sha256(Path(path)) != info.sha256:
        raise UserError(
            f"--teacher {path} is not the teacher whose soft targets the store holds ({info.name}, SHA-256 "
            f"{info.sha256[:12]}…); leave it out, or give that file"
        )
    return Path(path)


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

    A head start is computed once, by the first process, and kept in the file ``kept``. ``sequences``: training text on
    which the teacher's weights are looked at.
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
    except (SafetensorError, OSError, KeyError, ValueError):  # not there, cut off, or of another shape
        return False
    return True
