"""Charts of what goes on inside the student while it learns: its weights and the probe over
steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from distill.reports import document
from distill.reports.render import plotly as draw
from distill.reports.weights.charts import ratio_range
from distill.reports.weights.layers import Place, kinds_of, layers_of, places_of
from distill.runs.metrics_log import Line, names_of, step_of

WEIGHT_CELLS, PROBE_CELLS = 45_000, 18_000  # of all heat maps together: a page has room for so many
FEWEST_COLUMNS, WEIGHT_COLUMNS, PROBE_COLUMNS = 8, 30, 120
MOST_KINDS = 16
CATEGORIES = {
    "yaxis.type": "category",
    "yaxis.autorange": "reversed",
}  # forgotten when the rows' names change
WORST, OUTSIDE = "most changed", "outside the layers"
PROBES = (
    ("hidden_rank", "hidden rank", "directions that the hidden states use: %{z:.4g}"),
    ("attention_entropy", "attention entropy", "entropy of attention: %{z:.3g} nats"),
    ("dead_units", "dead units", "units that never act: %{z:.1%}"),
)


@dataclass(frozen=True)
class Measure:
    """A figure of weights over steps.

    ``ratio``: against its start, so that 1 is the middle; else a share of 1.
    """

    label: str
    prefix: str
    hover: str
    ratio: bool


def health_charts(
    weights: Sequence[Line], probe: Sequence[Line], full_ranks: Mapping[str, int]
) -> list[document.Chart]:
    """Everything that is known of the student's inside over steps."""
    result = [weights_over_time(weights, full_ranks), _information(probe), _inside(probe)]
    return [chart for chart in result if chart.figure["data"]]


