"""A store to train from: complete, undamaged, with what a student needs of its teacher."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from distill.capture.capture import trained_on
from distill.config.schema import RunConfig
from distill.config.sources import Section
from distill.errors import UserError
from distill.runtime.format import human_bytes
from distill.runtime.progress import Console
from teachers import example_teacher
from teachers.base import TeacherInfo
from teachers.gguf.file import file_sha256, read_gguf
from teachers.store.manifest import filled_manifest
from teachers.store.shard_files import unusable
from teachers.store.store import SHARED_CODEC, SoftTargetStore
from teachers.store.teacher_record import TeacherRecord, require_teacher_record
from teachers.targets.recipe import Recipe

# What of these sections a run from a store still looks at; everything else in them was decided by
# the capture.
LOOKED_AT = {
    "teacher": {"gpu_layers", "main_gpu", "path"},
    "data": {"held_out"},
    "targets": set[str](),
}

CHECKED_AT_START = 64  # shards


def without_capture(config: RunConfig, recipe: Recipe, console: Console) -> RunConfig:
    """The settings with those of the capture as in the store, or defaults if unknown there.

    Warns of settings that were given in vain.
    """
    unused = []
    changes: dict[str, Section] = {}
    for section, kept in LOOKED_AT.items():
        given = getattr(config, section)
        known = asdict(recipe) if section == "targets" else {}
        known.pop("sketch_kl", None)  # follows from the settings, and is none
        changes[section] = type(given)(**known, **{name: getattr(given, name) for name in kept})
        for name, field in type(given).model_fields.items():
            if getattr(given, name) not in (field.default, getattr(changes[section], name)):
                unused.append(f"{section}.{name}")
    if unused:
        console.warn(
            f"not looked at, as the capture of the store has decided it: {', '.join(unused)}"
        )
    return config.model_copy(update=changes)


def open_full_store(folder: Path) -> tuple[SoftTargetStore, TeacherRecord]:
    """An existing store and its teacher record; its shards are not checked yet.

    Raises:
        StoreError: not a store, damaged, or without the record.
        UserError: no student can be exported from it.
    """
    store = SoftTargetStore(folder, filled_manifest(folder))
    teacher_record = require_teacher_record(store)
    if not teacher_record.tokenizer:
        raise UserError(
            f"store {folder} was captured from {teacher_record.info.name}, which is no GGUF file, "
            "whose tokenizer the exported student needs; convert the teacher with llama.cpp's "
            "convert_hf_to_gguf.py and capture from that"
        )
    return store, teacher_record


def require_complete(store: SoftTargetStore, console: Console) -> None:
    """Check that every file that training reads is there, and of a small store that all are whole;
    ``StoreError`` names one that is missing or damaged.

    The shards of a large store are checked when targets are first read from them, each once.
    """
    shards = store.manifest.shards
    with console.stage("Check targets", total=shards) as stage:
        names = [store.shard_path(shard).name for shard in range(shards)]
        there = {path.name for path in store.folder.iterdir()}
        bad = {"missing": [name for name in names if name not in there], "damaged": list[str]()}
        for shard in range(shards if shards <= CHECKED_AT_START else 0):
            if names[shard] in there and store.known_state(shard) != "complete":
                bad["damaged"].append(names[shard])
            stage.update(shard + 1)
        if store.needs_shared_codec and store.shared_codec() is None:
            bad["damaged" if (store.folder / SHARED_CODEC).exists() else "missing"].append(
                SHARED_CODEC
            )
        if any(bad.values()):
            raise unusable(store.folder, bad)
        size = human_bytes(store.bytes_on_disk())
        stage.finish(f"{len(store)} sequences, {trained_on(store)}, {size} in {store.folder}")


def find_teacher(path: str | None, info: TeacherInfo) -> Path | None:
    """The file of a store's teacher: ``path`` if given, else the example teacher if it is that.

    Raises:
        UserError, TeacherFileError: ``path`` is another teacher, or no GGUF file.
    """
    if path is None:
        return example_teacher() if file_sha256(example_teacher()) == info.sha256 else None
    if read_gguf(Path(path)).sha256 != info.sha256:
        raise UserError(
            f"--teacher {path} is not the teacher whose soft targets the store holds ({info.name}, "
            f"SHA-256 {info.sha256[:12]}…); leave it out, or give that file"
        )
    return Path(path)
