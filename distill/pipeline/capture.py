"""``distill capture``: fill a store and print what is in it."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from distill.capture.capture import (
    data_on_disk,
    fill_store,
    keep_teacher_record,
    load_teacher,
    store_tasks,
    text_of,
)
from distill.capture.corpus import Corpus
from distill.capture.sequences.known import StoreLocation, known_vocabulary
from distill.capture.store_setup import open_store, recipe_for
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
from teachers.base import Teacher
from teachers.store.shard_records import totals
from teachers.store.store import SoftTargetStore
from teachers.store.teacher_record import TEACHER
from teachers.targets.recipe import Recipe


def capture_only(
    config: RunConfig, where: Path | None, console: Console, inputs: Inputs | None = None
) -> SoftTargetStore:
    """``distill capture``: fill a store, together with all other processes that were started to,
    and print what is in it.

    ``inputs``: what ``check_capture`` has read, if it was called.

    Raises:
        UserError, StoreError, TeacherFileError, TeacherError, CaptureError: the input cannot be
        used. OSError: the disk refuses.
    """
    inputs = inputs or check_capture(config, where)
    data, kept = inputs.take_data(), RUNS / "stores" if where is None else where.parent
    place = StoreLocation(where, RUNS, teacher_stem(config.teacher))
    known = known_vocabulary(place, config)
    with (
        load_teacher(config, console) as whole,
        fitted(whole, config, data, kept, console, known) as teacher,
        data_on_disk(config, teacher, place, console, data) as corpus,
    ):
        del data
        recipe = recipe_for(config.targets, teacher, corpus, console)
        store = open_store(teacher, corpus, recipe, place)
        fill(store, teacher, corpus, config, inputs.prompts, console)
        if process_rank().rank == 0:
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
    """Capture what is missing, and what the store keeps of the teacher beside soft targets,
    together with all other processes that do so; returns whether no soft targets were missing."""
    reused = fill_store(teacher, corpus, store, console)
    text = text_of(config, teacher.info)
    keep_teacher_record(teacher, gguf_of(teacher), store, console, text)
    labelled_prompts(config, prompts, teacher, store, console)
    return reused


def _print_store(
    store: SoftTargetStore, recipe: Recipe, teacher: Teacher, console: Console
) -> None:
    """What a finished store holds, as a table."""
    each = recipe.bytes_per_position(teacher.info.vocab_size, teacher.info.width)
    codec = store.shared_codec()
    sketch = None if codec is None else codec.sketch
    shape = []
    if sketch is not None:
        each -= recipe.sketch_bytes - int(sketch["bytes"])
        shape = [("of that, the tail's shape", f"{sketch['bytes']}, to a KL of {sketch['kl']:.2g}")]
    whole = totals(store_tasks(store).records(), store.manifest)
    table = Table(
        title=markup(f"Soft targets of {teacher.info.name}"),
        title_justify="left",
        show_header=False,
    )
    for name, value in (
        ("kind", recipe.kind),
        *([("truncated", teacher.truncation)] if teacher.truncation else []),
        ("sequences", f"{len(store):,}"),
        ("tokens", f"{whole['tokens']:,}"),
        ("positions trained on", f"{whole['positions']:,}"),
        ("bytes per position", f"{each}"),
        *shape,
        ("every logit would take", f"{4 * teacher.info.vocab_size:,} bytes per position"),
        ("on disk", human_bytes(store.bytes_on_disk())),
        ("of that, the teacher's own", human_bytes((store.folder / TEACHER).stat().st_size)),
        ("folder", str(store.folder)),
    ):
        table.add_row(name, markup(value))
    console.rich.print(table)
