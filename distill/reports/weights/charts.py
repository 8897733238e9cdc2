"""Charts of weights by themselves: every matrix's spectrum, and one figure per layer and kind of
weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median
from typing import Any

from distill.reports import document
from distill.reports.render import plotly as draw
from distill.reports.weights.comparison import WeightsComparison
from distill.reports.weights.layers import kinds_of, layers_of
from distill.reports.weights.report import MeasuredTensor, WeightsReport
from distill.runtime.format import number

MOST_LINES = 600  # spectra on one page
MANY_LINES = 200  # from which on each has half the points
MOST_KINDS = 24  # buttons
NOT_DRAWN = 1e-4  # of the largest singular value; what is smaller would stretch the axis
MOST_LAYERS_NAMED = 8  # in a legend
OUTSIDE = "outside the layers"


@dataclass(frozen=True)
class Measure:
    """A figure of a tensor, as a button of a heat map. ``ratio``: coloured around 1;
    ``over_median``: divided by the median of its kind first, and ``hover`` may show the figure
    itself as %{text}."""

    label: str
    hover: str
    value: Callable[[MeasuredTensor], float | None]
    ratio: bool = False
    over_median: bool = False


def _stable_rank(one: MeasuredTensor) -> float | None:
    return None if one.figures.spectrum is None else one.figures.spectrum.stable_rank


MEASURES = (
    Measure(
        "norm", "norm %{text}, %{z:.3g} × the median", lambda one: one.figures.norm, True, True
    ),
    Measure(
        "spread",
        "spread %{text}, %{z:.3g} × the median",
        lambda one: one.figures.spread,
        True,
        True,
    ),
    Measure(
        "effective rank", "effective rank %{z:.1%} of the full one", lambda one: one.rank_share
    ),
    Measure("stable rank", "stable rank %{z:.3g}", lambda one: _stable_rank(one)),
    Measure("heavy-tail exponent", "heavy-tail exponent %{z:.3g}", lambda one: one.alpha),
)


def weight_charts(report: WeightsReport) -> dict[str, list[document.Chart]]:
    """The charts of a file of weights."""
    result = [spectra("spectra", report.tensors), by_layer("by-layer", report.tensors)]
    return {"weights": [chart for chart in result if chart.figure["data"]]}


def weight_comparison_charts(comparison: WeightsComparison) -> dict[str, list[document.Chart]]:
    """How far each tensor of two files is apart, by layer and kind."""
    pairs = {one.name: one for one in comparison.pairs}
    measures = [
        Measure(
            "norm, B over A",
            "norm in B %{z:.3g} × that in A",
            lambda one: pairs[one.name].norm_ratio,
            True,
        ),
        Measure(
            "effective rank, B over A",
            "%{z:.3g} × that in A",
            lambda one: pairs[one.name].rank_ratio,
            True,
        ),
    ]
    if any(one.distance is not None for one in comparison.pairs):
        hover = "apart by %{z:.3g} × its norm in A"
        measures.append(Measure("distance", hover, lambda one: pairs[one.name].distance))
    words = "A cell is one kind of weight in one layer. Blue: smaller in B; orange: larger."
    chart = _layers(
        "pairs", "B against A", words, [one.first for one in comparison.pairs], measures
    )
    return {"pairs": [chart] if chart.figure["data"] else []}


def spectra(key: str, tensors: Sequence[MeasuredTensor]) -> document.Chart:
    """Singular values over their rank, both logarithmic; a button for each kind of weight."""
    groups = _kinds(tensors)
    shown = [one for some in groups.values() for one in some]
    thin = 2 if len(shown) > MANY_LINES else 1
    layers = layers_of(one.place for one in shown)
    traces = [_spectrum(one, layers, len(layers) <= MOST_LAYERS_NAMED, thin) for one in shown]
    kinds = [kind for kind, some in groups.items() for _ in some]
    for trace, kind in zip(traces, kinds, strict=True):
        trace["visible"] = kind == kinds[0]
    figure = draw.figure(traces, draw.log_axis(traces, "singular value"))
    figure["layout"] |= {"hovermode": "closest", "showlegend": len(layers) <= MOST_LAYERS_NAMED}
    figure["layout"]["xaxis"] = {"type": "log", "title": {"text": "rank"}, "dtick": 1}
    figure["choices"] = [
        draw.choice(
            kind,
            {"visible": [own == kind for own in kinds]},
            {"xaxis.autorange": True, "yaxis.autorange": True},
        )
        for kind in groups
    ]
    words = (
        "A line that falls steeply is a matrix that uses few directions; below a "
        "ten-thousandth it is not drawn. "
    )
    words += (
        "Blue: the first layer; orange: the last."
        if len(layers) > 1
        else "One line for each matrix."
    )
    return document.Chart(key, "Spectra of the matrices", words, figure, wide=True)


def by_layer(key: str, tensors: Sequence[MeasuredTensor]) -> document.Chart:
    """A heat map of layers and kinds, with a button for each figure."""
    words = (
        "A cell is one kind of weight in one layer; one that stands out from its column is worth a "
        "look. Norm and "
        "spread are shown against the median of their kind: blue is smaller, orange larger."
    )
    return _layers(key, "Layer by layer", words, tensors, MEASURES)


def _layers(
    key: str,
    title: str,
    words: str,
    tensors: Sequence[MeasuredTensor],
    measures: Sequence[Measure],
) -> document.Chart:
    """A heat map of layers (rows) and kinds (columns), with a button for each measure that is
    known."""
    layers, kinds = (
        layers_of(one.place for one in tensors),
        kinds_of(one.place for one in tensors)[:MOST_KINDS],
    )
    places = {(one.place.layer, one.place.kind): one for one in tensors}
    choices = []
    for measure in measures:
        rows = [
            [
                measure.value(places[layer, kind]) if (layer, kind) in places else None
                for kind in kinds
            ]
            for layer in layers
        ]
        if any(value is not None for row in rows for value in row):
            choices.append(draw.choice(measure.label, _cells(measure, rows), {}))
    if not choices:
        return document.Chart(key, title, words, {"data": [], "layout": {}})
    labels = [escape(kind, quote=False) for kind in kinds]
    trace = draw.heat_map(labels, [str(layer) for layer in layers], choices[0]["data"]["z"][0], "")
    trace |= {"xgap": 2, "ygap": 2 if len(layers) <= 16 else 1}
    figure = draw.heat_figure(trace, {"tickangle": -40, "type": "category"}, "layer")
    figure["choices"] = choices
    return document.Chart(key, title, words, figure, wide=True)


def _cells(measure: Measure, rows: list[list[float | None]]) -> dict[str, Any]:
    """What a button of a heat map changes in its trace."""
    text = [["" if value is None else number(value) for value in row] for row in rows]
    if measure.over_median:
        rows = _over_medians(rows)
    rows = [[draw.short(value) for value in row] for row in rows]
    known = [value for row in rows for value in row if value is not None] or [1.0]
    low, high = ratio_range(known) if measure.ratio else (min(known), max(known))
    return {
        "z": [rows],
        "text": [text],
        "zmin": [low],
        "zmax": [high if high > low else low + 1.0],
        "colorscale": ["@change" if measure.ratio else "@deep"],
        "hovertemplate": [f"layer %{{y}}, %{{x}}: {measure.hover}<extra></extra>"],
        "colorbar.tickformat": [".0%" if "%}" in measure.hover else ".3~g"],
    }


def _over_medians(rows: list[list[float | None]]) -> list[list[float | None]]:
    """Each value over the median of its column; a column around 0 has no ratios."""
    result = [
        median([value for value in column if value is not None] or [0.0])
        for column in zip(*rows, strict=True)
    ]
    return [
        [
            value / result[place] if value is not None and result[place] else None
            for place, value in enumerate(row)
        ]
        for row in rows
    ]


def ratio_range(known: Sequence[float]) -> tuple[float, float]:
    """A range of colours for ratios, with 1 in its middle: not under 5 % to either side, nor
    over 100 %."""
    reach = min(1.0, max(0.05, max(abs(value - 1.0) for value in known)))
    return 1.0 - reach, 1.0 + reach


def _kinds(tensors: Sequence[MeasuredTensor]) -> dict[str, list[MeasuredTensor]]:
    """Matrices by kind, those in no layer last; of very many only some layers of each."""
    matrices = [
        one
        for one in tensors
        if one.figures.spectrum is not None and one.figures.spectrum.spectral_norm
    ]
    kinds = kinds_of(one.place for one in matrices)[:MOST_KINDS]
    groups = {
        kind: [one for one in matrices if one.place.layer is not None and one.place.kind == kind]
        for kind in kinds
    }
    outside = [one for one in matrices if one.place.layer is None]
    if outside:
        groups[OUTSIDE] = outside
    limit = max(2, MOST_LINES // max(1, len(groups)))
    return {
        kind: [some[place] for place in draw.thin_places(len(some), limit)]
        for kind, some in groups.items()
    }


def _spectrum(one: MeasuredTensor, layers: list[int], legend: bool, thin: int) -> draw.Trace:
    """One matrix's line."""
    spectrum, layer = one.figures.spectrum, one.place.layer
    assert spectrum is not None
    points = [
        (rank, draw.short(value))
        for rank, value in zip(spectrum.ranks[::thin], spectrum.values[::thin], strict=True)
        if value > NOT_DRAWN * spectrum.spectral_norm
    ]
    mix = 0.0 if layer is None or len(layers) < 2 else layers.index(layer) / (len(layers) - 1)
    label = escape(one.name if layer is None else f"layer {layer}", quote=False)
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [rank for rank, _ in points],
        "y": [value for _, value in points],
        "name": label,
        "showlegend": legend,
        "line": {"color": f"@mix:{mix:.3f}", "width": 1.5},
        "hovertemplate": f"{label}<br>value %{{x}}: %{{y:.3g}}<extra></extra>",
    }
