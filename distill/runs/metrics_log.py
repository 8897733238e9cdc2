"""Where numbers of a run go: one JSON object per line in ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from distill.errors import UserError
from teachers.atomic_files import write_whole


class MetricsFile:
    """Appends to ``metrics.jsonl``; each line is flushed, so a killed run keeps what it logged.

    On continuing a run from a checkpoint, lines that were written after it are dropped first: they
    will be written again; without one, all are. ``lines``: how many there were when the checkpoint
    was saved; where that is not known, those of later steps are dropped. Without a path (all
    processes of a launch but the first) nothing is written.
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
        """Log the values of one step; a number that is not finite is written as null (JSON has
        no NaN)."""
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
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()


def _step(line: str) -> int:
    """The step of one line, or −1 for a line that was cut off by a kill."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return -1


Line = dict[str, float | None]
"""The figures of one line; ``None`` where a value was not finite."""

LOSS_PARTS = ("kd", "ce", "hidden", "pet", "inertia", "non_commutation", "verification", "safety")
KNOWN = {
    "train": {
        *(
            "loss",
            *LOSS_PARTS,
            "grad_norm",
            "learning_rate",
            "tokens_seen",
            "update_ratio",
            "clip_limit",
        ),
        *(
            "second_difference",
            "rotation_error",
            "min_commutator",
            "mean_commutator",
            "rotation_drift",
        ),
    },
    "held_out": {"kl", "agreement", "cross_entropy"},
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
    """Held-out figures after ``step`` steps (see ``distill.training.validation.HeldOutScore``)."""

    step: int
    kl: float | None
    agreement: float | None
    cross_entropy: float | None


@dataclass(frozen=True)
class GuardEvent:
    """One thing that the guard did after ``step`` finished steps.

    ``action``: clip, skip_step, rollback, abort, set_aside, checkpoint_refused, or what a newer
    program calls it. ``signal``, ``tensor``, ``value``, ``limit``: what was seen, where, and what
    it should not have passed. ``to_step``: where a rollback went. ``batch``: numbers or names of
    the sequences. ``undone``: logged steps that it took back.
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
    """The lines that count, each kind in order of steps; ``events`` in the order they happened in.

    ``undone``: logged steps of training that were taken back and came again, or were lost by it.
    ``cut_off``: the last line was not written to its end.
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
        return bool(
            self.events
            or self.weights
            or self.probe
            or any("update_ratio" in line for line in self.train)
        )

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
        """Put one line's content where it belongs.

        Raises:
            ValueError, KeyError, OverflowError: it is damaged.
        """
        kind = content.get("kind")
        if not isinstance(kind, str):
            raise ValueError("kind is not a text")
        if kind == "event":
            self._add_event(_event(content))
        elif kind in KNOWN:
            values = _figures(kind, content)
            step = step_of(values)
            if kind == "train":
                if self.train and step <= step_of(
                    self.train[-1]
                ):  # taken back, though no event says so
                    self.take_back(step - 1)
                self.train.append(values)
            elif kind == "held_out":
                while self.held_out and self.held_out[-1].step >= step:
                    self.held_out.pop()
                self.held_out.append(_held_out(values))
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
    """Everything in the file; nothing where there is none.

    Raises:
        UserError: a line other than the last is damaged.
    """
    found = Metrics()
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return found
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            if not isinstance(content, dict):
                raise ValueError("not an object")
            found.add(content)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            if number < len(lines):
                raise UserError(f"{path} is damaged (line {number}: {error})") from None
            found.cut_off = True  # a killed process, or one that is writing it right now
    return found


def step_of(line: Line) -> int:
    """The step of a line."""
    return int(line["step"] or 0)


def names_of(lines: Iterable[Line], prefix: str) -> list[str]:
    """What stands behind ``prefix`` in any of the lines, in order of appearance."""
    names = dict.fromkeys(name for line in lines for name in line if name.startswith(prefix))
    return [name.removeprefix(prefix) for name in names]


def best_point(points: Iterable[HeldOutPoint]) -> HeldOutPoint | None:
    """The point with the lowest held-out KL; the later one of equals."""
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


def _held_out(values: Line) -> HeldOutPoint:
    return HeldOutPoint(
        step_of(values), values.get("kl"), values.get("agreement"), values.get("cross_entropy")
    )


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
