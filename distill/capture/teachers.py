"""Which teacher the settings mean: a GGUF file, a transformers folder, or several mixed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pydantic import JsonValue

from distill.config.sources import TeacherConfig
from distill.errors import UserError
from teachers import example_teacher
from teachers.base import Teacher, TeacherInfo
from teachers.gguf.file import Field, read_gguf, tokenizer_fields
from teachers.gguf.split import model_stem
from teachers.huggingface.folder import check_folder
from teachers.llama_cpp.library.kernels import LoadOptions
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.llama_cpp.worker import require_loadable
from teachers.reduced import ReducedTeacher
from teachers.tokenizer.chat_template import with_variables
from teachers.tokenizer.gguf_metadata import with_template_variables

MOST_STEM = 60  # characters of a folder's name


def teacher_paths(config: TeacherConfig) -> list[Path]:
    """Every teacher's path, the main one first; by default the example teacher."""
    first = Path(config.path) if config.path else example_teacher()
    return [first, *(Path(path) for path in config.mix_with)]


def teacher_stem(config: TeacherConfig) -> str:
    """A short name for folders, of signs that no shell or terminal takes for anything else."""
    if config.path is None:
        return "example"
    path = Path(config.path)
    stem = model_stem(path)  # a link's target may have a name that says nothing of the other parts
    stem = path.resolve().stem if stem == path.stem else stem
    return re.sub(r"[^\w.-]+", "-", stem)[:MOST_STEM].strip("-") or "teacher"


def find_gguf(config: TeacherConfig) -> Path | None:
    """The first teacher that is a GGUF file: the student takes its tokenizer and embeddings."""
    return next((path for path in teacher_paths(config) if not path.is_dir()), None)


def gguf_of(teacher: Teacher, config: TeacherConfig) -> Path | None:
    """The file of an open teacher, from which the student takes tokenizer, embeddings and weights:
    where its vocabulary was cut, that which has what is left."""
    return teacher.file.path if isinstance(teacher, ReducedTeacher) else find_gguf(config)


def tokenizer_of(config: TeacherConfig, path: Path | None = None) -> dict[str, Field]:
    """The tokenizer that the student takes, as GGUF metadata, from ``path`` if it is given; the
    file may be damaged."""
    path = path or find_gguf(config)
    assert path is not None, "see require_gguf"
    return with_template_variables(tokenizer_fields(read_gguf(path)), config.template_variables)


def require_gguf(config: TeacherConfig) -> None:
    """Raise ``UserError`` unless one of the teachers is a GGUF file."""
    if find_gguf(config) is None:
        raise UserError(
            f"teacher {teacher_paths(config)[0]} is a folder: not a GGUF file, whose tokenizer the "
            "exported student needs; capture from a transformers folder with `distill capture`, or "
            "convert it with llama.cpp's convert_hf_to_gguf.py"
        )


def require_teachers(config: TeacherConfig) -> None:
    """Check every teacher's header or folder, that llama.cpp loads it, and that the settings fit.

    Raises:
        UserError, TeacherFileError, TeacherError: one cannot be used, or only with other settings.
        LibraryError: llama.cpp does not work.
    """
    _require_fitting(config)
    for path in teacher_paths(config):
        if path.is_dir():
            check_folder(path)
            continue
        file = read_gguf(path)
        if path != example_teacher():
            require_loadable(file.path)


def _require_fitting(config: TeacherConfig) -> None:
    """Raise ``UserError`` unless the settings fit the kinds of teachers."""
    if config.weights and not config.mix_with:
        raise UserError(
            "teacher.weights is for several teachers; name the others in teacher.mix_with"
        )
    for path in teacher_paths(config):
        if config.load_in_4bit and not path.is_dir():
            raise UserError(
                f"teacher.load_in_4bit is for transformers folders; {path} is already as it is "
                "quantised"
            )
        for name in ("tensor_split", "cache_type"):
            if path.is_dir() and getattr(config, name):
                raise UserError(
                    f"teacher.{name} is for GGUF files, which llama.cpp runs; {path} is a folder, "
                    "so leave it out"
                )


def open_teacher(config: TeacherConfig) -> Teacher:
    """Load the teacher, or all of them; close it after use.

    Raises:
        UserError, TeacherFileError, TeacherError, EnsembleError: it cannot be used.
    """
    _require_fitting(config)
    members: list[Teacher] = []
    try:
        for path in teacher_paths(config):
            members.append(_open_one(path, config))
            members[-1].info = _with_variables(members[-1].info, config.template_variables)
        if len(members) == 1:
            return members[0]
        from teachers.ensemble import EnsembleTeacher

        return EnsembleTeacher(members, config.weights or [1.0] * len(members))
    except BaseException:
        for member in members:
            member.close()
        raise


def _open_one(path: Path, config: TeacherConfig) -> Teacher:
    if path.is_dir():
        from teachers.huggingface.teacher import HuggingFaceTeacher

        return HuggingFaceTeacher(
            path,
            load_in_4bit=config.load_in_4bit,
            main_gpu=config.main_gpu,
            batch_tokens=config.batch_tokens,
            sequences=config.sequences,
        )
    options = LoadOptions(
        gpu_layers=config.gpu_layers,
        main_gpu=config.main_gpu,
        tensor_split=config.tensor_split,
        cache_type=config.cache_type,
        batch_tokens=config.batch_tokens,
        sequences=config.sequences,
    )
    return GGUFTeacher(path, options)


def _with_variables(info: TeacherInfo, variables: Mapping[str, JsonValue]) -> TeacherInfo:
    """Facts of a teacher whose chat templates have the settings' variables."""
    if variables and info.chat_template is None:
        raise UserError(
            f"teacher.template_variables: {info.name} has no chat template that could use them; "
            "leave them out"
        )
    chat, tools = (
        text and with_variables(text, variables)
        for text in (info.chat_template, info.tool_template)
    )
    return replace(info, chat_template=chat, tool_template=tools, template_variables=variables)
