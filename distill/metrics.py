"""Where numbers of a run go: one JSON object per line in ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import TextIO

from teachers.store import write_whole


class MetricsFile:
    """Appends to ``metrics.jsonl``; each line is flushed, so a killed run keeps what it logged.

    On continuing a run from a checkpoint, lines after its step are dropped first: they will be written again;
    without one, all are. Without a path (all processes of a launch but the first) nothing is written.
    """

    def __init__(self, path: Path | None, from_step: int | None) -> None:
        self._file: TextIO | None = None
        if path is None:
            return
        kept = []
        if path.exists() and from_step is not None:
            kept = [line for line in path.read_text().splitlines() if 0 <= _step(line) <= from_step]
        write_whole(path, "".join(line + "\n" for line in kept).encode())
        self._file = path.open("a")

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Log the values of one step; a value that is not finite is written as null (JSON has no NaN)."""
        if self._file is None:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, **finite}) + "\n")
        self._file.flush()

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
