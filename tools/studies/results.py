"""Rows of a study, trained seed by seed; their results are kept, and a rerun does what is
missing."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar


class StudyRow(Protocol):
    """One way of training that is compared with others."""

    @property
    def name(self) -> str:
        """What the table calls it."""

    def identity(self) -> dict[str, Any]:
        """What makes it another row than one of the same name, as JSON."""


Row = TypeVar("Row", bound=StudyRow, contravariant=True)


class Study(Protocol[Row]):
    """What all rows share."""

    def measure(self, row: Row, seed: int) -> dict[str, Any]:
        """Train one student; what came of it: ``kl`` and ``seconds``, or ``failed``."""


class Results:
    """Results as lines of a JSON file, or in memory alone; those of other settings are left
    there and not counted."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = settings
        self.lines: list[dict[str, Any]] = []
        if path is not None and path.exists():
            text = path.read_text(encoding="utf-8")
            read = [_json(line) for line in text.splitlines()]
            self.lines = [line for line in read if line.get("settings") == settings]
            if text and not text.endswith("\n"):  # cut off by a kill
                path.write_text(text + "\n", encoding="utf-8")

    def find(self, row: StudyRow, seed: int) -> dict[str, Any] | None:
        """The result of this very row, if it is there."""
        wanted = _identity(row, seed)
        fits = (
            line
            for line in self.lines
            if all(line.get(key) == value for key, value in wanted.items())
        )
        return next(fits, None)

    def add(self, row: StudyRow, seed: int, values: dict[str, Any]) -> dict[str, Any]:
        """Keep a result."""
        line = _identity(row, seed) | values | {"settings": self.settings}
        self.lines.append(line)
        self.write(line)
        return line

    def write(self, line: dict[str, Any]) -> None:
        """Append one line to the file, if there is one."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _identity(row: StudyRow, seed: int) -> dict[str, Any]:
    return {"row": row.name, "seed": seed, **row.identity()}


def _json(line: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return content if isinstance(content, dict) else {}


def run_missing(
    study: Study[Row],
    rows: Sequence[Row],
    seeds: Sequence[int],
    results: Results,
    say: Callable[[str], None],
) -> None:
    """Train what is missing, seed by seed: an interrupted job has compared all rows on the seeds
    it has done."""
    wanted = [(seed, row) for seed in seeds for row in rows]
    missing = [(seed, row) for seed, row in wanted if results.find(row, seed) is None]
    if len(missing) < len(wanted):
        say(f"{len(wanted) - len(missing)} of {len(wanted)} results are there already")
    for number, (seed, row) in enumerate(missing, 1):
        result = results.add(row, seed, study.measure(row, seed))
        told = result.get("failed") or f"KL {result['kl']:.4f}, {result['seconds']:.1f} s"
        say(f"{number}/{len(missing)}  seed {seed}  {row.name}: {told}")


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± standard deviation (least to greatest)."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return (
        f"{mean} ± {statistics.stdev(values):.{digits}f} "
        f"({min(values):.{digits}f}–{max(values):.{digits}f})"
    )