def weights_over_time(lines: Sequence[Line], full_ranks: Mapping[str, int]) -> document.Chart:
    """Layers over steps: a row of buttons for the figure, another for the kind of weight."""
    title, key = "Weights over time", "weights-over-time"
    figures = sum(name != "step" for name in lines[0]) if lines else 0
    lines = _columns(lines, WEIGHT_CELLS // max(1, figures), WEIGHT_COLUMNS)
    steps = [step_of(line) for line in lines]
    places = places_of(dict.fromkeys(names_of(lines, "norm:") + names_of(lines, "rank:")))
    shares = bool(full_ranks)
    measures = (
        Measure("norm against its start", "norm:", "norm %{z:.3g} times that of its start", True),
        Measure(
            "spread against its start", "spread:", "spread %{z:.3g} times that of its start", True
        ),
        Measure(
            "effective rank, share of full" if shares else "effective rank against its start",
            "rank:",
            "effective rank %{z:.1%} of the full one"
            if shares
            else "rank %{z:.3g} times that of its start",
            not shares,
        ),
    )
    values = [
        {
            name: _values(lines, one.prefix, name, full_ranks if not one.ratio else None)
            for name in places
        }
        for one in measures
    ]
    used = [place for place, some in enumerate(values) if any(_known(some.values()))]
    if not used or not places:
        return document.Chart(key, title, "", {"data": [], "layout": {}})
    groups = _groups(places)
    combined = {}
    for button, place in enumerate(used):
        for number, (kind, names) in enumerate(groups.items()):
            combined[f"{button},{number}"] = _pressed(
                measures[place], values[place], kind, names, places
            )
    first = combined["0,0"]["data"]
    trace = draw.heat_map(steps, first["y"][0], first["z"][0], "")
    figure = draw.heat_figure(trace, draw.STEPS | {"rangemode": "normal"}, "layer")
    figure["groups"] = [[measures[place].label for place in used], list(groups)]
    figure["combined"] = combined
    words = (
        "Blue: it shrank; orange: it grew. A row that changes in a few steps, unlike its "
        "neighbours, is worth a look. "
        f"“{WORST}” takes, of each layer, the weight that is farthest from its start (or has the "
        "lowest rank)."
    )
    return document.Chart(key, title, words, figure, wide=True)


def _groups(places: Mapping[str, Place]) -> dict[str, list[str]]:
    """Names behind each button: all in layers, each kind, and those in no layer."""
    kinds = kinds_of(places.values())[:MOST_KINDS]
    inside = [name for name, place in places.items() if place.layer is not None]
    groups = {WORST: inside} if inside else {}
    for kind in kinds:
        groups[kind] = [name for name in inside if places[name].kind == kind]
    outside = [name for name, place in places.items() if place.layer is None]
    return groups | ({OUTSIDE: outside} if outside else {})


def _pressed(
    measure: Measure,
    values: Mapping[str, list[float | None]],
    kind: str,
    names: Sequence[str],
    places: Mapping[str, Place],
) -> dict[str, Any]:
    """What one combination of buttons changes."""
    rows: dict[str, list[list[float | None]]] = {}
    for name in names:
        layer = places[name].layer
        label = escape(name.removesuffix(".weight"), quote=False) if layer is None else str(layer)
        rows.setdefault(label, []).append(values[name])
    order = (
        list(rows)
        if kind == OUTSIDE
        else [str(layer) for layer in layers_of(places[name] for name in names)]
    )
    choose = _farthest if measure.ratio else _lowest
    order = [label for label in order if _known(rows[label])] or order
    z = [[choose(column) for column in zip(*rows[label], strict=True)] for label in order]
    known = _known(z)
    low, high = ratio_range(known or [1.0]) if measure.ratio else (min(known, default=0.0), 1.0)
    where = "%{y}" if kind == OUTSIDE else f"layer %{{y}}, {escape(kind, quote=False)}"
    data = {
        "z": [[[draw.short(value, 3) for value in row] for row in z]],
        "y": [order],
        "zmin": [low],
        "zmax": [high],
        "colorscale": ["@change" if measure.ratio else "@deep"],
        "hovertemplate": [f"{where}, step %{{x}}<br>{measure.hover}<extra></extra>"],
        "colorbar.tickformat": [".0%"],
    }
    missing = {
        "text": "not known for these weights",
        "showarrow": False,
        "xref": "paper",
        "yref": "paper",
    }
    layout = {
        **CATEGORIES,
        "yaxis.title.text": "" if kind == OUTSIDE else "layer",
        "annotations": [] if known else [missing],
    }
    return {"data": data, "layout": layout}


def _values(
    lines: Sequence[Line], prefix: str, name: str, full_ranks: Mapping[str, int] | None
) -> list[float | None]:
    """One weight's figure at each step, over the full rank where these are given and over its
    start where not."""
    column = [line.get(prefix + name) for line in lines]
    if full_ranks is not None:
        whole: float | None = full_ranks.get(name)
    else:
        whole = next((value for value in column if value is not None), None)
    return [None if value is None or not whole else value / whole for value in column]


def _columns(lines: Sequence[Line], fit: int, most: int) -> list[Line]:
    """As many of the lines, evenly spread, as fit and can be told apart."""
    places = draw.thin_places(len(lines), min(most, max(FEWEST_COLUMNS, fit)))
    return [lines[place] for place in places]


def _farthest(column: Sequence[float | None]) -> float | None:
    known = [value for value in column if value is not None]
    return max(
        known, key=lambda value: max(value, 1.0 / value if value else float("inf")), default=None
    )


def _lowest(column: Sequence[float | None]) -> float | None:
    return min((value for value in column if value is not None), default=None)


def _known(rows: Any) -> list[float]:
    return [value for row in rows for value in row if value is not None]


def _information(lines: Sequence[Line]) -> document.Chart:
    """What the next-token distributions say, and how open they are."""
    traces = []
    for name, label, colour, dash in (
        ("information", "information", "@blue", "solid"),
        ("output_entropy", "entropy", "@orange", "dash"),
    ):
        curve = draw.curve_of(lines, name)
        if curve.steps:
            traces.append(draw.line(curve, label, colour, dash))
    words = (
        "Of the next-token distributions on a fixed text. Information: what they say about "
        "their place in it, 0 "
    )
    words += (
        "for a student that says the same everywhere. Entropy: how undecided they are on average."
    )
    axis = {"title": {"text": "nats"}, "rangemode": "tozero"}
    return document.Chart(
        "probe", "Information and entropy", words, draw.figure(traces, axis), wide=True
    )


def _inside(lines: Sequence[Line]) -> document.Chart:
    """Layers over steps, as the probe saw them; a button for each figure."""
    title, key = "Inside the student", "probe-layers"
    lines = _columns(lines, PROBE_CELLS // max(1, len(lines[0]) if lines else 0), PROBE_COLUMNS)
    steps, choices = [step_of(line) for line in lines], []
    for prefix, label, hover in PROBES:
        names = names_of(lines, f"{prefix}:")
        if not names:
            continue
        z = [[draw.short(line.get(f"{prefix}:{name}"), 3) for line in lines] for name in names]
        result = places_of(names)
        labels = [
            escape(name, quote=False) if result[name].layer is None else str(result[name].layer)
            for name in names
        ]
        if len(set(labels)) < len(labels):
            labels = [escape(name, quote=False) for name in names]
        known = _known(z)
        low, high = (
            (0.0, 1.0)
            if prefix == "dead_units"
            else (min(known, default=0.0), max(known, default=1.0))
        )
        data = {
            "z": [z],
            "y": [labels],
            "zmin": [low],
            "zmax": [high if high > low else low + 1.0],
            "hovertemplate": [f"layer %{{y}}, step %{{x}}<br>{hover}<extra></extra>"],
            "colorbar.tickformat": [".0%" if prefix == "dead_units" else ".3~g"],
        }
        choices.append(draw.choice(label, data, dict(CATEGORIES)))
    if not choices:
        return document.Chart(key, title, "", {"data": [], "layout": {}})
    first = choices[0]["data"]
    trace = draw.heat_map(steps, first["y"][0], first["z"][0], "") | {"colorscale": "@deep"}
    figure = draw.heat_figure(trace, draw.STEPS | {"rangemode": "normal"}, "layer")
    figure["choices"] = choices
    words = (
        "On the same fixed text. Hidden rank: how many directions a layer's outputs use; one "
        "that falls to a few "
    )
    words += "has collapsed. Dead units: the share of a layer's units that never act."
    return document.Chart(key, title, words, figure, wide=True)
