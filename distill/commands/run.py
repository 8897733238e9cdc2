"""``run``, ``capture``, ``status``, ``train`` and ``plan``: from a teacher to a student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from distill.commands.options import (
    AsJson,
    BudgetTime,
    ConfigFile,
    Data,
    Engine,
    Epochs,
    Executor,
    Init,
    LoadIn4bit,
    LoraRank,
    Memory,
    Out,
    Preset,
    SafetyLabels,
    Samples,
    Seed,
    Settings,
    Store,
    StorePath,
    StoreTeacher,
    StudentBase,
    StudentQuant,
    StudentSize,
    Targets,
    Teacher,
    Tokenizer,
    Vocab,
    WorkedStore,
    Workers,
)

if TYPE_CHECKING:
    from distill.runtime.progress import Console
    from teachers.base import Progress


commands = typer.Typer()


@commands.command()
def run(
    teacher: Teacher = None,
    tokenizer: Tokenizer = None,
    student_size: StudentSize = None,
    vocab: Vocab = None,
    student_base: StudentBase = None,
    lora_r: LoraRank = None,
    load_in_4bit: LoadIn4bit = False,
    data: Data = None,
    out: Out = None,
    samples: Samples = None,
    epochs: Epochs = None,
    budget: BudgetTime = None,
    seed: Seed = None,
    targets: Targets = None,
    quant: StudentQuant = None,
    safety_labels: SafetyLabels = None,
    store: Store = None,
    init: Init = None,
    preset: Preset = "recommended",
    config: ConfigFile = None,
    set_: Settings = None,
) -> None:
    """Teacher in, proved student out: capture, train, export, prove, evaluate."""
    from distill.config.loading import load_config
    from distill.pipeline.preflight import check_run
    from distill.runs.folder import RunPaths

    overrides = _capture_settings(teacher, vocab, data, samples, targets, seed)
    overrides["teacher.tokenizer"] = tokenizer
    overrides |= _base_settings(student_base, lora_r, load_in_4bit, config)
    overrides |= _student_settings(student_size, init, epochs, quant, safety_labels)
    settings, places = load_config(config, overrides, set_ or [], preset), RunPaths(out, store)
    seconds = _seconds(budget)
    with _checking() as (console, progress):
        inputs = check_run(settings, places, progress, seconds)

    from distill.pipeline.run import run as run_pipeline

    run_pipeline(settings, places, console, inputs, seconds)


@commands.command()
def capture(
    teacher: Teacher = None,
    tokenizer: Tokenizer = None,
    vocab: Vocab = None,
    data: Data = None,
    samples: Samples = None,
    targets: Targets = None,
    store: Store = None,
    seed: Seed = None,
    safety_labels: SafetyLabels = None,
    executor: Executor = None,
    workers: Workers = None,
    engine: Engine = None,
    config: ConfigFile = None,
    set_: Settings = None,
) -> None:
    """Only the teacher's part: fill a store of soft targets, or continue one.

    Started any number of times on the same --store, on one machine or many, also by torchrun or a
    job array, the processes share the work.
    """
    from distill.config.loading import load_config
    from distill.errors import UserError
    from distill.pipeline.preflight import check_capture

    overrides = _capture_settings(teacher, vocab, data, samples, targets, seed)
    overrides["teacher.tokenizer"] = tokenizer
    overrides["safety.labels"] = safety_labels
    settings = load_config(config, overrides, set_ or [])
    if executor is None and (workers is not None or engine):
        raise UserError("--workers and --engine are for --executor local, slurm or ray")
    if executor is not None:
        from distill.pipeline.executors import capture_with, require_executor

        count = 1 if workers is None else workers
        require_executor(executor, store, count)
        assert store is not None
        with _checking() as (console, _):
            check_capture(settings, store, data=False)
        capture_with(executor, count, engine or [], settings, store, console)
        return
    with _checking(every_process=True) as (console, progress):
        inputs = check_capture(settings, store, progress)

    from distill.pipeline.capture import capture_only

    capture_only(settings, store, console, inputs)


@commands.command()
def status(store: WorkedStore, as_json: AsJson = False) -> None:
    """How far the capture of a store is: shards, speed, time left, who works, what failed."""
    from dataclasses import asdict

    from distill.pipeline.status import print_status, status_of
    from distill.runtime.printable import json_line
    from distill.runtime.progress import Console

    found = status_of(store)
    if as_json:
        print(json_line(asdict(found)))
        return
    print_status(found, store, Console())


@commands.command()
def train(
    store: StorePath,
    student_size: StudentSize = None,
    vocab: Vocab = None,
    student_base: StudentBase = None,
    lora_r: LoraRank = None,
    load_in_4bit: LoadIn4bit = False,
    teacher: StoreTeacher = None,
    out: Out = None,
    epochs: Epochs = None,
    seed: Seed = None,
    quant: StudentQuant = None,
    safety_labels: SafetyLabels = None,
    init: Init = None,
    preset: Preset = "recommended",
    config: ConfigFile = None,
    set_: Settings = None,
) -> None:
    """Only the student's part: from a store to a proved student, with no teacher on this
    machine."""
    from distill.config.loading import load_config
    from distill.pipeline.preflight import check_train

    overrides = _capture_settings(teacher, vocab, None, None, None, seed) | {"store": str(store)}
    overrides |= _base_settings(student_base, lora_r, load_in_4bit, config)
    overrides |= _student_settings(student_size, init, epochs, quant, safety_labels)
    settings = load_config(config, overrides, set_ or [], preset)
    with _checking() as (console, _):
        inputs = check_train(settings, out)

    from distill.pipeline.run import train_from_store

    train_from_store(settings, out, console, inputs)


@commands.command()
def plan(
    teacher: Teacher = None,
    tokenizer: Tokenizer = None,
    student_size: StudentSize = None,
    vocab: Vocab = None,
    student_base: StudentBase = None,
    lora_r: LoraRank = None,
    load_in_4bit: LoadIn4bit = False,
    data: Data = None,
    samples: Samples = None,
    epochs: Epochs = None,
    budget: BudgetTime = None,
    targets: Targets = None,
    seed: Seed = None,
    init: Init = None,
    memory: Memory = None,
    preset: Preset = "recommended",
    config: ConfigFile = None,
    set_: Settings = None,
) -> None:
    """Measure on a short probe what a run will take: tokens, disk, time and memory."""
    from distill.config.loading import load_config
    from distill.config.units import parse_memory
    from distill.errors import UserError
    from distill.pipeline.preflight import check_plan

    overrides = _capture_settings(teacher, vocab, data, samples, targets, seed)
    overrides["teacher.tokenizer"] = tokenizer
    overrides |= _base_settings(student_base, lora_r, load_in_4bit, config)
    overrides |= _student_settings(student_size, init, epochs)
    try:
        limit = None if memory is None else parse_memory(memory)
    except ValueError as error:
        raise UserError(f"--memory {error}") from None
    seconds = _seconds(budget)
    settings = load_config(config, overrides, set_ or [], preset)
    with _checking() as (console, progress):
        inputs = check_plan(settings, progress, seconds)

    from distill.pipeline.plan import plan_run

    plan_run(settings, console, limit, inputs, seconds)


def _seconds(budget: str | None) -> float | None:
    """The value of ``--budget``."""
    from distill.config.units import parse_duration
    from distill.errors import UserError

    try:
        return None if budget is None else parse_duration(budget)
    except ValueError as error:
        raise UserError(f"--budget {error}") from None


@contextmanager
def _checking(*, every_process: bool = False) -> Iterator[tuple[Console, Progress]]:
    """Where a command prints, and what is told how much of its input is read while that is checked;
    warnings of the machine follow. In a launch of several processes only the first one prints,
    unless ``every_process`` does."""
    import psutil

    from distill.runtime.launch_environment import process_rank
    from distill.runtime.machine_checks import warn_of_machine
    from distill.runtime.progress import Console

    quiet = process_rank().rank > 0 and not every_process
    console = Console(quiet=quiet, began=psutil.Process().create_time())
    with console.stage_if_slow("Read files") as progress:
        yield console, progress
    warn_of_machine(console)


def _base_settings(
    folder: Path | None, rank: int | None, load_in_4bit: bool, config: Path | None
) -> dict[str, object]:
    """The flags of a student made of a base, as settings; without a file of settings it must be
    named here."""
    if folder is None and config is None and (rank is not None or load_in_4bit):
        from distill.errors import UserError

        raise UserError(
            "--lora-r and --load-in-4bit are for a student made of a base; name one with "
            "--student-base"
        )
    return {
        "student.base": str(folder) if folder else None,
        "student.lora_rank": rank,
        "student.load_in_4bit": load_in_4bit or None,
    }


def _capture_settings(
    teacher: str | Path | None,
    vocab: str | None,
    data: Path | None,
    samples: int | None,
    targets: str | None,
    seed: int | None,
) -> dict[str, object]:
    """The flags that decide the soft targets, as settings."""
    return {
        "teacher.path": str(teacher) if teacher else None,
        "student.vocab": vocab,
        "data.path": str(data) if data else None,
        "data.samples": samples,
        "targets.kind": targets,
        "seed": seed,
    }


def _student_settings(
    size: str | None,
    init: str | None,
    epochs: int | None,
    quant: str | None = None,
    safety_labels: str | None = None,
) -> dict[str, object]:
    """The flags of the student, its training and its export, as settings."""
    return {
        "student.size": size,
        "student.init": init,
        "train.epochs": epochs,
        "export.quant": quant,
        "safety.labels": safety_labels,
    }
