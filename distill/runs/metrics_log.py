"""Where numbers of a run go: one JSON object per line in ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from distill.errors import UserError
from teachers.atomic_files import write_whole


class MetricsFile:
    """Appends to ``metrics.jsonl``; each line is flushed, so a killed run keeps what it logged.

    A run that resumes from a checkpoint first drops the lines written after it: all but ``lines``,
    or those of later steps if that is not known; without a checkpoint, all. Without a path (in all
    processes but the first) nothing is written.
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
        """Log one step's values; a non-finite number becomes null (JSON has no NaN)."""
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

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _step(line: str) -> int:
    """The step of one line, or −1 for a line that was cut off by a kill."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return -1


Line = dict[str, float | None]
"""The values of one line; ``None`` where one was not finite."""

LOSS_PARTS = ("kd", "ce", "hidden", "pet", "inertia", "non_commutation", "verification", "safety")
KNOWN = {
    "train": {
        *("loss", *LOSS_PARTS, "grad_norm", "learning_rate", "tokens_seen", "update_ratio"),
        *("clip_limit", "second_difference", "rotation_error", "min_commutator"),
        *("mean_commutator", "rotation_drift", "padding"),
    },
    "held_out": {"kl", "agreement", "cross_entropy", "sequences"},
    "weights": set[str](),
    "probe": {"information", "output_entropy"},
}
KNOWN_PREFIXES = {
    "train": (),
    "held_out": (),
    "weights": ("norm:", "spread:", "rank:"),
    "probe": ("hidden_rank:", "attention_entropy:", "dead_units:"),
}
ROLLBACK, ABORT, CLIP = "rollback", "abort", "clip"


@dataclass(frozen=True)
class HeldOutPoint:
    """Validation scores after ``step`` steps (see
    ``distill.training.validation.ValidationScore``), over so many ``sequences``: older runs do not
    say."""

    step: int
    kl: float | None
    agreement: float | None
    cross_entropy: float | None
    sequences: float | None = None


@dataclass(frozen=True)
class GuardEvent:
    """One guard action after ``step`` finished steps.

    ``action``: clip, skip_step, rollback, abort, set_aside, checkpoint_refused, or one of a newer
    program. ``signal``, ``tensor``, ``value``, ``limit``: what was seen, where, and its limit.
    ``to_step``: of a rollback. ``batch``: the sequences. ``undone``: logged steps that it undid.
    """

    step: int
    action: str
    signal: str | None = None
    tensor: str | None = None
    value: float | None = None
    limit: float | None = None
    to_step: int | None = None
    batch: tuple[int | str, ...] | None = None
    words: str = ""
    undone: int = 0


@dataclass
class Metrics:
    """The lines that count, by step; ``events`` in the order they happened in.

    ``undone``: logged training steps that were rolled back. ``cut_off``: the last line is partial.
    """

    train: list[Line] = field(default_factory=list)
    held_out: list[HeldOutPoint] = field(default_factory=list)
    weights: list[Line] = field(default_factory=list)
    probe: list[Line] = field(default_factory=list)
    events: list[GuardEvent] = field(default_factory=list)
    undone: int = 0
    cut_off: bool = False

    @property
    def guarded(self) -> bool:
        """Whether a guard watched, as far as the lines say."""
        updates = any("update_ratio" in line for line in self.train)
        return updates or bool(self.events or self.weights or self.probe)

    def take_back(self, after: int) -> int:
        """Drop everything of later steps; the number of steps of training among it."""
        before = len(self.train)
        for lines in (self.train, self.weights, self.probe):
            lines[:] = [line for line in lines if step_of(line) <= after]
        self.held_out[:] = [point for point in self.held_out if point.step <= after]
        undone = before - len(self.train)
        self.undone += undone
        return undone

    def add(self, content: dict[str, Any]) -> None:
        """Add one line's content; raises ``ValueError``, ``KeyError``, ``OverflowError`` if
        damaged."""
        kind = content.get("kind")
        if not isinstance(kind, str):
            raise ValueError("kind is not a text")
        if kind == "event":
            self._add_event(_event(content))
        elif kind in KNOWN:
            values = _figures(kind, content)
            step = step_of(values)
            if kind == "train":
                if self.train and step <= step_of(self.train[-1]):  # rolled back without an event
                    self.take_back(step - 1)
                self.train.append(values)
            elif kind == "held_out":
                while self.held_out and self.held_out[-1].step >= step:
                    self.held_out.pop()
                names = ("kl", "agreement", "cross_entropy", "sequences")
                self.held_out.append(HeldOutPoint(step, *map(values.get, names)))
            else:
                lines = self.weights if kind == "weights" else self.probe
                while lines and step_of(lines[-1]) >= step:
                    lines.pop()
                lines.append(values)

    def _add_event(self, event: GuardEvent) -> None:
        if event.action == ROLLBACK and event.to_step is not None:
            event = replace(event, undone=self.take_back(event.to_step))
        self.events.append(event)


def read_metrics(path: Path) -> Metrics:
    """Everything in the file, if there is one; ``UserError`` if a line but the last is damaged."""
    metrics = Metrics()
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return metrics
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            if not isinstance(content, dict):
                raise ValueError("not an object")
            metrics.add(content)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            if number < len(lines):
                raise UserError(f"{path} is damaged (line {number}: {error})") from None
            metrics.cut_off = True  # a killed process, or one that is writing it right now
    return metrics


def step_of(line: Line) -> int:
    """The step of a line."""
    return int(line["step"] or 0)


def names_of(lines: Iterable[Line], prefix: str) -> list[str]:
    """What stands behind ``prefix`` in any of the lines, in order of appearance."""
    names = dict.fromkeys(name for line in lines for name in line if name.startswith(prefix))
    return [name.removeprefix(prefix) for name in names]


def best_point(points: Iterable[HeldOutPoint]) -> HeldOutPoint | None:
    """The point with the lowest validation KL; the later one of equals."""
    known = [(point.kl, -point.step, point) for point in points if point.kl is not None]
    return min(known, key=lambda entry: entry[:2])[2] if known else None


def _figures(kind: str, content: dict[str, Any]) -> Line:
    """The numbers of a line, unknown fields of another type left out."""
    values: Line = {}
    for name, value in content.items():
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            values[name] = value if value is not None and math.isfinite(value) else None
        elif name == "step" or name in KNOWN[kind] or name.startswith(KNOWN_PREFIXES[kind]):
            raise ValueError(f"{name} is not a number")
    if values["step"] is None:
        raise ValueError("step is not a number")
    return values


def _event(content: dict[str, Any]) -> GuardEvent:
    batch = content.get("batch")
    if batch is not None and not (
        isinstance(batch, list) and all(type(one) in (int, str) for one in batch)
    ):
        raise ValueError("batch is not a list of numbers or names")
    step, action = _number(content, "step"), _text(content, "action")
    if step is None or action is None:
        raise ValueError("step or action is missing")
    to_step = _number(content, "to_step")
    return GuardEvent(
        step=int(step),
        action=action,
        signal=_text(content, "signal"),
        tensor=_text(content, "tensor"),
        value=_number(content, "value"),
        limit=_number(content, "limit"),
        to_step=None if to_step is None else int(to_step),
        batch=None if batch is None else tuple(batch),
        words=_text(content, "words") or "",
    )


def _text(content: dict[str, Any], name: str) -> str | None:
    value = content.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} is not a text")
    return value


def _number(content: dict[str, Any], name: str) -> float | None:
    value = content.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is not a number")
    return value if math.isfinite(value) else None


ROTATION_ERROR = 1e-5  # a rotation farther from orthogonal than that is none
