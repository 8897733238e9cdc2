"""Soft targets on disk: a folder with a manifest and shards that appear whole or not at all.

``manifest.json`` says what the store holds: its identity (teacher, tokenizer, corpus, kind of
targets, …) and how the sequences are split into shards. ``shard-00000.safetensors`` holds
consecutive sequences: their ``tokens`` and ``lengths``, and one row of each target array per
position (a sequence of n tokens has n − 1 positions, of which a masked store keeps those that are
set in ``keep``, eight to a byte). ``companion.safetensors`` is the shared codec: how hidden states
are encoded (from format 5 on with bits of its own for each direction), and the output matrix that
turns them into logits; every shard names the one that it was written with by its SHA-256 (from
format 4 on). ``teacher.safetensors`` is what else a student takes from its teacher (see
``teachers.store.teacher_record``), so that a store can be used without its teacher. Each file's
header carries a SHA-256 over its arrays and the store's key, so it proves itself and writers need
no common state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from teachers.atomic_files import StoreError, write_whole
from teachers.base import Keep, Tokens, whole_masks
from teachers.store.manifest import (
    MANIFEST,
    TASKS,
    Manifest,
    difference,
    read_manifest,
    require_store_folder,
)
from teachers.store.shard_contents import contents_of, foreign_token, says_what_it_holds
from teachers.store.shard_files import ShardFiles, unusable
from teachers.store.shard_records import (
    READ_BACK,
    is_unchanged,
    shard_path,
    shard_record,
    task_name,
)
from teachers.store.shared import SharedCodec
from teachers.store.tasks import Tasks
from teachers.targets.distributions import Arrays
from teachers.targets.stored_arrays import Targets, array_names, typed

SHARED_CODEC = "companion.safetensors"
NAMED = " codec "  # in a shard's seal, before the digest of the codec that it was written with


class SoftTargetStore:
    """One store folder, open for writing shards and reading sequences."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._recipe = manifest.recipe
        self._vocab_size = int(manifest.identity["vocab_size"])
        self._codec: SharedCodec | None = None
        self._codec_digest = ""
        self.files = ShardFiles(folder, manifest, self._accept)
        self._sound = np.zeros(manifest.shards, np.bool_)  # which shards are known to be whole

    @classmethod
    def create_or_open(cls, folder: Path, manifest: Manifest) -> SoftTargetStore:
        """Open the store in ``folder`` if it is this very one, or start it there.

        Raises:
            StoreError: the folder holds a store made from something else, or other files.
        """

        def find() -> Manifest | None:
            return read_manifest(folder) if require_store_folder(folder) else None

        def make() -> Manifest:
            write_whole(folder / MANIFEST, manifest.to_json().encode())
            return manifest

        # Other processes may start it at the same time, and perhaps from something else.
        stored = find() or Tasks(folder / TASKS).once(MANIFEST, find, make, lambda: None)
        if not stored.holds(manifest):
            raise StoreError(
                f"store {folder} was made with {difference(stored, manifest)}; choose another "
                "--store folder (this one is left as it is)"
            )
        return cls(folder, stored)

    # -- writing

    def shard_path(self, shard: int) -> Path:
        """Where a shard lies."""
        return shard_path(self.folder, shard)

    def span(self, shard: int) -> tuple[int, int]:
        """First and one-past-last sequence of a shard."""
        return self.manifest.span(shard)

    def write_shard(
        self,
        shard: int,
        sequences: Sequence[Tokens],
        targets: Arrays,
        keep: Sequence[Keep] | None = None,
    ) -> Arrays:
        """Write one shard, whole or not at all, and return all that it holds; ``keep``: which
        predictions have targets.

        Raises:
            StoreError: numbers of sequences or positions do not fit, or tokens are not the
                teacher's.
            OSError: the disk refuses (full, read-only).
        """
        start, stop = self.span(shard)
        masks = whole_masks(sequences, keep)
        positions = int(sum(mask.sum() for mask in masks))
        tokens = np.concatenate(sequences).astype(np.int32)
        rows = {len(array) for array in targets.values()}
        if (foreign := foreign_token(tokens, self._vocab_size)) is not None:
            raise StoreError(
                f"shard {shard} of {self.folder}: token {foreign} is none of the teacher's "
                f"{self._vocab_size}"
            )
        if len(sequences) != stop - start or rows - {positions}:
            raise StoreError(
                f"shard {shard} of {self.folder}: {len(sequences)} sequences with {positions} "
                "positions"
            )
        lengths = np.array([len(part) for part in sequences], dtype=np.int64)
        contents = contents_of(tokens, lengths, self._vocab_size)
        arrays: Arrays = {"tokens": tokens, "lengths": lengths, **contents, **targets}
        if self.manifest.masked:
            arrays["keep"] = np.packbits(np.concatenate(masks))
        self.files = ShardFiles(self.folder, self.manifest, self._accept)
        self._sound[shard] = False
        codec = None
        if self.needs_shared_codec and self.manifest.names_codec:
            self._need_codec()
            codec = self._codec_digest
        self.write_file(self.shard_path(shard).name, arrays, codec)
        return arrays

    def checksum(self, shard: int) -> str:
        """The SHA-256 that a shard says it has, in hexadecimal."""
        with safe_open(self.shard_path(shard), framework="numpy") as file:
            return str((file.metadata() or {}).get("sha256", "")).partition(" ")[0]

    def record_of(self, shard: int, arrays: Arrays) -> dict[str, Any]:
        """What to remember of a shard that is whole and holds these arrays."""
        return shard_record(self.shard_path(shard), self.checksum(shard), arrays)

    def write_file(self, name: str, arrays: Arrays, codec: str | None = None) -> None:
        """Write a file of arrays that proves itself, whole or not at all; ``codec``: the digest of
        the shared codec that it names."""
        path = self.folder / name
        arrays = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
        write_whole(path, safetensors.numpy.save(arrays, metadata=self._seal(path, arrays, codec)))

    def _seal(self, path: Path, arrays: Arrays, codec: str | None) -> dict[str, str]:
        """A file's metadata: one entry, as safetensors writes several in random order."""
        named = "" if codec is None else f"{NAMED}{codec}"
        digest = array_digest(arrays, named)
        return {"sha256": f"{digest} store {self.manifest.key} {path.stem}{named}"}

    def write_shared_codec(self, codec: SharedCodec) -> None:
        """Write the shared codec, whole or not at all.

        Raises:
            StoreError: shards are there that were not written with this very one.
        """
        arrays = codec.arrays()
        for shard in range(self.manifest.shards):
            path = self.shard_path(shard)
            other = path.exists() and self._codec_of(path) != array_digest(arrays)
            if other and self.state(shard) == "complete":
                known = "" if self.manifest.names_codec else " for all that is known"
                raise StoreError(
                    f"store {self.folder}: {SHARED_CODEC} is lost, and what was fitted again is "
                    f"not{known} the one that {path.name} was written with; put that file back "
                    "from a copy, or capture into another --store folder"
                )
        self.write_file(SHARED_CODEC, arrays)
        self._codec = None

    def state(self, shard: int) -> str:
        """``complete``, ``missing`` or ``damaged`` (wrong checksum, header or store key)."""
        path = self.shard_path(shard)
        if not path.exists():
            return "missing"
        return "damaged" if self.read_shard(shard) is None else "complete"

    def read_shard(self, shard: int) -> Arrays | None:
        """The arrays of a shard; ``None`` where it is missing or damaged."""
        path = self.shard_path(shard)
        arrays = self.read_file(path.name) if path.exists() else None
        with suppress(LookupError, TypeError, ValueError):  # sealed, but not by this program
            if arrays is not None and says_what_it_holds(arrays, self._vocab_size):
                return arrays
        return None

    def read_file(self, name: str) -> Arrays | None:
        """The arrays of a file that is there, if its checksum, header and store key are right.

        Raises:
            StoreError: it was written with another shared codec than the one that is there.
        """
        path = self.folder / name
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, TypeError):  # numpy has no such type
            return None
        codec = _codec_named(metadata)
        if metadata != self._seal(path, arrays, codec):
            return None
        self._require_codec(name, codec)
        return arrays

    @property
    def needs_shared_codec(self) -> bool:
        """Whether this kind of store has a shared codec."""
        return self.manifest.has_codec

    def shared_codec(self) -> SharedCodec | None:
        """The shared codec, or ``None`` where that file is missing or damaged."""
        if self._codec is None and (self.folder / SHARED_CODEC).exists():
            arrays = self.read_file(SHARED_CODEC)
            if arrays is not None:
                self._codec_digest = array_digest(arrays)  # before what is looked for
                self._codec = self._codec_in(arrays)
        return self._codec

    def _codec_in(self, arrays: Arrays) -> SharedCodec | None:
        try:
            codec = SharedCodec.from_arrays(arrays, self._recipe)
        except (KeyError, IndexError, TypeError, ValueError):  # sealed, but not by this program
            return None
        return codec if codec.head is None or len(codec.head.bias) == self._vocab_size else None

    def _codec_of(self, path: Path) -> str | None:
        try:
            with safe_open(path, framework="numpy") as file:
                return _codec_named(file.metadata() or {})
        except SafetensorError:
            return None

    def _require_codec(self, name: str, digest: str | None) -> None:
        """Raise ``StoreError`` if a file names another codec than the one that is there."""
        if digest and self.shared_codec() is not None and digest != self._codec_digest:
            raise StoreError(
                f"store {self.folder}: {name} was written with another {SHARED_CODEC} than the one "
                "that is there; put the right one back from a copy, or capture into another "
                "--store folder"
            )

    def _accept(self, path: Path, metadata: Mapping[str, str]) -> None:
        self._require_codec(path.name, _codec_named(metadata))

    # -- reading

    def __len__(self) -> int:
        return self.manifest.sequences

    def tokens(self, index: int) -> Tokens:
        """Token ids of one sequence, ``[n]``."""
        return self.files.tokens(index)

    def keep(self, index: int) -> Keep:
        """Which of one sequence's n − 1 predictions have targets, ``[n − 1]``."""
        file, place = self.files.at(index)
        return file.keep(place)

    def targets(self, index: int) -> Targets:
        """Soft targets of one sequence's kept positions; only these rows are read from disk.

        Raises:
            StoreError: the shared codec is missing or damaged; a rerun of the capture makes it.
        """
        return self.typed_targets(self._rows(index, array_names(self._recipe)))

    def layer_states(self, index: int) -> dict[int, Tensor]:
        """Kept states of the chosen layers, float32 ``[N, R]``, as coordinates of a basis."""
        layers = self._recipe.layers
        names = [f"layer{layer}{part}" for layer in layers for part in ("", "_scale")]
        return self.typed_layers(self._rows(index, names))

    def typed_targets(self, arrays: Arrays) -> Targets:
        """A teacher's answer, as arrays of this store's recipe ``[N, …]``, as typed targets."""
        basis = head = None
        if self._recipe.needs_states:
            codec = self._need_codec()
            basis, head = codec.bases.get("final"), codec.head
        with self._known_codes():
            return typed(arrays, self._recipe, self._vocab_size, basis, head)

    def typed_layers(self, arrays: Arrays) -> dict[int, Tensor]:
        """The layer states kept in such an answer, float32 ``[N, R]`` each."""
        states = {}
        for layer in self._recipe.layers:
            name, basis = f"layer{layer}", self._need_codec().bases[f"layer{layer}"]
            with self._known_codes():
                states[layer] = basis.coordinates(arrays[name], arrays[f"{name}_scale"])  # type: ignore[arg-type]
        return states

    @contextmanager
    def _known_codes(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:  # sealed, but not by this program
            raise StoreError(
                f"store {self.folder}: a shard is damaged ({error}); capture into another --store "
                "folder"
            ) from None

    @contextmanager
    def head_on(self, device: torch.device, dtype: torch.dtype | None = None) -> Iterator[None]:
        """Within, targets have the head that turns codes into logits on ``device``: it is large,
        and common to all of them. That of a sketch has its matrix in ``dtype``."""
        codec = self.shared_codec()
        if codec is None or codec.head is None:
            yield
            return
        head = codec.head.to(device, dtype if self._recipe.has_sketch else None)
        self._codec = replace(codec, head=head)
        del codec, head  # the only one in memory: as it was, it is read again
        try:
            yield
        finally:
            self._codec = None

    def _need_codec(self) -> SharedCodec:
        codec = self.shared_codec()
        if codec is None:
            raise StoreError(
                f"store {self.folder}: {SHARED_CODEC} is missing or damaged; run the capture again"
            )
        return codec

    def _rows(self, index: int, names: list[str]) -> Arrays:
        """The rows of one sequence in some arrays."""
        shard = int(index) // self.manifest.sequences_per_shard
        if (state := self.known_state(shard)) != "complete":
            raise unusable(self.folder, {state: [self.shard_path(shard).name]})
        file, place = self.files.at(index)
        return file.rows(place, names)

    def is_known(self, shard: int) -> bool:
        """Whether this process knows that a shard is whole."""
        return bool(self._sound[shard])

    def known_state(self, shard: int) -> str:
        """As ``state``, but a shard is read for it once: that it is whole is remembered in the
        store for as long as the file stays as it is."""
        if not self._sound[shard]:
            tasks, name = Tasks(self.folder / TASKS), task_name(shard)
            record = tasks.record(name)
            if not (record.get(READ_BACK) and is_unchanged(self.shard_path(shard), record)):
                arrays = self.read_shard(shard)
                if arrays is None:
                    return "damaged" if self.shard_path(shard).exists() else "missing"
                known = record | self.record_of(shard, arrays) | {READ_BACK: True}
                with suppress(OSError):  # of a store that nobody may write to: read again next time
                    tasks.set_record(name, known)
            self._sound[shard] = True
        return "complete"

    def lengths(self) -> NDArray[np.int32]:
        """Number of tokens of every sequence, in order."""
        return self.files.overview.lengths

    def positions(self) -> int:
        """Number of predictions that have targets, over all sequences."""
        return self.files.overview.positions

    def bytes_on_disk(self) -> int:
        """Size of all shards present."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))


def array_digest(arrays: Arrays, before: str = "") -> str:
    """SHA-256, in hexadecimal, of arrays with their names, types and shapes, behind ``before``."""
    digest = hashlib.sha256(before.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _codec_named(metadata: Mapping[str, str]) -> str | None:
    """The digest of the shared codec that a file's metadata names, if any."""
    return metadata.get("sha256", "").partition(NAMED)[2] or None
