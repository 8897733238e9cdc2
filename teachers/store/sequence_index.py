"""What is known of token sequences on disk without looking at them; without PyTorch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from teachers.atomic_files import StoreError
from teachers.base import Keep, Sampling, Tokens

INDEX = "sequences.json"
FORMAT = 1


@dataclass(frozen=True)
class Item:
    """One sequence to be: forced segments, and whether the teacher writes after each of them.

    ``keep``: which predictions of a single segment's tokens are learnt (``None``: all); what the
    teacher writes after it is.
    """

    segments: tuple[Tokens, ...]
    speaks: bool
    keep: Keep | None = None


@dataclass
class Tally:
    """What is known of sequences without looking at them again.

    ``tokens``: of those that are only read; ``spoken``: how many the teacher writes, in part;
    ``unlearnt``: predictions that are not learnt; ``masked``: whether there are masks; ``varied``:
    whether at least two sequences begin otherwise; ``digest``: SHA-256 over everything that decides
    the sequences, and what is learnt of them.
    """

    sequences: int = 0
    tokens: int = 0
    spoken: int = 0
    unlearnt: int = 0
    masked: bool = False
    varied: bool = False
    digest: str = ""

    @classmethod
    def of(cls, items: Iterable[Item], sampling: Sampling) -> Tally:
        """Count sequences."""
        counting = Counting(sampling)
        for item in items:
            counting.add(item)
        return counting.tally()


class Counting:
    """Counts sequences one after another; ``sampling``: how the teacher writes them."""

    def __init__(self, sampling: Sampling) -> None:
        self._tally, self._first = Tally(), b""
        self._digest = hashlib.sha256(json.dumps(asdict(sampling), sort_keys=True).encode())

    def add(self, item: Item) -> None:
        """Count one more."""
        tally, digest, begin = self._tally, self._digest, item.segments[0].tobytes()
        self._first = self._first if tally.sequences else begin
        tally.varied = tally.varied or begin != self._first
        tally.sequences += 1
        tally.tokens += 0 if item.speaks else len(item.segments[0])
        tally.spoken += item.speaks
        digest.update(f"{item.speaks} {[len(part) for part in item.segments]}".encode())
        for part in item.segments:
            digest.update(part.tobytes())
        if item.keep is not None:
            tally.masked = True
            tally.unlearnt += int((~item.keep).sum())
            digest.update(b"keep" + item.keep.tobytes())

    def tally(self) -> Tally:
        """What was counted."""
        self._tally.digest = self._digest.hexdigest()
        return self._tally


@dataclass(frozen=True)
class Index:
    """What ``sequences.json`` says. ``request``: what was asked for, so that whoever asks for the
    same need not read the data again; ``parts``: sequences and SHA-256 of each file."""

    sampling: Sampling
    tally: Tally
    parts: list[tuple[int, str]]
    request: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_index(folder: Path) -> Index | None:
    """What is said of the sequences in a folder; ``None`` where there are none.

    Raises:
        StoreError: the file is damaged, or of another format.
    """
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise StoreError(
                f"{folder} has format {content['format']}, this version reads {FORMAT}; capture "
                "into another --store folder"
            )
        index = Index(
            Sampling(**content["sampling"]),
            Tally(**content["tally"]),
            [(int(count), str(digest)) for count, digest in content["parts"]],
            dict(content["request"]),
            [str(note) for note in content["notes"]],
            [str(warning) for warning in content["warnings"]],
        )
        if sum(count for count, _ in index.parts) != index.tally.sequences:
            raise ValueError("the parts do not add up")
        return index
    except (FileNotFoundError, NotADirectoryError):
        return None
    except StoreError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # ValueError: JSON, UTF-8
        raise StoreError(
            f"{folder / INDEX} is damaged ({error}); move {folder} away and run the same command "
            "again, which reads the data again"
        ) from None
