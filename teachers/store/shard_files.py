"""All shards of a store: a few open, and what is known of sequences without their targets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from teachers.atomic_files import StoreError
from teachers.base import Tokens
from teachers.store.manifest import Manifest
from teachers.store.shard_file import ShardFile, UnreadableShard
from teachers.store.shard_records import shard_path
from teachers.store.tasks import TOGETHER

OPEN_SHARDS = 128
AT_HAND = 2 * TOGETHER  # of what was seen in shards: all of it would grow with the store
Result = TypeVar("Result")


@dataclass(frozen=True)
class Overview:
    """Of all sequences in order: number of tokens ``[n]``, a hash of them that only copies share
    ``[n]`` (but for one pair in 2^64). Which tokens of the vocabulary occur ``[V]``;
    ``positions``: how many predictions have targets."""

    lengths: NDArray[np.int32]
    hashes: NDArray[np.int64]
    occurring: NDArray[np.bool_]
    positions: int


class ShardFiles:
    """The shards in a folder; ``accept`` gets each file's path and metadata when it is opened, and
    may raise.

    Raises:
        StoreError: a shard that is looked at is missing or damaged.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, accept: Callable[[Path, Mapping[str, str]], None]
    ) -> None:
        self.folder, self.manifest, self._accept = folder, manifest, accept
        self._open_shards: dict[int, ShardFile] = {}  # the one used last comes last
        self._choosing = threading.Lock()  # threads read too
        self._vocab_size = int(manifest.identity["vocab_size"])

    def _open(self, shard: int) -> ShardFile:
        path, (start, stop) = shard_path(self.folder, shard), self.manifest.span(shard)
        try:
            file = ShardFile(path, stop - start, self.manifest.masked, self._vocab_size)
        except FileNotFoundError:
            raise unusable(self.folder, {"missing": [path.name]}) from None
        except UnreadableShard:
            raise unusable(self.folder, {"damaged": [path.name]}) from None
        self._accept(path, file.metadata)
        return file

    def at(self, index: int) -> tuple[ShardFile, int]:
        """The shard of a sequence, which stays open as long as no ``OPEN_SHARDS`` others are used,
        and which sequence it is there."""
        shard, place = divmod(int(index), self.manifest.sequences_per_shard)
        with self._choosing:
            file = self._open_shards.pop(shard, None)
        file = file or self._open(shard)
        with self._choosing:
            self._open_shards[shard] = file
            while len(self._open_shards) > OPEN_SHARDS:
                del self._open_shards[next(iter(self._open_shards))]
        return file, place

    def tokens(self, index: int) -> Tokens:
        """Token ids of one sequence, ``[n]``."""
        file, place = self.at(index)
        with self._damaged(index // self.manifest.sequences_per_shard):
            return file.tokens(place)

    @contextmanager
    def _damaged(self, shard: int) -> Iterator[None]:
        """Say of what cannot be read that it is damaged."""
        try:
            yield
        except UnreadableShard:
            name = shard_path(self.folder, shard).name
            raise unusable(self.folder, {"damaged": [name]}) from None

    def _each(self, look: Callable[[ShardFile], Result]) -> Iterator[tuple[slice, Result]]:
        """What is seen in every shard, and whose sequences these are; in order, but several are
        looked at together, as a network's delay then counts once."""

        def seen(shard: int) -> tuple[slice, Result]:
            with self._damaged(shard):
                return slice(*self.manifest.span(shard)), look(self._open(shard))

        self._open(0)  # what is read to accept one is read once, not by all threads
        shards = range(self.manifest.shards)
        with ThreadPoolExecutor(TOGETHER) as pool:
            for start in range(0, len(shards), AT_HAND):
                yield from pool.map(seen, shards[start : start + AT_HAND])

    @cached_property
    def overview(self) -> Overview:
        """What all shards say of their sequences; each is opened once, and no targets are read."""
        sequences = self.manifest.sequences
        lengths, hashes = np.empty(sequences, np.int32), np.empty(sequences, np.int64)
        occurring, positions = np.zeros(self._vocab_size, np.bool_), 0

        def look(file: ShardFile) -> tuple[Any, ...]:
            return file.lengths, file.positions(), *file.contents()

        for span, (some, kept, own, there) in self._each(look):
            lengths[span], hashes[span] = some, own
            occurring |= there
            positions += kept
        return Overview(lengths, hashes, occurring, positions)


def unusable(folder: Path, names: Mapping[str, Sequence[str]]) -> StoreError:
    """What to say of a store's files by what is wrong with them, ``missing`` or ``damaged``."""
    state, files = next((state, files) for state, files in names.items() if files)
    return StoreError(
        f"store {folder} has {len(files)} file{'s' * (len(files) > 1)} {state} "
        f"({files[0]}{', …' * (len(files) > 1)}); run the capture again where the teacher is, "
        "which makes just that, or copy the store again"
    )
