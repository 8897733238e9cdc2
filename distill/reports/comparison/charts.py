"""The charts of a comparison's page.

Over 400 lines because every chart of the page is a short function here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from math import log10
from typing import Any

from distill.evaluation.pareto import fidelity_of, kl_of, size_front, speed_front
from distill.evaluation.records import Comparison, ModelEvaluation
from distill.metrics.intervals import Figure
from distill.reports import document
from distill.reports.comparison.sections import harness_figure, harness_rows
from distill.reports.render import plotly as draw
from distill.runtime.format import human_bytes
from students.model.head_decisions import DECISIONS

LABEL_LENGTH = 18  # letters of a model's name in a chart
LOG_SPAN = 3.0  # from so many times on an axis is logarithmic
MARGIN = 0.08  # of an axis left free at either end, for labels
LETTER, LINE = (
    0.021,
    0.06,
)  # of a narrow chart's width and height that a label's letter and line take, about
MOST_TASKS = 8  # of lm-evaluation-harness in the chart; the table has all
TEACHER_LINE = {"color": "@grey", "dash": "dash", "width": 2}


def charts(comparison: Comparison) -> dict[str, list[document.Chart]]:
    """The charts of each section; those without data are left out."""
    everyone = [comparison.teacher, *comparison.students]
    result = {
        "trade": [_size(comparison), _speed(comparison)],
        "fidelity": [_agreement(comparison.students), _divergence(comparison.students)],
        "text": [_perplexity(comparison)],
    }
    if any(model.task for model in everyone):
        result["tasks"] = [_tasks(everyone)]
    if any(model.safety for model in everyone):
        result["safety"] = [_confusion(everyone)]
    if any(model.harness for model in everyone):
        result["harness"] = [_harness(everyone)]
    return {key: [chart for chart in some if chart.figure["data"]] for key, some in result.items()}


def labels(models: Sequence[ModelEvaluation]) -> list[str]:
    """What charts call each model, all different: its file type where these differ, or else its
    name cut short."""
    types = [model.file_type for model in models]
    if len(models) > 1 and "" not in types and len(set(types)) == len(types):
        return types
    result: list[str] = []
    for model in models:
        label, number = _short(model.name), 2
        while label in result:
            label, number = f"{_short(model.name)} ({number})", number + 1
        result.append(label)
    return result


def _plain(names: Sequence[str]) -> list[str]:
    """Names for Plotly, which would read some markup in them."""
    return [escape(name, quote=False) for name in names]


def _short(name: str) -> str:
    """A name with its middle left out where it is long: its end tells files of one model apart."""
    name = name.removesuffix(".gguf")
    if len(name) <= LABEL_LENGTH:
        return name
    half = LABEL_LENGTH // 2
    return f"{name[: half - 1]}…{name[-half:]}"


def _named(models: Sequence[ModelEvaluation]) -> list[str]:
    """The teacher's label, then the students'."""
    students = labels(models[1:])
    return [
        "teacher",
        *(f"{label} (student)" if label == "teacher" else label for label in students),
    ]


# -- what is nearest for its size and speed -------------------------------------------------------


def _size(comparison: Comparison) -> document.Chart:
    students = comparison.students
    figure = _pareto(
        comparison,
        lambda model: model.file_bytes / 1e6,
        size_front(students),
        "hv",
        f"teacher: {human_bytes(comparison.teacher.file_bytes)}",
    )
    figure["layout"]["xaxis"]["title"] = {"text": "file size (MB)", "standoff": 8}
    words = "Farther down is nearer to the teacher, farther left is smaller."
    words += " On the line: no student is both." if len(students) > 1 else ""
    return document.Chart("front-size", "Size and KL", words, figure, wide=len(students) > 4)


def _speed(comparison: Comparison) -> document.Chart:
    students = comparison.students
    figure = _pareto(
        comparison,
        lambda model: model.generation_speed,
        speed_front(students)[::-1],
        "vh",
        f"teacher: {comparison.teacher.generation_speed:,.0f} tokens/s",
    )
    figure["layout"]["xaxis"]["title"] = {"text": "writing (tokens/s)"}
    words = "Farther down is nearer to the teacher, farther right is faster."
    words += " On the line: no student is both." if len(students) > 1 else ""
    return document.Chart("front-speed", "Speed and KL", words, figure, wide=len(students) > 4)


def _pareto(
    comparison: Comparison,
    cost: Callable[[ModelEvaluation], float],
    kept: list[int],
    shape: str,
    teacher: str,
) -> dict[str, Any]:
    """KL against a cost, the front (``kept``, by rising cost) joined by a line; the teacher's
    cost as a line."""
    students, names = comparison.students, _plain(labels(comparison.students))
    traces = []
    if len(kept) > 1:
        line = {"color": "@sky", "width": 1.5, "shape": shape}
        on = [students[place] for place in kept]
        points = {
            "x": [_digits(cost(student)) for student in on],
            "y": [_digits(kl_of(one)) for one in on],
        }
        join = {"mode": "lines", "line": line, "hoverinfo": "skip", "showlegend": False}
        join["name"] = "front"
        traces.append({"type": "scatter", **points, **join})
    rest = [place for place in range(len(students)) if place not in kept]
    costs, distances = (
        [cost(student) for student in students],
        [kl_of(student) for student in students],
    )
    own = cost(comparison.teacher)
    ends = [
        end
        for one in students
        for end in (fidelity_of(one).kl.low, fidelity_of(one).kl.high)
        if end is not None
    ]
    across, up = (
        _scale([own, *costs]),
        _scale([*distances, *(end for end in ends if end > 0 or min(distances) <= 0)]),
    )
    sides = label_sides(
        list(zip(_shares(costs, across), _shares(distances, up), strict=True)), names
    )
    for places, name, symbol, colour in (
        (kept, "on the front" if len(students) > 1 else "student", "circle", "@blue"),
        (rest, "not on it", "circle-open", "@orange"),
    ):
        if places:
            some = [students[place] for place in places]
            result = {
                "x": [_digits(cost(student)) for student in some],
                "y": [_digits(kl_of(student)) for student in some],
                "text": [names[place] if sides[place] else "" for place in places],
                "textposition": [sides[place] or "top center" for place in places],
                "customdata": [names[place] for place in places],
            }
            style = {
                "symbol": symbol,
                "size": 11,
                "color": colour,
                "line": {"width": 2, "color": colour},
            }
            bars = _errors([fidelity_of(student).kl for student in some], colour)
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers+text",
                    "name": name,
                    **result,
                    "textfont": {"size": 12},
                    "marker": style,
                    "cliponaxis": False,
                    "error_y": bars,
                    "hovertemplate": "%{customdata}<br>%{x:,.4~g}, KL %{y:.4~g}<extra></extra>",
                }
            )
    figure = draw.figure(traces, {"title": {"text": "KL (nats per token)"}, **up})
    figure["layout"] |= {"xaxis": across, "hovermode": "closest", "showlegend": True}
    figure["layout"]["shapes"] = [_upright(own, teacher)]
    return figure


def label_sides(points: Sequence[tuple[float, float]], names: Sequence[str]) -> list[str]:
    """On which side of each point (in shares of the chart's width and height) its label covers no
    other label and no point, in Plotly's words; empty where there is no such side."""
    taken = [(x - LETTER, y - LINE / 3, x + LETTER, y + LINE / 3) for x, y in points]
    result = []
    for (x, y), name in zip(points, names, strict=True):
        length = LETTER * (len(name) + 1)
        for side, left, low in (
            ("top right", x + LETTER / 2, y + LINE / 4),
            ("top left", x - LETTER / 2 - length, y + LINE / 4),
            ("bottom left", x - LETTER / 2 - length, y - LINE * 5 / 4),
            ("bottom right", x + LETTER / 2, y - LINE * 5 / 4),
        ):
            box = (left, low, left + length, low + LINE)
            inside = left >= 0 and left + length <= 1
            if inside and not any(_meet(box, other) for other in taken if not _about(x, y, other)):
                taken.append(box)
                result.append(side)
                break
        else:
            result.append("")
    return result


def _about(x: float, y: float, box: tuple[float, float, float, float]) -> bool:
    """Whether a point is inside a box, as each is in its own and in that of one at nearly the
    same place."""
    return box[0] < x < box[2] and box[1] < y < box[3]


def _meet(
    first: tuple[float, float, float, float], second: tuple[float, float, float, float]
) -> bool:
    """Whether two boxes (left, low, right, high) overlap."""
    return (
        first[0] < second[2]
        and second[0] < first[2]
        and first[1] < second[3]
        and second[1] < first[3]
    )


def _scale(values: Sequence[float]) -> dict[str, Any]:
    """An axis with room at its ends: logarithmic where the values are far apart and none is 0 or
    less."""
    low, high = min(values), max(values)
    if low > 0 and high / low >= LOG_SPAN:
        ticks = {"dtick": 1} if high / low >= 1e3 else {"dtick": "D2"}
        ends = [log10(low), log10(high)]
        return {"type": "log", "tickformat": "~g", **ticks, "range": _wider(*ends)}
    return {"type": "linear", "range": _wider(low, high)}


def _wider(low: float, high: float) -> list[float]:
    """The ends of an axis that has room beside these."""
    room = MARGIN * (high - low) or abs(high) / 2 or 1.0
    return [_digits(low - room), _digits(high + room)]


def _shares(values: Sequence[float], axis: dict[str, Any]) -> list[float]:
    """Where values are on an axis, as shares of its length."""
    low, high = axis["range"]
    return [
        ((log10(value) if axis["type"] == "log" else value) - low) / (high - low)
        for value in values
    ]


def _upright(x: float, name: str) -> dict[str, Any]:
    """A line over the whole height, named in the legend."""
    ends = {"x0": _digits(x), "x1": _digits(x), "xref": "x", "y0": 0, "y1": 1, "yref": "paper"}
    return {
        "type": "line",
        **ends,
        "line": TEACHER_LINE,
        "name": name,
        "showlegend": True,
        "layer": "below",
    }


# -- bars -----------------------------------------------------------------------------------------


def _agreement(students: Sequence[ModelEvaluation]) -> document.Chart:
    """Three shares of every student."""
    result = [fidelity_of(student) for student in students]
    groups = [
        ("same top token", [one.top1 for one in result], "@blue"),
        ("top 5", [one.top5 for one in result], "@green"),
        ("acceptance", [one.acceptance for one in result], "@orange"),
    ]
    figure = _bars(labels(students), groups, {"tickformat": ".0%", "range": [0, 1.02]})
    words = "Shares of positions, of top-5 tokens, and of drafted tokens that the teacher takes. "
    words += _known(groups[0][1])
    return document.Chart(
        "agreement", "Agreement with the teacher", words, figure, wide=len(students) > 3
    )


def _divergence(students: Sequence[ModelEvaluation]) -> document.Chart:
    """KL in both directions."""
    result = [fidelity_of(student) for student in students]
    groups = [
        ("KL(teacher ‖ student)", [one.kl for one in result], "@blue"),
        ("KL(student ‖ teacher)", [one.reverse_kl for one in result], "@purple"),
    ]
    figure = _bars(
        labels(students), groups, {"title": {"text": "nats per token"}, "rangemode": "tozero"}
    )
    words = f"0 is the teacher itself. {_known(groups[0][1])}"
    return document.Chart(
        "divergence", "KL in both directions", words, figure, wide=len(students) > 3
    )


def _perplexity(comparison: Comparison) -> document.Chart:
    """Every student's perplexity, with the teacher's as a line."""
    students, own = comparison.students, comparison.teacher.perplexity.value
    groups = [("students", [student.perplexity for student in students], "@blue")]
    figure = _bars(
        labels(students), groups, {"title": {"text": "perplexity"}, "rangemode": "tozero"}
    )
    figure["layout"] |= {
        "shapes": [
            _upright(own, f"teacher: {own:.4g}")
            | {"layer": "above", "line": TEACHER_LINE | {"color": "@ink"}}
        ],
        "showlegend": True,
    }
    words = f"Of the text's own next tokens; lower is better. {_known(groups[0][1])}"
    return document.Chart("perplexity", "Perplexity", words, figure, wide=len(students) > 3)


def _tasks(everyone: Sequence[ModelEvaluation]) -> document.Chart:
    """What share every model has right."""
    names = [
        name
        for name, model in zip(_named(everyone), everyone, strict=True)
        if model.task is not None
    ]
    shares = [model.task.share for model in everyone if model.task is not None]
    figure = _bars(names, [("right", shares, "@green")], {"tickformat": ".0%", "range": [0, 1.02]})
    words = "Share of right answers at temperature 0; 95 % intervals."
    return document.Chart("tasks", "Right answers", words, figure)


def _harness(everyone: Sequence[ModelEvaluation]) -> document.Chart:
    """The first metric of each task that is a share, for every model."""
    chosen: dict[str, str] = {}
    for task, metric in harness_rows(everyone):
        values = [
            model.harness[task][metric]
            for model in everyone
            if metric in model.harness.get(task, {})
        ]
        if (
            task not in chosen
            and len(chosen) < MOST_TASKS
            and all(0 <= value <= 1 for value in values)
        ):
            chosen[task] = metric
    tasks = [_short(f"{task}: {metric}") for task, metric in chosen.items()]
    groups = []
    for place, (name, model) in enumerate(zip(_named(everyone), everyone, strict=True)):
        result = [harness_figure(model, task, metric) for task, metric in chosen.items()]
        if any(result):
            colour = "@grey" if place == 0 else draw.COLORS[(place - 1) % 7]
            groups.append((name, result, colour))
    figure = _bars(tasks, groups if tasks else [], {"range": [0, 1.02]})
    words = (
        "The first metric of each task that lies between 0 and 1; 95 % intervals. The table "
        "has all."
    )
    return document.Chart("harness", "Benchmarks", words, figure, wide=len(groups) * len(tasks) > 6)


def _bars(
    names: list[str],
    groups: Sequence[tuple[str, Sequence[Figure | None], str]],
    axis: dict[str, Any],
) -> dict[str, Any]:
    """Lying bars, since names are long: a row of ``names`` has one bar of each group, with its
    interval."""
    traces = []
    for name, figures, colour in groups:
        values = [None if one is None else _digits(one.value) for one in figures]
        said = [_interval_words(one) for one in figures]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "y": _plain(names),
                "x": values,
                "name": _plain([name])[0],
                "marker": {"color": colour},
                "error_x": _errors(figures, "@ink"),
                "customdata": said,
                "hovertemplate": "%{y}: %{customdata}<extra>%{fullData.name}</extra>",
            }
        )
    rows = {"type": "category", "autorange": "reversed", "showgrid": False}
    layout = {"xaxis": axis, "yaxis": rows, "barmode": "group", "hovermode": "closest"}
    bars = len(names) * max(1, len(groups))
    gap = {"bargap": 0.6 if bars < 4 else 0.25, "showlegend": len(groups) > 1}
    return {"data": traces, "layout": {**layout, **gap}}


