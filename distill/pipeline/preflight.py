"""What each command can refuse before PyTorch is imported, which takes seconds.

A command calls its check as soon as it has its settings, and hands on what was read. Whoever calls
what is behind a command without that gets the same check there. ``progress``: of the data, the
share that is read. Nothing here may import PyTorch, or
what does (``tests/distill/pipeline/test_preflight.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distill.base_models.source import base_source
from distill.capture.data_rows import DataRows, read_rows
from distill.capture.sequences.known import StoreLocation, find_sequences
from distill.capture.teachers import (
    require_gguf,
    require_teachers,
    teacher_sources,
    teacher_stem,
)
from distill.config.schema import RunConfig
from distill.errors import UserError
from distill.heads.prompts import SafetyPrompt, read_safety_prompts
from distill.runs.decisions import Decisions, decided_before
from distill.runs.folder import RUNS, RunFolder, RunPaths
from distill.runtime.launch_environment import process_rank, require_trainable
from distill.trimming.request import check_student_vocabulary
from teachers.base import Progress, no_progress
from teachers.gguf.file import read_gguf
from teachers.store.manifest import filled_manifest, require_store_folder


@dataclass
class Inputs:
    """What was read for a run.

    ``prompts``: of the safety head, if there is to be one. ``data``: until somebody takes it;
    ``None`` where the teacher generates it, or a store has its tokens. ``decided``: the settings of
    this very run and what they were decided by, where an earlier process has.
    """

    prompts: list[SafetyPrompt] | None = None
    data: DataRows | None = None
    decided: tuple[RunConfig, Decisions] | None = None

    def take_data(self) -> DataRows | None:
        """The data, which may be large and is not kept here any longer."""
        taken, self.data = self.data, None
        return taken


def check_run(
    config: RunConfig,
    places: RunPaths,
    progress: Progress = no_progress,
    budget: float | None = None,
) -> Inputs:
    """Refuse what ``distill run`` cannot do, in ``budget`` seconds if that is given.

    Raises:
        UserError, StoreError, TeacherFileError: the input cannot be used.
    """
    world = process_rank().world
    _require_no_store(config)
    require_gguf(config.teacher)
    require_teachers(config.teacher)
    check_student_vocabulary(config)
    require_trainable(config.train, world)
    _check_student(config)
    if places.out is not None:
        RunFolder(places.out).require_usable()
    if places.store is not None:
        require_store_folder(places.store)
    if budget is not None:
        _check_budget(config)
        if world > 1:
            raise UserError("--budget is for one process; give --samples and --epochs to several")
    decided = decided_before(config, budget, places, teacher_stem(config.teacher))
    if decided is not None:
        config = decided[0]
    beside = RUNS if places.out is None else places.out.parent
    rows = _rows(config, places.store, beside, progress)
    return Inputs(read_safety_prompts(config), rows, decided)


def check_capture(
    config: RunConfig,
    store: Path | None,
    progress: Progress = no_progress,
    *,
    data: bool = True,
) -> Inputs:
    """Refuse what ``distill capture`` cannot do; ``data``: also what is wrong with the data.

    Raises:
        UserError, StoreError, TeacherFileError: the input cannot be used.
    """
    process_rank()
    _require_no_store(config)
    require_teachers(config.teacher)
    check_student_vocabulary(config)
    if store is not None:
        require_store_folder(store)
    prompts = read_safety_prompts(config)
    return Inputs(prompts, _rows(config, store, RUNS, progress) if data else None)


def _rows(
    config: RunConfig, store: Path | None, beside: Path, progress: Progress
) -> DataRows | None:
    """The data, unless a store has its tokens."""
    place = StoreLocation(store, beside, teacher_stem(config.teacher))
    if find_sequences(place, config) is not None:
        return None
    return read_rows(config.data, progress)


def check_train(config: RunConfig, out: Path | None) -> Inputs:
    """Refuse what ``distill train`` cannot do; the data is in the store.

    Raises:
        UserError, StoreError, TeacherFileError: the input cannot be used.
    """
    assert config.store is not None
    world = process_rank().world
    if config.train.on_policy:
        raise UserError(
            f"train.on_policy = {config.train.on_policy:g} needs the teacher, which `distill "
            "train` does without; use `distill run --teacher`"
        )
    require_trainable(config.train, world)
    filled_manifest(Path(config.store))
    if config.teacher.path is not None:
        read_gguf(Path(config.teacher.path))
    _check_student(config)
    if out is not None:
        RunFolder(out).require_usable()
    return Inputs(read_safety_prompts(config))


def check_plan(
    config: RunConfig, progress: Progress = no_progress, budget: float | None = None
) -> Inputs:
    """Refuse what ``distill plan`` cannot do; it reads prompts only for a ``budget``.

    Raises:
        UserError, TeacherFileError: the input cannot be used.
    """
    _require_no_store(config)
    if config.student.base is not None:
        require_gguf(config.teacher)
    require_teachers(config.teacher)
    check_student_vocabulary(config)
    _check_student(config)
    prompts = None
    if budget is not None:
        _check_budget(config)
        require_gguf(config.teacher)
        prompts = read_safety_prompts(config)
    return Inputs(prompts, read_rows(config.data, progress))


def _check_budget(config: RunConfig) -> None:
    """Refuse settings of what ``--budget`` decides."""
    given = sorted({"epochs", "steps"} & config.train.model_fields_set)
    given += ["samples"] if config.data.samples is not None else []
    if given:
        raise UserError(
            f"--budget decides samples, epochs and steps; leave it out, or {' and '.join(given)}"
        )


def check_serve(config: RunConfig) -> None:
    """Refuse what ``distill serve`` cannot do.

    Raises:
        UserError, TeacherFileError, TeacherError: the teacher is no single GGUF file, or unusable.
    """
    first, *others = teacher_sources(config.teacher)
    if others or not isinstance(first, Path) or first.is_dir():
        raise UserError("distill serve takes one GGUF file; serve several, each by its own server")
    require_teachers(config.teacher)


def _require_no_store(config: RunConfig) -> None:
    if config.store is not None:
        raise UserError(
            f"store = {config.store!r} in the configuration: only `distill train` learns from a "
            "store; use that, or take it out to ask the teacher"
        )


def _check_student(config: RunConfig) -> None:
    if config.student.base is not None:
        base_source(Path(config.student.base), config.student.load_in_4bit)
