"""Settings resolved against teacher and machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from distill.base_models.base_model import Base, open_base
from distill.base_models.memory_check import judge_base
from distill.config.schema import RunConfig
from distill.errors import UserError
from distill.initialization.shape import judge_size, student_shape, with_size
from distill.initialization.start import settle_beginning
from distill.runtime.launch_environment import fsdp_is_asked_for
from distill.runtime.progress import Console
from teachers.base import TeacherInfo
from teachers.gguf.file import Field


def with_checkpointing(config: RunConfig, wanted: bool) -> RunConfig:
    """The settings with gradient checkpointing or without, unless they say so themselves."""
    if config.train.gradient_checkpointing is not None:
        return config
    return config.model_copy(
        update={"train": config.train.model_copy(update={"gradient_checkpointing": wanted})}
    )


def _settle(
    config: RunConfig,
    tokenizer: Mapping[str, Field],
    info: TeacherInfo,
    gguf: Path | None,
    console: Console,
    longest: int | None = None,
) -> tuple[RunConfig, Base | None]:
    """The settings with what depends on the teacher, and the base that the student is made of, if
    it is not a new one; says how large it will be, and sees that it can be trained here.
    ``longest``: tokens of a sequence, where known.
    """
    if config.student.base is None:
        config = settle_beginning(with_size(config, info), info, gguf, console)
        judge_size(config, student_shape(config, info), info, console)
        return with_checkpointing(config, False), None
    base = open_base(config, tokenizer, info.vocab_size)
    if fsdp_is_asked_for():
        raise UserError(
            "--student-base cannot be spread over processes by FSDP: its frozen weights are there "
            "whole in each; leave "
            "out --use_fsdp"
        )
    config = with_checkpointing(config, True)
    judge_base(base, config, info.vocab_size, longest or config.data.max_length, console)
    return config, base
