"""``manifest.json``: what a store holds; the same for every process that fills the store."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from teachers.atomic_files import StoreError, is_temporary
from teachers.targets.recipe import Recipe

# With what older versions do not know, another number: masks; shards that name their codec; codes
# of states in which each direction has bits of its own. What shards say of their tokens has none: a
# version that does not know it reads the tokens.
FORMAT, MASKED, SEALED, CODED = 2, 3, 4, 5
MANIFEST = "manifest.json"
TASKS = "tasks"  # a folder in the store: who does what, see ``teachers.store.tasks``
SEQUENCES = "sequences"  # a folder in the store: its tokens before they are asked about
# What earlier versions counted to a store's identity, though it moves no more than the last bits.
MACHINE = re.compile(r", (?:\d+ threads|gpu_layers -?\d+)")


@dataclass(frozen=True)
class Manifest:
    """What a store holds; ``identity``: what must be equal for it to be used again.

    ``names_codec``: whether shards say which shared codec they were written with, where there is
    one; in stores of an earlier format they do not.
    """

    identity: dict[str, Any]
    sequences: int
    sequences_per_shard: int
    names_codec: bool = field(default=True, compare=False)

    @property
    def shards(self) -> int:
        """Number of shards of the complete store."""
        return -(-self.sequences // self.sequences_per_shard)

    def span(self, shard: int) -> tuple[int, int]:
        """First and one-past-last sequence of a shard."""
        start = shard * self.sequences_per_shard
        return start, min(self.sequences, start + self.sequences_per_shard)

    @property
    def masked(self) -> bool:
        """Whether only some predictions have targets, and each shard says which."""
        return "train_on" in self.identity

    @property
    def truncation(self) -> str:
        """What the targets lack of the teacher's distributions, in words; empty: nothing."""
        return str(self.identity.get("truncation", ""))

    @property
    def has_codec(self) -> bool:
        """Whether this kind of store has a shared codec."""
        return self.recipe.needs_states or bool(self.recipe.layers)

    @property
    def recipe(self) -> Recipe:
        """What the store keeps of each position."""
        return Recipe.from_json(self.identity["recipe"])

    @property
    def key(self) -> str:
        """SHA-256 of the identity, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def holds(self, wanted: Manifest) -> bool:
        """Whether a store of this manifest is the one wanted, on whatever machine it was begun."""
        return self._without_machine() == wanted._without_machine()

    def _without_machine(self) -> Manifest:
        if not isinstance(runtime := self.identity.get("runtime"), str):
            return self
        return replace(self, identity=self.identity | {"runtime": MACHINE.sub("", runtime)})

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        sealed = self.names_codec and self.has_codec
        newest = CODED if self.recipe.has_sketch or self.recipe.layers else SEALED
        content = {
            "format": newest if sealed else MASKED if self.masked else FORMAT,
            "identity": self.identity,
            "sequences": self.sequences,
            "sequences_per_shard": self.sequences_per_shard,
        }
        return json.dumps(content, indent=2, sort_keys=True) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an existing store.

    Raises:
        StoreError: there is none, or it is damaged or of another format.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
        if content["format"] not in (FORMAT, MASKED, SEALED, CODED):
            raise StoreError(
                f"store {folder} has format {content['format']}, this version reads {FORMAT} to "
                f"{CODED}"
            )
        manifest = Manifest(
            dict(content["identity"]),
            int(content["sequences"]),
            int(content["sequences_per_shard"]),
            names_codec=content["format"] >= SEALED,
        )
        if manifest.sequences < 1 or manifest.sequences_per_shard < 1:
            raise ValueError("it counts no sequences")
        if manifest.recipe.kind and int(manifest.identity["vocab_size"]) < 1:
            raise ValueError("it has no vocabulary")
        return manifest
    except FileNotFoundError:
        raise StoreError(f"{folder} is not a store: it has no {MANIFEST}") from None
    except StoreError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:  # ValueError: JSON, UTF-8
        raise StoreError(
            f"store {folder}: {MANIFEST} is damaged ({error}); move the folder away"
        ) from None


def difference(stored: Manifest, wanted: Manifest) -> str:
    """The first entry in which two manifests differ, in words."""
    stored, wanted = stored._without_machine(), wanted._without_machine()
    keys = stored.identity.keys() | wanted.identity.keys()
    # A vocabulary first: the same text is other tokens in another.
    for key in sorted(keys, key=lambda key: (not key.startswith("vocab"), key)):
        there, here = stored.identity.get(key), wanted.identity.get(key)
        if there != here:
            return f"{key} {there!r}, not {here!r}"
    if stored.sequences != wanted.sequences:
        return f"{stored.sequences} sequences, not {wanted.sequences}"
    return f"{stored.sequences_per_shard} sequences per shard, not {wanted.sequences_per_shard}"


def require_store_folder(folder: Path) -> bool:
    """Whether a folder is a store; else it can become one.

    Raises:
        StoreError: it holds other files.
    """
    others = folder.is_dir() and not all(
        is_temporary(path) or path.name in (TASKS, SEQUENCES) for path in folder.iterdir()
    )
    there = (folder / MANIFEST).exists()  # after the listing: another process may write it just now
    if others and not there:
        raise StoreError(f"store folder {folder} holds other files; choose an empty or new folder")
    return there


def filled_manifest(folder: Path) -> Manifest:
    """The manifest of a store that ``distill capture`` has filled; its files are not looked at.

    Raises:
        StoreError: it is no store, damaged, or empty.
    """
    if not folder.is_dir():
        wrong = "is not a folder" if folder.exists() else "does not exist"
        raise StoreError(
            f"store {folder} {wrong}; give the folder that `distill capture` has filled"
        )
    manifest = read_manifest(folder)
    if not any(folder.glob("shard-*.safetensors")):
        raise StoreError(
            f"store {folder} holds no soft targets yet; run the capture again where the teacher is"
        )
    return manifest
