"""Which store has the tokens of some data already, by what can be told without reading either;
without PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.capture.data_folder import find_files
from distill.capture.row_parser import RowParser
from distill.config.schema import RunConfig
from distill.runs.folder import RUNS
from teachers.atomic_files import StoreError
from teachers.gguf.file import file_sha256
from teachers.store.manifest import SEQUENCES
from teachers.store.sequence_index import Index, read_index


@dataclass(frozen=True)
class StoreLocation:
    """A store's location: ``asked`` for, or ``beside``/stores, named after ``stem``."""

    asked: Path | None
    beside: Path
    stem: str

    @property
    def roots(self) -> list[Path]:
        """Folders of stores, where it is not asked for: the run's own first, then those in which an
        earlier run in this working directory may have made it."""
        return [root / "stores" for root in (self.beside, RUNS, Path())]

    @property
    def home(self) -> Path:
        """The folder in which processes agree on who reads the data."""
        return self.asked or self.roots[0]

    def candidates(self) -> Iterator[Path]:
        """Stores that may be it."""
        if self.asked is not None:
            yield self.asked
            return
        for root in dict.fromkeys(self.roots):
            yield from sorted(root.glob(f"{self.stem}-*"))


def find_sequences(place: StoreLocation, config: RunConfig) -> tuple[Path, Index] | None:
    """The folder of the sequences of this very data, and what is said of them, if a store has them.

    Raises:
        UserError: there is no such data. StoreError: the store that is asked for is damaged.
    """
    files: list[Path] | None = None
    for store in place.candidates():
        try:
            index = read_index(store / SEQUENCES)
        except StoreError:
            if place.asked is None:
                continue
            raise
        if index is None or index.request.get("settings") != data_settings(config):
            continue
        files = data_files(config) if files is None else files
        if _same_files(index.request.get("files"), files):
            return store / SEQUENCES, index
    return None


def known_vocabulary(place: StoreLocation, config: RunConfig) -> str:
    """The key of the vocabulary that was chosen for this data, if a store has its tokens."""
    found = find_sequences(place, config) if config.student.vocab is not None else None
    teacher = {} if found is None else found[1].request.get("teacher", {})
    return str(teacher.get("vocabulary", "")) if isinstance(teacher, dict) else ""


def data_settings(config: RunConfig) -> dict[str, Any]:
    """What decides, beside teacher and data, which sequences there are."""
    data = config.data.model_dump(mode="json", exclude={"path", "held_out"})
    return {"data": data, "seed": config.seed, "vocab": config.student.vocab}


def data_files(config: RunConfig) -> list[Path]:
    """The files of data; none where the teacher generates it."""
    if config.data.path is None:
        return []
    known = RowParser(config.data.columns).known.keys()
    return find_files(Path(config.data.path), config.data.split, known)[0]


def _same_files(stored: Any, files: list[Path]) -> bool:
    """Whether files are those that were read: by name and size, and by time or else contents."""
    if not isinstance(stored, list) or len(stored) != len(files):
        return False
    for known, file in zip(stored, files, strict=True):
        if not isinstance(known, dict) or not file.is_file():
            return False
        about = file.stat()
        if (known.get("name"), known.get("bytes")) != (file.name, about.st_size):
            return False
        if known.get("mtime_ns") != about.st_mtime_ns and known.get("sha256") != file_sha256(file):
            return False
    return True
