"""A shard's rows, read from its file when they are asked for.

Not mapped into memory: the pages that a training has once looked at would count as its own, and a
store may be many times as large as the machine. The layout is that of safetensors: the header's
length (8 bytes), the header (JSON), the arrays.
"""

from __future__ import annotations

import json
import math
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teachers.base import Keep, Tokens
from teachers.store.shard_contents import (
    CONTENTS,
    contents_of,
    foreign_token,
    hashes_and_tokens,
)
from teachers.targets.distributions import Arrays

TYPES = {
    **{"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1"},
    **{"U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1", "BOOL": "?"},
}
LENGTH_BYTES = 8


class UnreadableShard(ValueError):
    """A shard whose header, size or lengths cannot be right; says what is wrong."""


class ShardFile:
    """One shard, open. ``masked``: it says which predictions have targets; ``vocab_size``: of the
    teacher.

    Raises:
        UnreadableShard: the file is no such shard, or cut. FileNotFoundError: there is none.
    """

    def __init__(self, path: Path, sequences: int, masked: bool, vocab_size: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._reading = threading.Lock()  # a place in a file belongs to all threads
        weakref.finalize(self, self._file.close)
        try:
            self.metadata, self._arrays = self._header(path.stat().st_size)
            self.lengths: NDArray[np.int64] = self.array("lengths")
            total = self._arrays["tokens"][1][0]
        except UnreadableShard:
            raise
        except (LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise UnreadableShard(f"its header is wrong ({error})") from None
        lengths = self.lengths
        right = lengths.shape == (sequences,) and bool((lengths > 0).all())
        if not right or int(lengths.sum()) != total:
            raise UnreadableShard("its lengths do not fit its tokens")
        self._masked, self._vocab_size = masked, vocab_size
        self._tokens = np.concatenate(([0], np.cumsum(lengths)))
        self._rows = np.concatenate(([0], np.cumsum(lengths - 1)))
        if masked:
            bits = np.unpackbits(self.array("keep"), count=int(self._rows[-1]))
            self._rows = np.concatenate(([0], np.cumsum(bits, dtype=np.int64)))[self._rows]

    def _header(self, size: int) -> tuple[dict[str, str], dict[str, tuple[Any, list[int], int]]]:
        """The metadata, and of every array its type, shape and first byte."""
        self._read(0, first_bytes := np.empty(LENGTH_BYTES, np.uint8))
        begin = LENGTH_BYTES + int.from_bytes(first_bytes.tobytes(), "little")
        if begin > size:
            raise UnreadableShard("the file is cut")
        self._read(LENGTH_BYTES, text := np.empty(begin - LENGTH_BYTES, np.uint8))
        header: dict[str, Any] = json.loads(text.tobytes())
        metadata, arrays, end = header.pop("__metadata__", {}), {}, begin
        for name, about in header.items():
            kind, shape = np.dtype(TYPES[about["dtype"]]), [int(n) for n in about["shape"]]
            first, last = about["data_offsets"]
            if last - first != math.prod(shape) * kind.itemsize:
                raise UnreadableShard(f"{name} is not as long as it says")
            arrays[name] = (kind, shape, begin + first)
            end = max(end, begin + last)
        if end != size:
            raise UnreadableShard("the file is cut")
        return metadata, arrays

    def _read(self, place: int, buffer: NDArray[np.uint8]) -> None:
        """Fill a buffer with the bytes at some place."""
        view, done = buffer.data, 0
        with self._reading:
            self._file.seek(place)
            while done < len(view):
                some = self._file.readinto(view[done:])
                if not some:
                    raise UnreadableShard("the file is cut")
                done += some

    def array(self, name: str) -> NDArray[Any]:
        """A whole array."""
        return self.slice(name, 0, self._arrays[name][1][0])

    def slice(self, name: str, first: int, last: int) -> NDArray[Any]:
        """Some rows of an array."""
        kind, shape, begin = self._arrays[name]
        rows: NDArray[Any] = np.empty((int(last - first), *shape[1:]), kind)
        flat = rows.reshape(-1).view(np.uint8)
        self._read(begin + int(first) * math.prod(shape[1:]) * kind.itemsize, flat)
        return rows

    def positions(self) -> int:
        """How many predictions have targets."""
        return int(self._rows[-1])

    def tokens(self, place: int) -> Tokens:
        """Token ids of one sequence, ``[n]``."""
        return self._known(self.slice("tokens", self._tokens[place], self._tokens[place + 1]))

    def _known(self, tokens: Tokens) -> Tokens:
        """The same tokens, all of the vocabulary."""
        if foreign_token(tokens, self._vocab_size) is not None:
            raise UnreadableShard("it holds tokens that are not of the vocabulary")
        return tokens

    def keep(self, place: int) -> Keep:
        """Which of one sequence's n − 1 predictions have targets, ``[n − 1]``."""
        first, last = self._tokens[place] - place, self._tokens[place + 1] - place - 1
        if not self._masked:
            return np.ones(last - first, dtype=np.bool_)
        bits = np.unpackbits(self.slice("keep", first // 8, -(-last // 8)))
        return bits[first % 8 :][: last - first].astype(np.bool_)

    def rows(self, place: int, names: Sequence[str]) -> Arrays:
        """The rows of one sequence's kept positions in some arrays."""
        first, last = self._rows[place], self._rows[place + 1]
        return {name: self.slice(name, first, last) for name in names}

    def contents(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """A hash of each sequence's tokens ``[n]``, and which tokens of the vocabulary occur
        ``[V]``; as the shard says, or from its tokens where an earlier version wrote it."""
        try:
            arrays = {name: self.array(name) for name in CONTENTS if name in self._arrays}
            if len(arrays) < len(CONTENTS):
                tokens = self._known(self.array("tokens"))
                arrays = contents_of(tokens, self.lengths, self._vocab_size)
            return hashes_and_tokens(arrays, len(self.lengths), self._vocab_size)
        except UnreadableShard:
            raise
        except (LookupError, TypeError, ValueError) as error:
            raise UnreadableShard(f"what it says of its tokens is wrong ({error})") from None
