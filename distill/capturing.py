"""From a teacher and a corpus to a store full of soft targets: what ``run`` and ``capture`` share."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from distill.config import RunConfig, TargetsConfig
from distill.console import Console, human_bytes, human_count
from distill.corpus import Corpus, Entry, build_corpus
from distill.errors import UserError
from distill.launched import launched_share
from distill.preflight import Inputs, check_capture
from distill.run_folder import RUNS
from distill.safety_data import labelled_prompts
from distill.teacher_source import find_gguf, open_teacher, teacher_stem
from teachers.base import Teacher, TeacherInfo
from teachers.capture import CaptureError, capture, require_linear_output
from teachers.embeddings import stored_columns
from teachers.ensemble import EnsembleError
from teachers.errors import RequestRefused
from teachers.files import exclusive
from teachers.gguf_file import read_gguf
from teachers.inheritance import TEACHER, Inheritance, find_inheritance, inherit, write_inheritance
from teachers.manifest import MANIFEST, Manifest
from teachers.recipe import Recipe, default_sketch_bytes
from teachers.share import WHOLE, Share
from teachers.sketch import FIT_RULES
from teachers.store import SoftTargetStore

SEQUENCES_PER_SHARD = 256
SHARD_BYTES = 256 << 20
PROBE_TOKENS = 24


def recipe_for(config: TargetsConfig, teacher: Teacher, console: Console) -> Recipe:
    """What to keep of each position; how large the sketch is depends on the teacher.

    Raises:
        UserError: a layer that the teacher does not have.
    """
    info = teacher.info
    for layer in config.layers:
        if layer >= info.layers:
            raise UserError(f"targets.layers = {layer}: {info.name} has layers 0 to {info.layers - 1}")
    sketch = config.sketch_bytes
    if config.kind == "compact" and sketch is None:
        sketch = default_sketch_bytes(config.num_topk, info.vocab_size, info.width)
        if sketch and (reason := _no_sketch(teacher)):
            console.warn(f"no sketch of the tail: {reason}")
            sketch = 0
    return Recipe(
        config.kind,
        config.num_topk,
        min(sketch or 0, info.width),
        tuple(sorted(set(config.layers))),
        config.layer_bytes,
    )


def _no_sketch(teacher: Teacher) -> str | None:
    """Why hidden states cannot stand for this teacher's logits, or nothing if they can."""
    tokens = (np.arange(1, PROBE_TOKENS + 1) % teacher.info.vocab_size).astype(np.int32)
    try:
        require_linear_output(teacher, tokens)
    except (CaptureError, RequestRefused, EnsembleError) as error:  # a dead worker is no answer to this
        return str(error)
    return None


