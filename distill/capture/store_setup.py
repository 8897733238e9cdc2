"""Which store soft targets belong in: recipe, manifest, folder, room on the disk."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.capture.corpus import Corpus
from distill.capture.sequences.known import StoreLocation
from distill.config.schema import TargetsConfig
from distill.errors import UserError
from distill.runtime.format import human_bytes
from distill.runtime.progress import Console
from teachers.atomic_files import StoreError
from teachers.base import Teacher, Tokens
from teachers.ensemble import EnsembleError
from teachers.errors import RequestRefused
from teachers.gguf.embeddings import stored_columns
from teachers.reduced import cut_of
from teachers.store.capture import (
    CaptureError,
    SequenceSource,
    logit_rule,
    probe_text,
    require_causal,
)
from teachers.store.manifest import MANIFEST, SEQUENCES, Manifest, read_manifest
from teachers.store.sequences import SequenceFiles
from teachers.store.store import SoftTargetStore
from teachers.store.teacher_record import TEACHER
from teachers.targets.fit_codec import FIT_RULES
from teachers.targets.recipe import Recipe, compact_recipe

SEQUENCES_PER_SHARD = 256
SHARD_BYTES = 256 << 20


def recipe_for(
    config: TargetsConfig, teacher: Teacher, source: SequenceSource, console: Console
) -> Recipe:
    """What to store of each position of ``source``, on whose beginning the teacher is tried.

    Raises:
        UserError: a layer that the teacher lacks.
        CaptureError: the teacher is no causal language model.
    """
    info = teacher.info
    for layer in config.layers:
        if layer >= info.layers:
            raise UserError(
                f"targets.layers = {layer}: {info.name} has layers 0 to {info.layers - 1}"
            )
    if teacher.truncation:
        console.warn(f"soft targets are truncated: {teacher.truncation}")
    text = probe_text(teacher, source)
    require_causal(teacher, text)
    recipe = Recipe(config.kind, config.num_topk, min(config.sketch_bytes or 0, info.width))
    if config.kind == "compact" and config.sketch_bytes is None:
        recipe = compact_recipe(config.num_topk, info.vocab_size, info.width)
        if recipe.has_sketch and (teacher.truncation or not _has_sketch(teacher, text)):
            console.note(f"no sketch of the tail: {info.name} ({info.architecture}) has none")
            recipe = replace(recipe, sketch_bytes=0, sketch_kl=0.0)
    layers = tuple(sorted(set(config.layers)))
    return replace(recipe, layers=layers, layer_bytes=config.layer_bytes)


def _has_sketch(teacher: Teacher, text: Tokens) -> bool:
    """Whether hidden states can stand for this teacher's logits."""
    try:
        logit_rule(teacher, text)
    except (CaptureError, RequestRefused, EnsembleError):  # not of a dead worker
        return False
    return True


def store_manifest(teacher: Teacher, corpus: Corpus, recipe: Recipe) -> Manifest:
    """What the store of these very soft targets says it is."""
    info = teacher.info
    identity: dict[str, Any] = {
        "teacher_sha256": info.sha256,
        "tokenizer_sha256": info.tokenizer_sha256,
        "vocab_size": info.vocab_size,
        "corpus_sha256": corpus.digest(),
        "recipe": recipe.to_json(),
        "runtime": teacher.runtime,
    }
    if (cut := cut_of(teacher)) is not None:
        identity["vocabulary_sha256"] = cut.key
    if teacher.truncation:
        identity["truncation"] = teacher.truncation
    if corpus.masked:
        identity["train_on"] = "assistant"
    if recipe.needs_states or recipe.layers:
        # What a shard's codes mean depends on how directions were fitted to the store's own
        # beginning.
        identity["fit"] = FIT_RULES
    # A shard is held in memory until it is written; dense targets of a large vocabulary need small
    # ones.
    sequence_bytes = corpus.sampling.max_length * recipe.bytes_per_position(
        info.vocab_size, info.width
    )
    together = max(1, min(SEQUENCES_PER_SHARD, SHARD_BYTES // sequence_bytes))
    return Manifest(identity, len(corpus), together)


def open_store(
    teacher: Teacher, corpus: Corpus, recipe: Recipe, place: StoreLocation
) -> SoftTargetStore:
    """Open the store of these soft targets.

    It is beside the run's folder unless asked for elsewhere; one that an earlier run in this
    working directory made is used where it is.

    Raises:
        StoreError: the folder asked for holds something else.
        UserError: the disk has not enough room.
    """
    manifest = store_manifest(teacher, corpus, recipe)
    folder = place.asked or _usual_folder(place, manifest)
    info = teacher.info
    embeddings = 2 * info.vocab_size * stored_columns(info.width)
    _require_space(folder, largest_size(corpus, recipe, teacher) + embeddings)
    store = SoftTargetStore.create_or_open(folder, manifest)
    if isinstance(corpus.items, SequenceFiles):
        corpus.items.keep_in(folder / SEQUENCES)
    return store


def _usual_folder(place: StoreLocation, manifest: Manifest) -> Path:
    """Where this store is, or is to be, if no place is asked for."""
    usual = [root / f"{place.stem}-{manifest.key[:12]}" for root in place.roots]
    if found := next((folder for folder in usual if (folder / MANIFEST).exists()), None):
        return found
    for folder in place.candidates():  # of an earlier version, whose keys were others
        if (folder / MANIFEST).exists():
            try:
                if read_manifest(folder).holds(manifest):
                    return folder
            except StoreError:  # another store's trouble
                continue
    return usual[0]


def largest_size(corpus: Corpus, recipe: Recipe, teacher: Teacher) -> int:
    """Bytes that the soft targets take at most: every sequence as long as it may be."""
    longest, tally = corpus.sampling.max_length, corpus.tally
    each = recipe.bytes_per_position(teacher.info.vocab_size, teacher.info.width)
    tokens = tally.tokens + longest * tally.spoken
    return 4 * tokens + (tokens - tally.unlearnt) * each


def _require_space(folder: Path, needed: int) -> None:
    """Refuse soft targets that cannot fit, before any of them is made."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    kept = [*folder.glob("shard-*"), *folder.glob(TEACHER)] if folder.is_dir() else []
    there = sum(path.stat().st_size for path in kept)
    free = shutil.disk_usage(existing).free + there
    if needed > free:
        raise UserError(
            f"the soft targets need up to {human_bytes(needed)}, {existing} has "
            f"{human_bytes(free)} free; free some "
            "space, choose --store on another disk, or lower --samples or targets.num_topk"
        )
