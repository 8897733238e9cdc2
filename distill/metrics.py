"""Where numbers of a run go: one JSON object per line in ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType

from teachers.store import write_whole


class MetricsFile:
    """Appends to ``metrics.jsonl``; each line is flushed, so a killed run keeps what it logged.

    On continuing a run, lines at or after the step it continues from are dropped first: they will be
    written again.
    """

    def __init__(self, path: Path, from_step: int) -> None:
        kept = []
        if path.exists():
            lines = path.read_text().splitlines()
            kept = [line for line in lines if from_step > 0 and 0 <= _step(line) <= from_step]
        self.kept: list[dict[str, float | str]] = [json.loads(line) for line in kept]
        write_whole(path, "".join(line + "\n" for line in kept).encode())
        self._file = path.open("a")

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Log the values of one step; a value that is not finite is written as null (JSON has no NaN)."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, **finite}) + "\n")
        self._file.flush()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _step(line: str) -> int:
    """The step of one line, or −1 for a line that was cut off by a kill."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return -1