def store_manifest(teacher: Teacher, corpus: Corpus, recipe: Recipe) -> Manifest:
    """What the store of these very soft targets says it is."""
    info = teacher.info
    identity: dict[str, Any] = {
        "teacher_sha256": info.sha256,
        "tokenizer_sha256": info.tokenizer_sha256,
        "vocab_size": info.vocab_size,
        "corpus_sha256": corpus.digest(),
        "recipe": recipe.to_json(),
        # The last bits of a logit, and so what a teacher says, depend on these.
        "runtime": teacher.runtime,
    }
    if recipe.needs_states or recipe.layers:
        # What a shard's codes mean depends on how directions were fitted to the store's own beginning.
        identity["fit"] = FIT_RULES
    # A shard is held in memory until it is written; dense targets of a large vocabulary need small ones.
    sequence_bytes = corpus.sampling.max_length * recipe.bytes_per_position(info.vocab_size, info.width)
    together = max(1, min(SEQUENCES_PER_SHARD, SHARD_BYTES // sequence_bytes))
    return Manifest(identity, len(corpus), together)


@dataclass(frozen=True)
class StorePlace:
    """Where a store goes: ``asked`` for by the user, or named after ``stem`` in ``beside``/stores."""

    asked: Path | None
    beside: Path
    stem: str


def open_store(teacher: Teacher, corpus: Corpus, recipe: Recipe, place: StorePlace) -> SoftTargetStore:
    """Open the store these very soft targets belong in.

    It lies beside the run's folder unless told otherwise; one that an earlier run in this working directory
    has made is used where it is.

    Raises:
        StoreError: the folder asked for holds something else.
        UserError: the disk has not enough room.
    """
    manifest = store_manifest(teacher, corpus, recipe)
    name = f"{place.stem}-{manifest.key[:12]}"
    usual = [root / "stores" / name for root in (place.beside, RUNS, Path())]
    folder = place.asked or next((root for root in usual if (root / MANIFEST).exists()), usual[0])
    info = teacher.info
    embeddings = 2 * info.vocab_size * stored_columns(info.width)
    _require_space(folder, largest_size(corpus, recipe, teacher) + embeddings)
    return SoftTargetStore.create_or_open(folder, manifest)


def load_teacher(config: RunConfig, console: Console) -> Teacher:
    """Load the teacher and say what it is.

    Raises:
        UserError, TeacherFileError, TeacherError, EnsembleError: it cannot be used.
    """
    with console.stage("Load teacher") as stage:
        teacher = open_teacher(config.teacher)
        info = teacher.info
        stage.finish(f"{info.name}: {info.architecture}, {human_count(info.parameters)} parameters")
    return teacher


def read_data(
    config: RunConfig, teacher: Teacher, console: Console, entries: list[Entry] | None = None
) -> Corpus:
    """Read the data, unless these ``entries`` are it, and say what is in it.

    Raises:
        UserError: it cannot be used.
    """
    with console.stage("Read data") as stage:
        corpus = build_corpus(config.data, teacher, config.seed, entries)
        spoken = f", the teacher writes in {corpus.spoken}" if corpus.spoken else ""
        stage.finish(f"{len(corpus)} sequences{spoken}")
    for note in corpus.notes:
        console.note(note)
    return corpus


def largest_size(corpus: Corpus, recipe: Recipe, teacher: Teacher) -> int:
    """Bytes that the soft targets take at most: every sequence as long as it may be."""
    positions = sum(
        corpus.sampling.max_length if item.speaks else len(item.segments[0]) for item in corpus.items
    )
    return positions * (recipe.bytes_per_position(teacher.info.vocab_size, teacher.info.width) + 4)


def _require_space(folder: Path, needed: int) -> None:
    """Refuse soft targets that cannot fit, before any of them is made."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    kept = [*folder.glob("shard-*"), *folder.glob(TEACHER)] if folder.is_dir() else []
    there = sum(path.stat().st_size for path in kept)
    free = shutil.disk_usage(existing).free + there
    if needed > free:
        raise UserError(
            f"the soft targets need up to {human_bytes(needed)}, {existing} has {human_bytes(free)} free; free some "
            "space, choose --store on another disk, or lower --samples or targets.num_topk"
        )


def fill_store(
    teacher: Teacher, corpus: Corpus, store: SoftTargetStore, console: Console, share: Share = WHOLE
) -> bool:
    """Capture what is missing; returns whether everything was there already."""
    with console.stage("Capture", total=_sequences(store, share)) as stage:
        summary = capture(teacher, corpus, store, stage.update, share)
        size = f"{human_bytes(store.bytes_on_disk())} in {store.folder}"
        if share.world == 1:
            size = f"{human_count(int(store.lengths().sum()))} tokens, {size}"
        if summary.written == 0:
            stage.finish(f"skipped: soft targets of this teacher and data reused, {size}")
        elif summary.reused:
            stage.finish(f"{summary.written} shards captured, {summary.reused} reused, {size}")
        else:
            stage.finish(size)
    for shard in summary.damaged:
        console.warn(f"{store.shard_path(shard)} was damaged and has been captured again")
    return summary.written == 0


def keep_inheritance(
    teacher: Teacher,
    gguf: Path | None,
    store: SoftTargetStore,
    console: Console,
    share: Share = WHOLE,
    text: str = "",
) -> Inheritance:
    """What the store keeps of its teacher beside soft targets; made now where it is missing or damaged.

    ``gguf``: whose tokenizer and embeddings. The lines come from this process's own shards. ``text``: what the
    sequences are, in words.
    """
    found = find_inheritance(store)
    # An older version did not keep the teacher's shape, which the student's follows.
    if found is not None and (found.tokenizer or gguf is None) and found.info.shape == teacher.info.shape:
        return found
    if found is None and (store.folder / TEACHER).exists():
        console.warn(f"{store.folder / TEACHER} was damaged and is made again")
    with console.stage("Keep teacher") as stage:
        spans = (range(*store.span(shard)) for shard in range(share.rank, store.manifest.shards, share.world))
        sequences = (store.tokens(index) for span in spans for index in span)
        made = inherit(teacher, read_gguf(gguf) if gguf else None, sequences, text)
        write_inheritance(store, made)
        size = human_bytes((store.folder / TEACHER).stat().st_size)
        stage.finish(f"tokenizer and embeddings, {size}" if gguf else "no GGUF file, so no tokenizer is kept")
    return made


def text_of(config: RunConfig, info: TeacherInfo) -> str:
    """What the sequences of a store are, in words: a file's name without its folders, which may be private."""
    return (
        f"text written by {info.name}" if config.data.path is None else Path(config.data.path).resolve().name
    )


def _sequences(store: SoftTargetStore, share: Share) -> int:
    """How many sequences this process's shards hold."""
    spans = [store.span(shard) for shard in range(share.rank, store.manifest.shards, share.world)]
    return sum(stop - start for start, stop in spans)


def capture_only(
    config: RunConfig, where: Path | None, console: Console, inputs: Inputs | None = None
) -> SoftTargetStore:
    """``distill capture``: fill a store, or this process's share of one, and say what is in it.

    ``inputs``: what ``check_capture`` has read, if it was called.

    Raises:
        UserError, StoreError, TeacherFileError, TeacherError, CaptureError: the input cannot be used.
        OSError: the disk refuses.
    """
    inputs = inputs or check_capture(config, where)
    share, prompts = launched_share(), inputs.prompts
    with load_teacher(config, console) as teacher:
        corpus = read_data(config, teacher, console, inputs.take_entries())
        recipe = recipe_for(config.targets, teacher, console)
        store = open_store(teacher, corpus, recipe, StorePlace(where, RUNS, teacher_stem(config.teacher)))
        with exclusive(store.folder, share.rank):
            fill_store(teacher, corpus, store, console, share)
            if share.rank == 0:
                text = text_of(config, teacher.info)
                keep_inheritance(teacher, find_gguf(config.teacher), store, console, share, text)
                labelled_prompts(config, prompts, teacher, store, console)
        if share.world == 1:
            _print_store(store, recipe, teacher, console)
    return store


def _print_store(store: SoftTargetStore, recipe: Recipe, teacher: Teacher, console: Console) -> None:
    """What a finished store holds, as a table."""
    lengths = store.lengths()
    positions = int(lengths.sum()) - len(lengths)
    each = recipe.bytes_per_position(teacher.info.vocab_size, teacher.info.width)
    table = Table(title=f"Soft targets of {teacher.info.name}", title_justify="left", show_header=False)
    for name, value in (
        ("kind", recipe.kind),
        ("sequences", f"{len(lengths):,}"),
        ("positions", f"{positions:,}"),
        ("bytes per position", f"{each}"),
        ("every logit would take", f"{4 * teacher.info.vocab_size:,} bytes per position"),
        ("on disk", human_bytes(store.bytes_on_disk())),
        ("of that, the teacher's own", human_bytes((store.folder / TEACHER).stat().st_size)),
        ("folder", str(store.folder)),
    ):
        table.add_row(name, value)
    console.rich.print(table)
