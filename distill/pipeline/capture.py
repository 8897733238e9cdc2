"""``distill capture``: fill a store and print what is in it."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from distill.capture.capture import (
    fill_store,
    keep_teacher_record,
    load_teacher,
    read_data,
    text_of,
)
from distill.capture.corpus import Corpus
from distill.capture.store_setup import StoreLocation, open_store, recipe_for
from distill.capture.teachers import gguf_of, teacher_stem
from distill.config.schema import RunConfig
from distill.heads.prompts import SafetyPrompt
from distill.heads.safety_data import labelled_prompts
from distill.pipeline.preflight import Inputs, check_capture
from distill.runs.folder import RUNS
from distill.runtime.format import human_bytes
from distill.runtime.launch_environment import process_rank
from distill.runtime.printable import markup
from distill.runtime.progress import Console
from distill.trimming.for_student import fitted
from teachers.atomic_files import exclusive
from teachers.base import Teacher
from teachers.store.store import SoftTargetStore
from teachers.store.teacher_record import TEACHER
from teachers.targets.recipe import Recipe


def capture_only(
    config: RunConfig, where: Path | None, console: Console, inputs: Inputs | None = None
) -> SoftTargetStore:
    """``distill capture``: fill a store, or this process's share of one, and print what is in it.

    ``inputs``: what ``check_capture`` has read, if it was called.

    Raises:
        UserError, StoreError, TeacherFileError, TeacherError, CaptureError: the input cannot be
        used. OSError: the disk refuses.
    """
    inputs = inputs or check_capture(config, where)
    share = process_rank()
    data, kept = inputs.take_data(), RUNS / "stores" if where is None else where.parent
    with (
        load_teacher(config, console) as whole,
        fitted(whole, config, data, kept, console) as teacher,
    ):
        corpus = read_data(config, teacher, console, data)
        del data
        recipe = recipe_for(config.targets, teacher, corpus, console)
        store = open_store(
            teacher, corpus, recipe, StoreLocation(where, RUNS, teacher_stem(config.teacher))
        )
        with exclusive(store.folder, share.rank):
            fill(store, teacher, corpus, config, inputs.prompts, console)
        if share.world == 1:
            _print_store(store, recipe, teacher, console)
    return store


def fill(
    store: SoftTargetStore,
    teacher: Teacher,
    corpus: Corpus,
    config: RunConfig,
    prompts: list[SafetyPrompt] | None,
    console: Console,
) -> bool:
    """Capture this process's share of what is missing, and in the first process what the store
    keeps of the teacher beside soft targets; returns whether no soft targets were missing."""
    share = process_rank()
    reused = fill_store(teacher, corpus, store, console, share)
    if share.rank == 0:
        text = text_of(config, teacher.info)
        keep_teacher_record(teacher, gguf_of(teacher), store, console, share, text)
        labelled_prompts(config, prompts, teacher, store, console)
    return reused


def _print_store(
    store: SoftTargetStore, recipe: Recipe, teacher: Teacher, console: Console
) -> None:
    """What a finished store holds, as a table."""
    each = recipe.bytes_per_position(teacher.info.vocab_size, teacher.info.width)
    table = Table(
        title=markup(f"Soft targets of {teacher.info.name}"),
        title_justify="left",
        show_header=False,
    )
    for name, value in (
        ("kind", recipe.kind),
        *([("truncated", teacher.truncation)] if teacher.truncation else []),
        ("sequences", f"{len(store):,}"),
        ("tokens", f"{int(store.lengths().sum()):,}"),
        ("positions trained on", f"{store.positions():,}"),
        ("bytes per position", f"{each}"),
        ("every logit would take", f"{4 * teacher.info.vocab_size:,} bytes per position"),
        ("on disk", human_bytes(store.bytes_on_disk())),
        ("of that, the teacher's own", human_bytes((store.folder / TEACHER).stat().st_size)),
        ("folder", str(store.folder)),
    ):
        table.add_row(name, markup(value))
    console.rich.print(table)
