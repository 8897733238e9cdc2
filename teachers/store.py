"""Soft targets on disk: a folder with a manifest and shards that appear whole or not at all.

``manifest.json`` says what the store holds: its identity (teacher, tokenizer, corpus, kind of targets, …)
and how the sequences are split into shards. ``shard-00000.safetensors`` holds consecutive sequences: their
``tokens`` and ``lengths``, and one row of each target array per position (a sequence of n tokens has n − 1
positions). ``companion.safetensors`` holds what all positions share: how hidden states are encoded, and the
output matrix that turns them into logits, so that a store can be used without its teacher. Each file's header
carries a SHA-256 over its arrays and the store's key, so it proves itself and writers need no common state.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from teachers.records import Recipe, Targets, array_names, typed
from teachers.sketch import Basis
from teachers.soft_targets import Arrays, OutputHead

FORMAT = 2
COMPANION = "companion.safetensors"
MANIFEST = "manifest.json"
LOCK = ".lock"
Tokens = NDArray[np.int32]


class StoreError(ValueError):
    """A store that cannot be used as asked; the message names the folder, the reason and the remedy."""


@dataclass(frozen=True)
class Manifest:
    """What a store holds. ``identity`` is everything that must be equal for a store to be used again."""

    identity: dict[str, Any]
    sequences: int
    sequences_per_shard: int

    @property
    def shards(self) -> int:
        """Number of shards of the complete store."""
        return -(-self.sequences // self.sequences_per_shard)

    @property
    def recipe(self) -> Recipe:
        """What the store keeps of each position."""
        return Recipe.from_json(self.identity["recipe"])

    @property
    def key(self) -> str:
        """SHA-256 of the identity, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        content = {
            "format": FORMAT,
            "identity": self.identity,
            "sequences": self.sequences,
            "sequences_per_shard": self.sequences_per_shard,
        }
        return json.dumps(content, indent=2, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Companion:
    """What all positions of a store share.

    ``bases``: how hidden states are encoded (``final``, ``layer<i>``); ``head``: what turns a decoded final
    state into logits, ``None`` where no state is kept.
    """

    bases: Mapping[str, Basis]
    head: OutputHead | None

    def arrays(self) -> Arrays:
        """Everything as named arrays; the head's matrix in float16."""
        arrays: Arrays = {}
        for name, basis in self.bases.items():
            arrays |= basis.arrays(name)
        if self.head is not None:
            arrays |= {"head_matrix": self.head.matrix.half().numpy(), "head_bias": self.head.bias.numpy()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Arrays, recipe: Recipe) -> Companion:
        """The inverse of ``arrays``."""
        names = ["final", *(f"layer{layer}" for layer in recipe.layers)]
        found = {name: Basis.from_arrays(arrays, name) for name in names}
        head = None
        if "head_matrix" in arrays:
            matrix, bias = (np.array(arrays[name], np.float32) for name in ("head_matrix", "head_bias"))
            head = OutputHead(torch.from_numpy(matrix), torch.from_numpy(bias))
        return cls({name: basis for name, basis in found.items() if basis is not None}, head)


@contextmanager
def exclusive(folder: Path, rank: int = 0) -> Iterator[None]:
    """Hold a folder for this process alone; the lock ends with the process, however it ends.

    Processes of one launch that share the work hold it under their ``rank``, one each.

    Raises:
        StoreError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / (f"{LOCK}.{rank}" if rank else LOCK))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise StoreError(
            f"{folder} is in use by another process; wait for it or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether a process holds the folder (the first of its launch, if there are several)."""
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    lock.release()
    return False


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it appears complete or not at all, also when the machine stops."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failing write() does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether a file is a lock, or what a killed writer may leave behind."""
    return path.name.startswith(LOCK) or (path.name.startswith(".") and ".tmp" in path.name)


class SoftTargetStore:
    """One store folder, open for writing shards and reading sequences."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._recipe = manifest.recipe
        self._companion: Companion | None = None
        self._open_shards: dict[int, Any] = {}
        self._starts: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    @classmethod
    def create_or_open(cls, folder: Path, manifest: Manifest) -> SoftTargetStore:
        """Open the store in ``folder`` if it is this very one, or begin it there.

        Raises:
            StoreError: the folder holds a store made from something else, or other files.
        """
        others = [path for path in folder.iterdir() if not is_temporary(path)] if folder.is_dir() else []
        # Another process of the same launch may have begun the store a moment ago: looked for after the listing.
        if not (folder / MANIFEST).exists():
            if others:
                raise StoreError(f"store folder {folder} holds other files; choose an empty or new folder")
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / MANIFEST, manifest.to_json().encode())
        found = read_manifest(folder)
        if found != manifest:
            raise StoreError(
                f"store {folder} was made with {_difference(found, manifest)}; choose another --store folder "
                "(this one is left as it is)"
            )
        return cls(folder, manifest)

    # -- writing --------------------------------------------------------------------------------------

    def shard_path(self, shard: int) -> Path:
        """Where a shard lies."""
        return self.folder / f"shard-{shard:05d}.safetensors"

    def span(self, shard: int) -> tuple[int, int]:
        """First and one-past-last sequence of a shard."""
        start = shard * self.manifest.sequences_per_shard
        return start, min(self.manifest.sequences, start + self.manifest.sequences_per_shard)

    def write_shard(self, shard: int, sequences: Sequence[Tokens], targets: Arrays) -> None:
        """Write one shard, whole or not at all.

        Raises:
            StoreError: numbers of sequences or positions do not fit.
            OSError: the disk refuses (full, read-only).
        """
        start, stop = self.span(shard)
        positions = sum(len(tokens) - 1 for tokens in sequences)
        if len(sequences) != stop - start or any(len(rows) != positions for rows in targets.values()):
            raise StoreError(
                f"shard {shard} of {self.folder}: {len(sequences)} sequences with {positions} positions"
            )
        arrays: Arrays = {
            "tokens": np.concatenate(sequences).astype(np.int32),
            "lengths": np.array([len(tokens) for tokens in sequences], dtype=np.int64),
            **{name: np.ascontiguousarray(rows) for name, rows in targets.items()},
        }
        self._open_shards.pop(shard, None)
        self._starts.pop(shard, None)
        self._write(self.shard_path(shard), arrays)

    def _write(self, path: Path, arrays: Arrays) -> None:
        """Write a file of arrays that proves itself."""
        arrays = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
        write_whole(path, safetensors.numpy.save(arrays, metadata=self._seal(path, arrays)))

    def remove_leftovers(self) -> None:
        """Remove what killed writers left behind; only for a process that holds the folder alone."""
        for path in self.folder.iterdir():
            if is_temporary(path) and not path.name.startswith(LOCK):
                path.unlink(missing_ok=True)

    def _seal(self, path: Path, arrays: Arrays) -> dict[str, str]:
        """What a file says of itself: one entry, as safetensors writes several in random order."""
        return {"sha256": f"{_digest(arrays)} store {self.manifest.key} {path.stem}"}

    def write_companion(self, companion: Companion) -> None:
        """Write the store's companion, whole or not at all.

        Raises:
            OSError: the disk refuses.
        """
        self._write(self.folder / COMPANION, companion.arrays())
        self._companion = None

    def state(self, shard: int) -> str:
        """``complete``, ``missing`` or ``damaged`` (its checksum, header or store key is wrong)."""
        path = self.shard_path(shard)
        if not path.exists():
            return "missing"
        return "damaged" if self._proved(path) is None else "complete"

    def _proved(self, path: Path) -> Arrays | None:
        """The arrays of a file if its checksum, header and store key are right."""
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, TypeError):  # numpy has no such type
            return None
        return arrays if metadata == self._seal(path, arrays) else None

    @property
    def needs_companion(self) -> bool:
        """Whether this kind of store has something that all positions share."""
        return self._recipe.needs_states or bool(self._recipe.layers)

    def companion(self) -> Companion | None:
        """What all positions share, or ``None`` where that file is missing or damaged."""
        if self._companion is None and (self.folder / COMPANION).exists():
            arrays = self._proved(self.folder / COMPANION)
            if arrays is not None:
                self._companion = Companion.from_arrays(arrays, self._recipe)
        return self._companion

    # -- reading --------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.manifest.sequences

    def _shard(self, shard: int) -> tuple[Any, NDArray[np.int64], NDArray[np.int64]]:
        """An open shard with the first token and first position row of each of its sequences."""
        if shard not in self._open_shards:
            file = safe_open(self.shard_path(shard), framework="numpy")
            lengths = file.get_tensor("lengths")
            tokens = np.concatenate(([0], np.cumsum(lengths)))
            rows = np.concatenate(([0], np.cumsum(lengths - 1)))
            self._open_shards[shard] = file
            self._starts[shard] = (tokens, rows)
        return self._open_shards[shard], *self._starts[shard]

    def tokens(self, index: int) -> Tokens:
        """Token ids of one sequence, ``[n]``."""
        shard, place = divmod(index, self.manifest.sequences_per_shard)
        file, starts, _ = self._shard(shard)
        rows: Tokens = file.get_slice("tokens")[starts[place] : starts[place + 1]]
        return rows

    def targets(self, index: int) -> Targets:
        """Soft targets of one sequence's n − 1 positions; only these rows are read from disk.

        Raises:
            StoreError: the companion is missing or damaged; a rerun of the capture makes it again.
        """
        companion = self._need_companion() if self._recipe.needs_states else None
        arrays = self._rows(index, array_names(self._recipe))
        basis = companion.bases.get("final") if companion else None
        head = companion.head if companion else None
        return typed(arrays, self._recipe, int(self.manifest.identity["vocab_size"]), basis, head)

    def layer_states(self, index: int) -> dict[int, Tensor]:
        """Kept states of the chosen layers, float32 ``[n − 1, R]`` each, in the coordinates of their basis."""
        companion = self._need_companion()
        names = [name for layer in self._recipe.layers for name in (f"layer{layer}", f"layer{layer}_scale")]
        arrays = self._rows(index, names)
        return {
            layer: companion.bases[f"layer{layer}"].coordinates(
                arrays[f"layer{layer}"],  # type: ignore[arg-type]
                arrays[f"layer{layer}_scale"],  # type: ignore[arg-type]
            )
            for layer in self._recipe.layers
        }

    def _need_companion(self) -> Companion:
        companion = self.companion()
        if companion is None:
            raise StoreError(f"store {self.folder}: {COMPANION} is missing or damaged; run the capture again")
        return companion

    def _rows(self, index: int, names: list[str]) -> Arrays:
        """The rows of one sequence in some arrays."""
        shard, place = divmod(index, self.manifest.sequences_per_shard)
        file, _, starts = self._shard(shard)
        first, last = starts[place], starts[place + 1]
        return {name: file.get_slice(name)[first:last] for name in names}

    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of every sequence, in order."""
        starts = [self._shard(shard)[1] for shard in range(self.manifest.shards)]
        return np.concatenate([np.diff(start) for start in starts])

    def bytes_on_disk(self) -> int:
        """Size of all shards present."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an existing store.

    Raises:
        StoreError: there is none, or it is damaged or of another format.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise StoreError(f"store {folder} has format {content['format']}, this version reads {FORMAT}")
        manifest = Manifest(
            dict(content["identity"]), int(content["sequences"]), int(content["sequences_per_shard"])
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
    except (KeyError, TypeError, ValueError, OverflowError) as error:  # broken JSON and UTF-8 are ValueErrors
        raise StoreError(f"store {folder}: {MANIFEST} is damaged ({error}); move the folder away") from None


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _difference(found: Manifest, wanted: Manifest) -> str:
    """The first entry in which two manifests differ, in words."""
    for key in sorted(found.identity.keys() | wanted.identity.keys()):
        there, here = found.identity.get(key), wanted.identity.get(key)
        if there != here:
            return f"{key} {there!r}, not {here!r}"
    if found.sequences != wanted.sequences:
        return f"{found.sequences} sequences, not {wanted.sequences}"
    return f"{found.sequences_per_shard} sequences per shard, not {wanted.sequences_per_shard}"
