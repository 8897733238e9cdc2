"""What the guard, the probe and the weights' own figures say of a run: in words, as tables, and
as marks on charts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from textwrap import wrap
from typing import Any

from distill.reports import document
from distill.reports.document import Fact, Section, Table
from distill.reports.render import plotly as draw
from distill.runs.metrics_log import ABORT, CLIP, ROLLBACK, GuardEvent, Line, Metrics, names_of
from distill.runtime.format import MISSING, figure, number


@dataclass(frozen=True)
class Action:
    """Something that a guard does, in words for one and for several, and its mark on a chart.
    ``line``: a vertical line goes with it. What comes at the same step is larger or smaller, so
    that one mark does not hide the other.
    """

    one: str
    many: str
    symbol: str = "circle"
    colour: str = "@ink"
    size: int = 11
    line: bool = True


ACTIONS = {
    CLIP: Action(
        "step clipped harder", "steps clipped harder", "triangle-down", "@grey", line=False
    ),
    "skip_step": Action("step skipped", "steps skipped", "x", "@orange"),
    ROLLBACK: Action("rollback", "rollbacks", "triangle-left", "@purple", size=18),
    "set_aside": Action(
        "batch set aside", "batches set aside", "diamond", "@sky", size=7, line=False
    ),
    "checkpoint_refused": Action("checkpoint refused", "checkpoints refused", "cross", "@yellow"),
    ABORT: Action("training given up", "trainings given up", "square", "@red", size=14),
}
NAMED = 3
IN_TERMINAL, ON_PAGE = 20, 200  # rows of the log, the newest first
MOST_MARKS, MOST_LINES = 150, 60  # of one chart: marks of one kind, vertical lines
MOST_WORDS = 6  # lines of a mark's words
LITTLE, FELL = (
    0.5,
    0.25,
)  # information in nats that is something to lose, and the share of it that is little
LOST_RANK = 0.5  # a weight that ends with less than that share of the rank it began with


def guard_facts(metrics: Metrics, finished: bool) -> list[Fact]:
    """What the guard did and how that ended; nothing where there was none."""
    if not metrics.guarded:
        return []
    events = metrics.events
    if not events:
        return [
            Fact(
                "good",
                "The guard had nothing to do: no step was skipped or taken back, and no checkpoint "
                "refused.",
            )
        ]
    counts = Counter(event.action for event in events)
    words = "The guard acted: " + ", ".join(
        counted(action, count) for action, count in counts.items()
    )
    if metrics.undone:
        words += f" ({metrics.undone:,} step{'s' if metrics.undone > 1 else ''} taken back)"
    words += _whom(events) + "."
    if ABORT in counts:
        return [
            Fact(
                "warning",
                f"{words} It gave up at step {_last(events, ABORT).step:,}."
                f"{_quoted(events, ABORT)}",
            )
        ]
    if set(counts) == {CLIP}:
        return [Fact("plain", words)]
    last = next(event for event in reversed(events) if event.action != CLIP)
    after = len(
        [line for line in metrics.train if (line["step"] or 0) > (last.to_step or last.step)]
    )
    if finished:
        words += " Training recovered and came to its end."
    elif not metrics.train and not metrics.undone:
        words += " Not one step of training was taken."
    elif after:
        words += f" Training went on: {after:,} steps are logged after the last of these."
    else:
        words += " No step is logged after the last of these."
    return [Fact("warning", words)]


def health_facts(metrics: Metrics) -> list[Fact]:
    """What the probe and the weights' own figures say."""
    return [*_information(metrics.probe), *_rank_losses(metrics.weights)]


def guard_sections(events: Sequence[GuardEvent], undone: int, guarded: bool) -> list[Section]:
    """The guard's log, the newest first; nothing for a run without a guard."""
    if not guarded:
        return []
    if not events:
        return [Section("guard", "The guard", ["It watched every step and had nothing to do."])]
    counts = Counter(event.action for event in events)
    words = [", ".join(counted(action, count) for action, count in counts.items()) + "."]
    if undone:
        words.append(
            f"{undone:,} steps that were logged were taken back; no chart and no figure has them."
        )
    rows = [_row(event) for event in reversed(events[-ON_PAGE:])]
    note = "The newest first."
    if len(events) > ON_PAGE:
        note += f" The newest {ON_PAGE:,} of {len(events):,}; --json has all."
    head = ["step", "what", "signal", "value", "limit", "where", "words"]
    table = Table("Log", head, rows, note, wide=True, shown=IN_TERMINAL, spare=(2, 3, 4))
    return [Section("guard", "The guard", words, [table])]


def add_marks(figure: dict[str, Any], events: Sequence[GuardEvent], curve: document.Curve) -> int:
    """Put the events on a chart over steps: a mark on the curve, with words, and a vertical line
    for all but clips.

    Returns:
        How many traces that added to the figure.
    """
    traces = []
    for action in dict.fromkeys(event.action for event in events):
        some = [event for event in events if event.action == action]
        some = [some[place] for place in draw.thin_places(len(some), MOST_MARKS)]
        places = [
            (event, height) for event in some if (height := _height(curve, event.step)) is not None
        ]
        if places:
            traces.append(_marks(action, places))
    lines = [event for event in events if _action(event).line]
    figure["layout"]["shapes"] = [
        {
            "type": "line",
            "x0": event.step,
            "x1": event.step,
            "y0": 0,
            "y1": 1,
            "yref": "paper",
            "layer": "below",
        }
        | {"line": {"color": _action(event).colour, "width": 1, "dash": "dot"}}
        for event in (lines[place] for place in draw.thin_places(len(lines), MOST_LINES))
    ]
    if traces:
        figure["data"] += traces
        figure["layout"]["showlegend"] = True
    return len(traces)


