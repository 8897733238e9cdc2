"""Token sequences on disk, before the teacher is asked about them: tokenized once, read by many.

``sequences.json`` says what is there; ``part-00000.safetensors`` and those after it hold about
``PART_TOKENS`` tokens each: ``tokens`` of all segments one after another, ``segment_lengths``, how
many ``segments`` each sequence has and whether the teacher ``speaks`` after each of them, and where
only some predictions are learnt ``keep_lengths`` (−1: all are) and their bits ``keep``. A reader
maps the parts that it needs into memory, and checks each against the SHA-256 in ``sequences.json``
when it is first opened.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, overload

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from teachers.atomic_files import StoreError, write_whole
from teachers.base import Keep
from teachers.store.sequence_index import FORMAT, INDEX, Counting, Index, Item
from teachers.store.store import array_digest
from teachers.targets.distributions import Arrays

PART_TOKENS = 1 << 22  # of one file: 16 MiB
PART_SEQUENCES = 1 << 18


def write_sequences(folder: Path, items: Iterable[Item], index: Index) -> Index:
    """Write sequences and what is said of them into an empty folder, one part in memory at a time;
    returns ``index`` with what was counted."""
    counting, parts, some, tokens = Counting(index.sampling), list[tuple[int, str]](), [], 0
    for item in items:
        counting.add(item)
        some.append(item)
        tokens += sum(map(len, item.segments))
        if tokens >= PART_TOKENS or len(some) == PART_SEQUENCES:
            parts.append(_write_part(folder, len(parts), some))
            some, tokens = [], 0
    if some:
        parts.append(_write_part(folder, len(parts), some))
    tally = counting.tally()
    content = {
        "format": FORMAT,
        "sampling": asdict(index.sampling),
        "tally": asdict(tally),
        "parts": parts,
        "request": index.request,
        "notes": index.notes,
        "warnings": index.warnings,
    }
    write_whole(folder / INDEX, (json.dumps(content, indent=1) + "\n").encode())
    return Index(
        index.sampling, tally, parts, index.request, list(index.notes), list(index.warnings)
    )


def part_path(folder: Path, number: int) -> Path:
    """Where a part lies."""
    return folder / f"part-{number:05d}.safetensors"


def _write_part(folder: Path, number: int, items: Sequence[Item]) -> tuple[int, str]:
    segments = [part for item in items for part in item.segments]
    arrays: Arrays = {
        "tokens": np.concatenate(segments).astype(np.int32),
        "segment_lengths": np.array([len(part) for part in segments], dtype=np.int64),
        "segments": np.array([len(item.segments) for item in items], dtype=np.int32),
        "speaks": np.array([item.speaks for item in items], dtype=np.uint8),
    }
    masks = [item.keep for item in items]
    if any(mask is not None for mask in masks):
        lengths = [-1 if mask is None else len(mask) for mask in masks]
        arrays["keep_lengths"] = np.array(lengths, dtype=np.int64)
        arrays["keep"] = np.packbits(np.concatenate([mask for mask in masks if mask is not None]))
    write_whole(part_path(folder, number), safetensors.numpy.save(arrays))
    return len(items), array_digest(arrays)


class SequenceFiles(Sequence[Item]):
    """The sequences of a folder; only what is looked at is read.

    Raises:
        StoreError: a part that is looked at is missing or damaged.
    """

    def __init__(self, folder: Path, about: Index) -> None:
        self.folder, self.about = folder, about
        self._firsts = np.cumsum([0, *(count for count, _ in about.parts)])
        self._number = -1  # of the part that was last looked at
        self._part: _Part | None = None
        self._checked: set[int] = set()
        # As long as they are in a temporary folder: what is to be called when they are not.
        self.pending: Callable[[], object] | None = None

    def keep_in(self, folder: Path) -> None:
        """Put them into the folder of their store, if they are in a temporary one."""
        if self.pending is None:
            return
        if (folder / INDEX).exists():  # of an earlier capture, which asked for the same otherwise
            write_whole(folder / INDEX, (self.folder / INDEX).read_bytes())
            shutil.rmtree(self.folder)
        else:
            self.folder.rename(folder)
        self.folder, self._part = folder, None
        self.pending()
        self.pending = None

    def __len__(self) -> int:
        return self.about.tally.sequences

    @overload
    def __getitem__(self, chosen: int) -> Item: ...
    @overload
    def __getitem__(self, chosen: slice) -> list[Item]: ...
    def __getitem__(self, chosen: int | slice) -> Item | list[Item]:
        if isinstance(chosen, slice):
            return [self[place] for place in range(*chosen.indices(len(self)))]
        if not 0 <= chosen < len(self):
            raise IndexError(chosen)
        number = int(np.searchsorted(self._firsts, chosen, side="right")) - 1
        if number != self._number or self._part is None:
            self._part = self._open(number)
            self._number = number
        return self._part.item(chosen - int(self._firsts[number]))

    def _open(self, number: int) -> _Part:
        path, (count, digest) = part_path(self.folder, number), self.about.parts[number]
        try:
            if number not in self._checked:
                arrays = safetensors.numpy.load_file(path)
                if array_digest(arrays) != digest or len(arrays["segments"]) != count:
                    raise _damaged(path)
                self._checked.add(number)
            return _Part(path)
        except (FileNotFoundError, SafetensorError, KeyError, TypeError):
            raise _damaged(path) from None


class _Part:
    """One file, mapped into memory; where each sequence's segments and mask are."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, framework="numpy")
        lengths = self._file.get_tensor("segment_lengths")
        self._tokens = np.concatenate(([0], np.cumsum(lengths)))
        self._segments = np.concatenate(([0], np.cumsum(self._file.get_tensor("segments"))))
        self._speaks = self._file.get_tensor("speaks")
        self._masked = "keep" in list(self._file.keys())
        if self._masked:
            self._lengths = self._file.get_tensor("keep_lengths")
            self._bits = np.concatenate(([0], np.cumsum(np.maximum(self._lengths, 0))))

    def item(self, place: int) -> Item:
        rows = self._file.get_slice("tokens")
        edges = self._tokens[self._segments[place] : self._segments[place + 1] + 1]
        segments = tuple(rows[start:stop] for start, stop in itertools.pairwise(edges))
        return Item(segments, bool(self._speaks[place]), self._keep(place))

    def _keep(self, place: int) -> Keep | None:
        if not self._masked or self._lengths[place] < 0:
            return None
        first, last = int(self._bits[place]), int(self._bits[place + 1])
        bits = np.unpackbits(self._file.get_slice("keep")[first // 8 : -(-last // 8)])
        return bits[first % 8 :][: last - first].astype(np.bool_)


def _damaged(path: Path) -> StoreError:
    return StoreError(
        f"{path} is missing or damaged; move {path.parent} away and run the same command again, "
        "which reads the data again"
    )
