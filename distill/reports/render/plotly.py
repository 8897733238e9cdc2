"""How a report draws: Plotly figures in plain JSON, and what they are put together from.

Beside Plotly's ``data`` and ``layout`` a figure may have ``choices``: what a row of buttons above
it changes; or ``groups`` and ``combined``: several rows, and what each combination of pressed
buttons changes.

A colour is a name with an @ (``@blue``): the page puts in what suits its light or dark ground.
``@mix:0.3`` lies between its blue (0) and its orange (1). The colours are those of Okabe and Ito,
which remain apart for colour-blind readers; what belongs together also differs in its dashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill.reports.document import Curve
from distill.runs.metrics_log import Line, step_of

COLORS = ("@blue", "@orange", "@green", "@purple", "@sky", "@red", "@yellow", "@grey")
STEPS = {"title": {"text": "step"}, "rangemode": "tozero"}
Trace = dict[str, Any]


def figure(traces: list[Trace], axis: dict[str, Any]) -> dict[str, Any]:
    """Traces over steps, on a vertical axis like ``axis``."""
    layout: dict[str, Any] = {
        "xaxis": dict(STEPS),
        "yaxis": dict(axis),
        "showlegend": len(traces) > 1,
    }
    return {"data": traces, "layout": layout}


def log_axis(traces: list[Trace], title: str = "") -> dict[str, Any]:
    """A logarithmic axis that names no more values than fit one above the other."""
    known = [value for trace in traces for value in trace["y"] if value]
    span = max(known) / min(known) if known else 1.0
    ticks = (
        {"dtick": 1}
        if span < 1.01
        else {}
        if span < 10
        else {"dtick": "D2"}
        if span < 1e4
        else {"dtick": 1}
    )
    return {"type": "log", "tickformat": "~g", "title": {"text": title}, **ticks}


def trace(curve: Curve, **style: Any) -> Trace:
    """A curve in any style."""
    return {
        "type": "scatter",
        "x": curve.steps,
        "y": [short(value, 5) for value in curve.values],
        **style,
    }


def curve_of(lines: Sequence[Line], name: str, limit: int = 1000) -> Curve:
    """One figure of such lines as have it; at most ``limit`` of them, evenly spread."""
    there = [line for line in lines if name in line]
    there = [there[place] for place in thin_places(len(there), limit)]
    return Curve([step_of(line) for line in there], [short(line[name]) for line in there])


def plain_line(
    x: list[float], y: list[float], name: str, colour: str, dash: str = "solid"
) -> Trace:
    """A line over something else than steps."""
    line = {"color": colour, "dash": dash, "width": 2.0}
    return {"type": "scatter", "x": x, "y": y, "mode": "lines", "name": name, "line": line}


def line(curve: Curve, name: str, colour: str, dash: str = "solid", width: float = 2.0) -> Trace:
    """A curve as a line."""
    return trace(
        curve, name=name, mode="lines", line={"color": colour, "dash": dash, "width": width}
    )


def level(trace: Trace, value: float, name: str, dash: str) -> Trace:
    """A level line along a trace that is not empty."""
    return line(Curve([trace["x"][0], trace["x"][-1]], [value, value]), name, "@red", dash)


def mark(x: float, y: float, name: str) -> Trace:
    """One point that stands out, with its name beside it in the legend."""
    marker = {
        "symbol": "star",
        "size": 16,
        "color": "@red",
        "line": {"width": 1, "color": "@ground"},
    }
    return {
        "type": "scatter",
        "x": [x],
        "y": [y],
        "mode": "markers",
        "name": name,
        "marker": marker,
    }


def choice(label: str, data: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    """One button: what it changes in the traces and in the layout."""
    return {"label": label, "data": data, "layout": layout}


def short(value: float | None, digits: int = 4) -> float | None:
    """A figure with as many digits as a picture shows: a page holds tens of thousands."""
    return None if value is None else float(f"{value:.{digits}g}")


def heat_map(x: list[Any], y: list[str], z: list[list[float | None]], hover: str) -> Trace:
    """Cells ``z`` in rows ``y`` and columns ``x``; ``hover``: words with Plotly's %{x}, %{y} and
    %{z}."""
    bar = {"thickness": 12, "outlinewidth": 0, "tickfont": {"size": 12}, "xpad": 6}
    return {
        "type": "heatmap",
        "x": x,
        "y": y,
        "z": z,
        "colorscale": "@heat",
        "colorbar": bar,
        "hoverongaps": False,
        "hovertemplate": f"{hover}<extra></extra>",
    }


def heat_figure(trace: Trace, x_axis: dict[str, Any], y_title: str) -> dict[str, Any]:
    """A heat map with its first row on top."""
    axis = {
        "type": "category",
        "autorange": "reversed",
        "showgrid": False,
        "title": {"text": y_title},
    }
    layout = {
        "xaxis": {"showgrid": False, **x_axis},
        "yaxis": axis,
        "showlegend": False,
        "hovermode": "closest",
    }
    return {"data": [trace], "layout": layout}


def thin_places(number: int, limit: int) -> list[int]:
    """Places of at most ``limit`` of ``number`` things, evenly spread, both ends among them."""
    if number <= limit:
        return list(range(number))
    return sorted({round(step * (number - 1) / (limit - 1)) for step in range(limit)})
