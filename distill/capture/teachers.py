"""Which teacher the settings mean: a GGUF file, a transformers folder, a server, or a mixture."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from distill.capture.temporary_files.widened import widened
from distill.config.sources import TeacherConfig
from distill.errors import UserError
from teachers import example_teacher
from teachers.base import Teacher, TeacherInfo
from teachers.errors import TeacherError
from teachers.gguf.file import Field, read_gguf, tokenizer_fields
from teachers.gguf.split import model_stem
from teachers.huggingface.folder import check_folder, check_tokenizer_folder
from teachers.llama_cpp.library.kernels import LoadOptions
from teachers.llama_cpp.teacher import GGUFTeacher, Widened, WorkerTeacher
from teachers.llama_cpp.worker import require_loadable
from teachers.reduced import ReducedTeacher
from teachers.remote.completions import (
    CompletionsTeacher,
    folder_tokenizer,
    gguf_tokenizer,
    served_model,
)
from teachers.remote.connection import TOKEN_VARIABLE, Address, Connection, is_address
from teachers.remote.teacher import ServedTeacher, facts_of, vocabulary_of
from teachers.tokenizer.chat_template import with_variables
from teachers.tokenizer.gguf_metadata import with_template_variables

MOST_STEM = 60  # characters of a folder's name


def teacher_sources(config: TeacherConfig) -> list[Path | Address]:
    """Where every teacher is, the main one first; by default the example teacher.

    Raises:
        ServerError: an address that is none.
    """
    named = [config.path or str(example_teacher()), *config.mix_with]
    return [Address.parse(text) if is_address(text) else Path(text) for text in named]


def teacher_stem(config: TeacherConfig) -> str:
    """A short name for folders, of signs that no shell or terminal takes for anything else."""
    if config.path is None:
        return "example"
    if is_address(config.path):
        address = Address.parse(config.path)
        stem = f"{address.host}-{address.port}"
    else:
        path = Path(config.path)
        # A link's target may have a name that says nothing of the other parts.
        stem = model_stem(path)
        stem = path.resolve().stem if stem == path.stem else stem
    return re.sub(r"[^\w.-]+", "-", stem)[:MOST_STEM].strip("-") or "teacher"


def gguf_of(teacher: Teacher) -> Path | None:
    """The file of an open teacher, or of the first in a mixture that has one, from which the
    student takes tokenizer and embeddings: where its vocabulary was cut, that which has what is
    left."""
    return _first_file(teacher, (WorkerTeacher, ReducedTeacher, CompletionsTeacher))


def weights_of(teacher: Teacher) -> Path | None:
    """The same, of those whose weights are here."""
    return _first_file(teacher, (GGUFTeacher, ReducedTeacher))


def _first_file(teacher: Teacher, kinds: tuple[type[Any], ...]) -> Path | None:
    members = getattr(teacher, "teachers", (teacher,))
    files = [one.file for one in members if isinstance(one, kinds) and one.file is not None]
    return files[0].path if files else None


def tokenizer_of(config: TeacherConfig, path: Path) -> dict[str, Field]:
    """The tokenizer that the student takes, as GGUF metadata, from ``path``; the file may be
    damaged."""
    fields = tokenizer_fields(read_gguf(path, model=False))
    return with_template_variables(fields, config.template_variables)


def require_gguf(config: TeacherConfig) -> None:
    """Raise ``UserError`` unless one of the teachers has a GGUF tokenizer."""
    sources = teacher_sources(config)
    own = Path(config.tokenizer) if config.tokenizer else None
    tokenizers = [own if isinstance(source, Address) else source for source in sources]
    if all(path is not None and path.is_dir() for path in tokenizers):
        raise UserError(
            f"teacher {tokenizers[0]} is a folder: not a GGUF file, whose tokenizer the "
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
    for source in teacher_sources(config):
        if isinstance(source, Address):
            connection = _connection(source, config)
            facts = facts_of(connection)
            if facts is not None:
                vocabulary_of(connection, facts)
                continue
            served_model(connection)
            if (path := _own_tokenizer(source, config)).is_dir():
                check_tokenizer_folder(path)
            else:
                read_gguf(path, model=False)
        elif source.is_dir():
            check_folder(source)
        else:
            file = read_gguf(source)
            if source != example_teacher():
                require_loadable(file.path)


def _require_fitting(config: TeacherConfig) -> None:
    """Raise ``UserError`` unless the settings fit the kinds of teachers."""
    if config.weights and not config.mix_with:
        raise UserError(
            "teacher.weights is for several teachers; name the others in teacher.mix_with"
        )
    sources = teacher_sources(config)
    served = [isinstance(source, Address) for source in sources]
    # Each is of no use, and so perhaps a mistake, where there is no teacher of its kind.
    here = ("gpu_layers", "main_gpu", "tensor_split", "cache_type", "weights_as")
    here_too = ("batch_tokens", "sequences")
    where_it_is = "runs here; set it where its server is started"
    useless: dict[str, str] = dict.fromkeys((*here, *here_too), where_it_is)
    if not all(served):
        useless = {}
    if not any(served):
        behind = "is behind a server (http://HOST:PORT); leave it out"
        useless = dict.fromkeys(("token", "tokenizer"), behind)
    for name, where in useless.items():
        if getattr(config, name) != type(config).model_fields[name].default:
            raise UserError(f"teacher.{name} is for a teacher that {where}")
    for source in sources:
        folder = isinstance(source, Path) and source.is_dir()
        if config.load_in_4bit and not folder:
            raise UserError(
                f"teacher.load_in_4bit is for transformers folders; {source} is already as it is "
                "quantised"
            )
        for name in ("tensor_split", "cache_type", "weights_as"):
            if folder and getattr(config, name):
                raise UserError(
                    f"teacher.{name} is for GGUF files, which llama.cpp runs; {source} is a "
                    "folder, so leave it out"
                )


def open_teacher(config: TeacherConfig) -> Teacher:
    """Load the teacher, or all of them; close it after use.

    Raises:
        UserError, TeacherFileError, TeacherError, EnsembleError: it cannot be used.
    """
    _require_fitting(config)
    members: list[Teacher] = []
    try:
        for source in teacher_sources(config):
            members.append(_open_one(source, config))
            members[-1].info = _with_variables(members[-1].info, config.template_variables)
        if len(members) == 1:
            return members[0]
        from teachers.ensemble import EnsembleTeacher

        return EnsembleTeacher(members, config.weights or [1.0] * len(members))
    except BaseException:
        for member in members:
            member.close()
        raise


def _open_one(path: Path | Address, config: TeacherConfig) -> Teacher:
    if isinstance(path, Address):
        return _open_served(path, config)
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
    if config.weights_as is None:
        return GGUFTeacher(path, options)
    return _open_widened(path, config.weights_as, options)


def _open_widened(path: Path, kind: str, options: LoadOptions) -> GGUFTeacher:
    with ExitStack() as stack:
        copy = stack.enter_context(widened(read_gguf(path), kind))
        removal = stack.pop_all()
    try:
        teacher = GGUFTeacher(path, options, widened=Widened(copy, kind, removal.close))
    except BaseException:
        removal.close()
        raise
    try:
        teacher.worker.options()  # the first decode: numbers too large for the type show here
    except TeacherError as error:
        teacher.close()
        raise UserError(
            f"teacher.weights_as = {kind}: llama.cpp cannot compute with the copy of {path.name} "
            f"({error}); leave it out, or take bf16, which holds larger numbers"
        ) from None
    except BaseException:
        teacher.close()
        raise
    return teacher


def _connection(address: Address, config: TeacherConfig) -> Connection:
    return Connection(address, config.token or os.environ.get(TOKEN_VARIABLE))


def _own_tokenizer(address: Address, config: TeacherConfig) -> Path:
    if config.tokenizer is None:
        raise UserError(
            f"server {address} does not give its tokenizer; name with --tokenizer a GGUF file of "
            "its model or of its vocabulary alone (convert_hf_to_gguf.py --vocab-only), or to "
            "capture only, the folder with tokenizer.json and config.json"
        )
    return Path(config.tokenizer)


def _open_served(address: Address, config: TeacherConfig) -> Teacher:
    connection = _connection(address, config)
    if facts_of(connection) is not None:
        if config.tokenizer is not None:
            raise UserError(
                f"--tokenizer {config.tokenizer}: server {address} gives its own; leave it out"
            )
        return ServedTeacher(connection)
    path = _own_tokenizer(address, config)
    if path.is_dir():
        return CompletionsTeacher(connection, folder_tokenizer(path))
    from distill.capture.temporary_files.tokenizer_only import tokenizer_alone, tokenizer_entries

    file = read_gguf(path, model=False)
    tokens = file.value("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise UserError(f"--tokenizer {file.path} carries no tokenizer; give another file")
    name = str(file.value("general.name", "tokenizer"))
    kept = ExitStack()
    running = kept.enter_context(tokenizer_alone(tokenizer_entries(file), len(tokens), name))
    with ExitStack() as stack:
        stack.callback(kept.close)
        teacher = CompletionsTeacher(connection, gguf_tokenizer(file, running, kept.close))
        stack.pop_all()
    return teacher


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