def _errors(figures: Sequence[Figure | None], colour: str) -> dict[str, Any]:
    """Plotly's error bars of intervals."""
    if not _known(figures):
        return {"visible": False}
    above = [0.0 if one is None or one.high is None else one.high - one.value for one in figures]
    below = [0.0 if one is None or one.low is None else one.value - one.low for one in figures]
    arrays = {
        "array": [_digits(value) for value in above],
        "arrayminus": [_digits(value) for value in below],
    }
    return {
        "type": "data",
        "symmetric": False,
        **arrays,
        "color": colour,
        "thickness": 1.2,
        "width": 3,
    }


def _known(figures: Sequence[Figure | None]) -> str:
    """What a chart's words say of its intervals: nothing where no figure has one."""
    there = any(one is not None and one.low is not None and one.high is not None for one in figures)
    return "95 % intervals." if there else ""


def _interval_words(figure: Figure | None) -> str:
    if figure is None:
        return ""
    if figure.low is None or figure.high is None:
        return f"{figure.value:.4g}"
    return f"{figure.value:.4g} ({figure.low:.4g}–{figure.high:.4g})"


# -- safety ---------------------------------------------------------------------------------------


def _confusion(everyone: Sequence[ModelEvaluation]) -> document.Chart:
    """Label against decision with counts; a button for each model where several have a safety
    head."""
    cells: dict[str, dict[str, list[Any]]] = {}
    for name, model in zip(_named(everyone), everyone, strict=True):
        if model.safety is not None:
            counts = model.safety.confusion
            shares = [[_digits(count / max(1, sum(row))) for count in row] for row in counts]
            cells[name] = {"z": shares, "text": [[str(count) for count in row] for row in counts]}
    hover = "label %{y}, decision %{x}: %{text} prompts, %{z:.0%} of the label"
    first = next(iter(cells.values()))
    trace = draw.heat_map(list(DECISIONS), list(DECISIONS), first["z"], hover) | {
        "text": first["text"]
    }
    trace |= {"texttemplate": "%{text}", "textfont": {"size": 18}, "xgap": 3, "ygap": 3}
    trace |= {"zmin": 0, "zmax": 1, "showscale": False}
    figure = draw.heat_figure(trace, {"title": {"text": "decision"}}, "label")
    if len(cells) > 1:
        figure["choices"] = [
            draw.choice(name, {key: [value] for key, value in cell.items()}, {})
            for name, cell in cells.items()
        ]
    words = "Counts of prompts; the colour is the share of the row. The diagonal is right."
    return document.Chart("safety", "Labels and decisions", words, figure)


def _digits(value: float) -> float:
    """As many digits as a picture shows."""
    return float(f"{value:.5g}")