def _marks(action: str, places: Sequence[tuple[GuardEvent, float]]) -> draw.Trace:
    """The marks of one action."""
    kind = ACTIONS.get(action, Action(action, action))
    line = {"width": 1, "color": "@ground"}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escape(kind.one, quote=False),
        "x": [event.step for event, _ in places],
        "y": [draw.short(height) for _, height in places],
        "text": [
            "<br>".join(escape(part, quote=False) for part in wrap(_said(event), 46)[:MOST_WORDS])
            for event, _ in places
        ],
        "marker": {"symbol": kind.symbol, "size": kind.size, "color": kind.colour, "line": line},
        "hovertemplate": "%{text}<extra></extra>",
        "cliponaxis": False,
    }


def _height(curve: document.Curve, step: int) -> float | None:
    """The curve's last known value up to a step; its first known one for an earlier step."""
    known = [(own, value) for own, value in zip(curve.steps, curve.values, strict=True) if value]
    before = [value for own, value in known if own <= step]
    return before[-1] if before else known[0][1] if known else None


def _action(event: GuardEvent) -> Action:
    return ACTIONS.get(event.action, Action(event.action, event.action))


def _said(event: GuardEvent) -> str:
    """An event in words."""
    words = f"{_action(event).one} at step {event.step:,}"
    if event.to_step is not None:
        words += f", back to step {event.to_step:,}"
    return f"{words}: {event.words}" if event.words else words


def _row(event: GuardEvent) -> list[str]:
    name = _action(event).one
    if event.to_step is not None:
        name += f" to step {event.to_step:,}"
    batch = "" if not event.batch else f"sequences {_some(event.batch)}"
    return [
        f"{event.step:,}",
        name,
        event.signal or MISSING,
        figure(event.value),
        figure(event.limit),
        "; ".join(part for part in (event.tensor, batch) if part) or MISSING,
        event.words,
    ]


def counted(action: str, count: int) -> str:
    """How often something was done, in words."""
    if action not in ACTIONS:
        return f"{count:,} × {action}"
    return f"{count:,} {ACTIONS[action].one if count == 1 else ACTIONS[action].many}"


def _whom(events: Sequence[GuardEvent]) -> str:
    """The tensors and sequences that events named most often."""
    tensors = Counter(event.tensor for event in events if event.tensor)
    batches = dict.fromkeys(one for event in events for one in event.batch or ())
    words = ""
    if tensors:
        words += f"; it named {', '.join(name for name, _ in tensors.most_common(NAMED))}"
        words += f" and {len(tensors) - NAMED:,} more tensors" if len(tensors) > NAMED else ""
    if batches:
        words += f"; the batches held sequences {_some(list(batches))}"
    return words


def _some(things: Sequence[int | str], limit: int = 6) -> str:
    more = f" and {len(things) - limit:,} more" if len(things) > limit else ""
    return ", ".join(str(one) for one in things[:limit]) + more


def _last(events: Sequence[GuardEvent], action: str) -> GuardEvent:
    return next(event for event in reversed(events) if event.action == action)


def _quoted(events: Sequence[GuardEvent], action: str) -> str:
    words = _last(events, action).words
    return f" Its words: {words}" if words else ""


def _information(lines: Sequence[Line]) -> list[Fact]:
    """Whether the student's distributions came to say less about where in the text they are."""
    # Rounding makes of none at all a little less than none.
    known = [max(0.0, value) for line in lines if (value := line.get("information")) is not None]
    if len(known) < 2:
        return []
    most, last = max(known), known[-1]
    words = f"from {number(known[0])} to {number(last)} nats, at most {number(most)}"
    if most > LITTLE and last < FELL * most:
        return [
            Fact(
                "warning",
                "What the next-token distribution says about its place in a fixed text fell: "
                f"{words}. At 0 the "
                "student says the same everywhere.",
            )
        ]
    return [
        Fact(
            "good",
            f"What the next-token distribution says about its place in a fixed text went {words}.",
        )
    ]


def _rank_losses(lines: Sequence[Line]) -> list[Fact]:
    """Whether a weight lost much of the rank that it began with."""
    lost, known = [], 0
    for name in names_of(lines, "rank:"):
        values = [value for line in lines if (value := line.get(f"rank:{name}")) is not None]
        if len(values) > 1 and values[0] > 0:
            known += 1
            if values[-1] < LOST_RANK * values[0]:
                lost.append((values[-1] / values[0], name))
    if not known:
        return []
    if not lost:
        return [
            Fact(
                "good",
                f"None of {known:,} matrices lost half of the effective rank that it began with.",
            )
        ]
    names = ", ".join(f"{name} ({share:.0%} left)" for share, name in sorted(lost)[:NAMED])
    more = f" and {len(lost) - NAMED:,} more" if len(lost) > NAMED else ""
    return [
        Fact(
            "warning",
            f"Effective rank fell to less than half of what it began with: {names}{more}.",
        )
    ]
