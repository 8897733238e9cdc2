"""The student before training: its size, its shape, its first weights."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from distill.config.schema import RunConfig
from distill.errors import UserError
from distill.initialization.embeddings import initialize_embeddings
from distill.runtime.format import human_count
from students.model.build import build_student, student_config
from students.model.config import SO8TConfig
from students.model.decoder import SO8TForCausalLM
from students.model.shape import Budget, StudentSize, TeacherLikeness, default_size, parse_request
from students.model.sizes import choose_size, decoder_parameters
from teachers.base import TeacherInfo

NOTABLE = 1.02  # times as many parameters in training as in the exported file


def student_size(config: RunConfig, info: TeacherInfo) -> StudentSize:
    """The size asked for, as width and layers; where none is, half the teacher's width and depth.

    Raises:
        UserError: no student of this teacher is as small, or none has the heads that were asked
        for.
    """
    request = parse_request(config.student.size) if config.student.size else None
    if isinstance(request, StudentSize):
        return request
    of_parameters = request is not None and not isinstance(request, Budget)
    if not (info.width and info.layers) or (of_parameters and not info.parameters):
        raise UserError(
            f"{info.name}: how large it is its server does not say; give the student's width and "
            "layers, such as --student-size 512x4"
        )
    if request is None:
        return default_size(info.width, info.layers)
    wanted = (
        request.parameters
        if isinstance(request, Budget)
        else round(request.share * info.parameters)
    )
    try:
        return choose_size(
            max(1, wanted),
            StudentSize(info.width, info.layers),
            lambda size: _shape(config, info, size),
        )
    except ValueError as error:
        raise UserError(f"student size {config.student.size}: {error}") from None


def student_shape(config: RunConfig, info: TeacherInfo) -> SO8TConfig:
    """Every setting of the student's model.

    Raises:
        UserError: the size, heads or head width asked for do not fit together; says what would.
    """
    size = student_size(config, info)
    try:
        shape = _shape(config, info, size)
    except ValueError as error:
        raise UserError(f"student {size}: {error}") from None
    shape.safety_head, shape.verification_head = config.safety_head, config.verification_head
    return shape


def likeness(info: TeacherInfo) -> TeacherLikeness:
    """What of a teacher's shape its student follows."""
    return TeacherLikeness(width=info.width, **asdict(info.shape))


def _shape(config: RunConfig, info: TeacherInfo, size: StudentSize) -> SO8TConfig:
    return student_config(
        size,
        vocab_size=info.vocab_size,
        context_length=info.context_length,
        tie_embeddings=config.student.tie_embeddings,
        bos=info.bos,
        eos=info.eos,
        like=likeness(info),
        chosen=config.student.chosen,
    )


def describe_parameters(shape: SO8TConfig, info: TeacherInfo) -> str:
    """Parameters of the exported student and their share of the teacher's; with the gates, which
    are folded away at export, where those are notably more."""
    parameters, trained = decoder_parameters(shape), decoder_parameters(shape, gates=True)
    words = f"{human_count(parameters)} parameters"
    if info.parameters:
        words += f", {parameters / info.parameters:.1%} of the teacher's"
    if trained > NOTABLE * parameters:
        words += f" ({human_count(trained)} in training, with the SO(8) gates)"
    return words


def new_student(shape: SO8TConfig, seed: int, embeddings: NDArray[np.float16]) -> SO8TForCausalLM:
    """The student as training begins: random weights from the seed, embeddings from the
    teacher's scores."""
    student = build_student(shape, seed)
    initialize_embeddings(student, embeddings)
    return student
