"""Where numbers of a run go: one JSON object per line in ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from teachers.files import write_whole


class MetricsFile:
    """Appends to ``metrics.jsonl``; each line is flushed, so a killed run keeps what it logged.

    On continuing a run from a checkpoint, lines that were written after it are dropped first: they will be written
    again; without one, all are. ``lines``: how many there were when the checkpoint was saved; where that is not known,
    those of later steps are dropped. Without a path (all processes of a launch but the first) nothing is written.
    """

    def __init__(self, path: Path | None, from_step: int | None, lines: int | None = None) -> None:
        self._file: TextIO | None = None
        self.lines = 0
        if path is None:
            return
        kept = []
        if path.exists() and from_step is not None:
            whole = [line for line in path.read_text().splitlines() if _step(line) >= 0]
            kept = whole[:lines] if lines else [line for line in whole if _step(line) <= from_step]
        write_whole(path, "".join(line + "\n" for line in kept).encode())
        self._file = path.open("a")
        self.lines = len(kept)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Log the values of one step; a number that is not finite is written as null (JSON has no NaN)."""
        if self._file is None:
            return
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._file.write(json.dumps({"kind": kind, "step": step, **finite}) + "\n")
        self._file.flush()
        self.lines += 1

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def _step(line: str) -> int:
    """The step of one line, or −1 for a line that was cut off by a kill."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return -1
