"""The rows of the data: checked as a whole before anything is made of them, then read anew each
time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from distill.capture.data_files import NOBODY, TEXT_SUFFIXES, Listener, rows, suffix_of
from distill.capture.data_folder import find_files
from distill.capture.file_text import TextFile
from distill.capture.row_parser import RowParser
from distill.config.sources import DataConfig
from distill.errors import UserError
from teachers.base import Progress, no_progress
from teachers.tokenizer.rows import Document, Row


class Rows(Protocol):
    """Rows of data, which are read anew each time."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Row]: ...


@dataclass(frozen=True)
class DataRows:
    """What the data's files hold, in order; ``notes``: what was left out."""

    rows: Rows
    notes: list[str] = field(default_factory=list)

    @cached_property
    def kinds(self) -> RowKinds:
        """What there is among the rows."""
        return self.rows.kinds if isinstance(self.rows, FileRows) else RowKinds.of(self.rows)


@dataclass
class RowKinds:
    """How many rows are texts, how many have tools and documents, by whether they have tools
    (``True``) or not, and the place of the first one with tool calls."""

    rows: int = 0
    texts: int = 0
    tools: Counter[bool] = field(default_factory=Counter)
    documents: Counter[bool] = field(default_factory=Counter)
    calls: dict[bool, str] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Iterable[Row]) -> RowKinds:
        """Count rows."""
        kinds = cls()
        for row in rows:
            kinds.add(row)
        return kinds

    def add(self, row: Row) -> None:
        """Count one more."""
        self.rows += 1
        if isinstance(row, Document):
            self.texts += 1
            return
        tools = bool(row.tools)
        self.tools[tools] += tools
        self.documents[tools] += bool(row.documents)
        if any("tool_calls" in message for message in row.messages):
            self.calls.setdefault(tools, row.where)


class FileRows:
    """The rows of some files, parsed anew each time: large data is never in memory as a whole."""

    def __init__(self, files: list[Path], config: DataConfig) -> None:
        self.files, self._config = files, config
        self._texts = {file: TextFile(file, "data file") for file in files if _is_text(file)}
        self.kinds = RowKinds()

    def __len__(self) -> int:
        return self.kinds.rows

    def __iter__(self) -> Iterator[Row]:
        parser = RowParser(self._config.columns)
        for file in self.files:
            yield from self._rows(file, parser, NOBODY)

    def check(self, parser: RowParser, notes: list[str], progress: Progress) -> None:
        """Read all of it, for what is wrong anywhere, and count its rows.

        Raises:
            UserError: unusable data, with file and line.
        """
        sizes = [file.stat().st_size if file.is_file() else 0 for file in self.files]
        for number, file in enumerate(self.files):
            before, size, whole = sum(sizes[:number]), sizes[number], max(1, sum(sizes))
            tell = part_of(progress, before / whole, size / whole)
            if file in self._texts:
                filled = False
                for part in self._texts[file].read(tell):
                    filled = filled or bool(part.strip())
                self.kinds.add(Document(self._texts[file], str(file)))
            else:
                seen: list[bool] = []
                listener = Listener(parser.count_unused, notes.append, tell)
                for row in self._rows(file, parser, listener, seen):
                    self.kinds.add(row)
                filled = bool(seen)
            if not filled:
                raise UserError(f"data file {file} is empty; remove it or fill it")

    def _rows(
        self, file: Path, parser: RowParser, listener: Listener, seen: list[bool] | None = None
    ) -> Iterator[Row]:
        """The rows of one file; ``seen`` gets an entry if there is any, also one left out."""
        if file in self._texts:
            yield Document(self._texts[file], str(file))
            return
        # In a folder the files are the splits.
        split = self._config.split if Path(self._config.path or "").is_file() else None
        for where, value in rows(file, parser.known.keys(), split=split, listener=listener):
            if seen is not None and not seen:
                seen.append(True)
            if (row := parser.parse(value, where)) is not None:
                yield row


def _is_text(file: Path) -> bool:
    return suffix_of(file) in TEXT_SUFFIXES


def read_rows(config: DataConfig, progress: Progress = no_progress) -> DataRows | None:
    """The data in its files; ``None`` if the teacher generates it. ``progress``: the share of their
    bytes that is read.

    Raises:
        UserError: unusable data, with file and line; or a teacher that generates one text only.
    """
    if config.path is None:
        if config.sampling_temperature == 0.0:
            raise UserError(
                "data.sampling_temperature=0 lets the teacher say one thing only; give --data or "
                "raise it"
            )
        return None
    parser = RowParser(config.columns)
    files, notes = find_files(Path(config.path), config.split, parser.known.keys())
    found = FileRows(files, config)
    found.check(parser, notes, progress)
    notes += parser.finish(len(found) > 0, f"data {config.path}")
    if parser.unlearnt:
        anyhow = "learnt all the same, as data.train_on = 'all'"
        notes.append(
            f"{parser.unlearnt:,} messages of the assistant whose weight is 0, or train, training "
            f"or loss false, are {anyhow if config.train_on == 'all' else 'not learnt'}"
        )
    return DataRows(found, notes)


def part_of(progress: Progress, before: float, part: float) -> Progress:
    """Progress of a ``part`` of the work, behind that which comes ``before``."""
    return lambda share: progress(before + share * part)
