"""The charts of a report as Plotly figures in plain JSON; the page draws them.

Beside Plotly's ``data`` and ``layout`` a figure may have ``choices``: what a row of buttons above it changes.

A colour is a name with an @ (``@blue``): the page puts in what suits its light or dark ground. The colours are those of
Okabe and Ito, which remain apart for colour-blind readers; what belongs together also differs in its dashes.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from distill.report import LOSS_PARTS, Comparison, Curve, Report
from distill.report_records import HeldOutPoint, VerificationPart
from distill.report_tables import LANGUAGES
from distill.report_verdict import ROTATION_ERROR, cascade_goal
from distill.safety_metrics import SafetyScore
from distill.verification import CASCADE_GOAL
from students.heads import DECISIONS

PART_WORDS = {
    "kd": "KL to the teacher",
    "ce": "cross-entropy",
    "hidden": "hidden states",
    "pet": "PET",
    "inertia": "inertia",
    "non_commutation": "non-commutation",
    "verification": "verification head",
    "safety": "safety head",
}
COLOURS = ("@blue", "@orange", "@green", "@purple", "@sky", "@red", "@yellow", "@grey")
RUN_STYLES = (("@blue", "solid"), ("@red", "dash"))
STEPS = {"title": {"text": "step"}, "rangemode": "tozero"}
Trace = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """A chart with a title and a sentence that says what to see in it. ``wide``: over the whole width."""

    key: str
    title: str
    words: str
    figure: dict[str, Any]
    wide: bool = False


def charts(report: Report) -> dict[str, list[Chart]]:
    """The charts of each section; those without data are left out."""
    found = {
        "training": [_loss(report), *_held_out(report), _gradient(report), _rate(report)],
        "rotations": _rotations(report),
    }
    if report.results is not None and (safety := report.results.heads.safety) is not None:
        found["safety"] = [_confusion({"all": safety.test, **safety.languages})]
    if report.results is not None and (verification := report.results.heads.verification) is not None:
        found["verification"] = [_reliability(verification), _cascade(verification)]
    return {key: [chart for chart in some if chart.figure["data"]] for key, some in found.items()}


def comparison_charts(comparison: Comparison) -> dict[str, list[Chart]]:
    """Both runs' held-out scores, loss and gradient norm in one chart each."""
    runs = [("A", comparison.first), ("B", comparison.second)]
    names = [
        escape(f"{letter}: {report.name}", quote=False) for letter, report in runs
    ]  # Plotly reads some markup
    found = []
    for name, title in (
        ("kl", "Held-out KL"),
        ("agreement", "Same top token"),
        ("cross_entropy", "Cross-entropy"),
    ):
        traces = [
            _points(report.held_out, name, names[place], *RUN_STYLES[place])
            for place, (_, report) in enumerate(runs)
        ]
        axis: dict[str, Any] = {"title": {"text": "nats per token"}}
        if name == "agreement":
            axis = {"title": {"text": "share of tokens"}, "tickformat": ".0%"}
        found.append(
            Chart(f"both-{name}", title, "On held-out text.", _figure(traces, axis), wide=name == "kl")
        )
    for name, title in (("loss", "Training loss"), ("grad_norm", "Gradient norm before clipping")):
        traces = [
            _line(report.curves[name], names[place], RUN_STYLES[place][0], width=1.2)
            for place, (_, report) in enumerate(runs)
            if name in report.curves
        ]
        words = "Of every step; the weights of its parts may differ." if name == "loss" else "Of every step."
        figure = _figure(traces, _log_axis(traces, "nats per token" if name == "loss" else ""))
        found.append(Chart(f"both-{name}", title, words, figure, wide=name == "loss"))
    return {"curves": [chart for chart in found if chart.figure["data"]]}


def _loss(report: Report) -> Chart:
    """The loss as a stack of its parts, or every part as a line on a logarithmic axis: two buttons."""
    names = [name for name in LOSS_PARTS if name in report.curves]
    stacked, lines = [], []
    for place, name in enumerate(names):
        curve, colour = report.curves[name], COLOURS[place % len(COLOURS)]
        shared = {"name": PART_WORDS[name], "legendgroup": name}
        stack = {"stackgroup": "loss", "line": {"width": 0.5, "color": colour}, "fillcolor": f"{colour}"}
        stacked.append(_trace(curve, **shared, mode="lines", **stack))
        # A part of exactly 0 has no place on a logarithmic axis.
        above = Curve(curve.steps, [value if value else None for value in curve.values])
        line = {"color": colour, "width": 1.5, "dash": "solid" if place < 4 else "dot"}
        lines.append(_trace(above, **shared, mode="lines", line=line, visible=False))
    if "loss" in report.curves:
        total = {"color": "@ink", "width": 1.5}
        lines.append(_trace(report.curves["loss"], name="loss", mode="lines", line=total, visible=False))
    figure = _figure([*stacked, *lines], {"title": {"text": "nats per token"}})
    shown = [[True] * len(stacked) + [False] * len(lines), [False] * len(stacked) + [True] * len(lines)]
    figure["choices"] = [
        _choice("Stacked", {"visible": shown[0]}, {"yaxis.type": "linear", "yaxis.autorange": True}),
        _choice(
            "Lines, log scale",
            {"visible": shown[1]},
            {"yaxis.type": "log", "yaxis.autorange": True, "yaxis.exponentformat": "power"},
        ),
    ]
    words = "Each part with its weight; together they are the loss. A click in the legend hides a part."
    return Chart("loss", "Loss and its parts", words, figure, wide=True)


def _held_out(report: Report) -> list[Chart]:
    """Held-out KL and cross-entropy in one chart, agreement in another, the best step marked in both."""
    points = report.held_out
    best = next((point for point in points if point.step == report.best_step), None)
    nats = [
        _points(points, "kl", "KL to the teacher", "@blue", "solid"),
        _points(points, "cross_entropy", "cross-entropy", "@orange", "dash"),
    ]
    shares = [_points(points, "agreement", "same top token", "@green", "solid")]
    if best is not None and best.kl is not None:
        nats.append(_mark(best.step, best.kl, f"best step {best.step:,}"))
    if best is not None and best.agreement is not None:
        shares.append(_mark(best.step, best.agreement, f"best step {best.step:,}"))
    return [
        Chart(
            "held-out",
            "Held-out KL and cross-entropy",
            "Lower is better; the student keeps the weights of the step with the lowest KL.",
            _figure(nats, {"title": {"text": "nats per token"}, "rangemode": "tozero"}),
        ),
        Chart(
            "agreement",
            "Held-out agreement",
            "Share of tokens for which student and teacher have the same most probable token.",
            _figure(
                shares, {"title": {"text": "share of tokens"}, "tickformat": ".0%", "rangemode": "tozero"}
            ),
        ),
    ]


def _gradient(report: Report) -> Chart:
    """Gradient norm on a logarithmic axis, with the limit."""
    traces = _curve(report, "grad_norm", "gradient norm", "@blue", width=1.2)
    limit = report.max_grad_norm
    if traces and limit is not None:
        traces.append(_level(traces[0], limit, f"clipped above {limit:g}", "dash"))
    words = "Before clipping. Steps above the line are scaled down to it."
    return Chart("gradient", "Gradient norm", words, _figure(traces, _log_axis(traces)))


def _rate(report: Report) -> Chart:
    traces = _curve(report, "learning_rate", "learning rate", "@green")
    return Chart(
        "rate", "Learning rate", "Warm-up, then the schedule.", _figure(traces, {"rangemode": "tozero"})
    )


def _rotations(report: Report) -> list[Chart]:
    """Four figures of the rotations over steps."""
    commutators = _curve(report, "mean_commutator", "mean", "@blue") + _curve(
        report, "min_commutator", "smallest", "@orange", dash="dash"
    )
    margin = report.commutator_margin
    if commutators and margin is not None:
        commutators.append(_level(commutators[0], margin, f"margin {margin:g}", "dot"))
    bends = _curve(report, "second_difference", "second difference", "@green")
    errors = _curve(report, "rotation_error", "error", "@blue")
    if errors:
        errors.append(_level(errors[0], ROTATION_ERROR, f"no rotation above {ROTATION_ERROR:g}", "dash"))
    return [
        Chart(
            "rotation-error",
            "Distance from a rotation",
            "Largest orthogonality error of any block; float32 alone gives about 1e-7.",
            _figure(errors, {"type": "log", "tickformat": ".0e", "dtick": 1}),
        ),
        Chart(
            "commutators",
            "Commutators",
            "Norm of R_cmd R_safe − R_safe R_cmd: 0 where both commute. Below the margin the loss pushes.",
            _figure(commutators, {"rangemode": "tozero"}),
        ),
        Chart(
            "drift",
            "Drift",
            "Mean squared distance of the rotations from their moving average.",
            _figure(
                _curve(report, "rotation_drift", "drift", "@purple"),
                {"rangemode": "tozero", "exponentformat": "e"},
            ),
        ),
        Chart(
            "second-difference",
            "Second difference",
            "How sharply the final hidden states turn from token to token (what PET weighs).",
            _figure(bends, _log_axis(bends)),
        ),
    ]


def _confusion(scores: dict[str, SafetyScore]) -> Chart:
    """Label against decision with counts; a button for each language where there are several."""

    def cells(score: SafetyScore) -> dict[str, Any]:
        shares = [[count / max(1, sum(row)) for count in row] for row in score.confusion]
        return {"z": shares, "text": [[str(count) for count in row] for row in score.confusion]}

    names = list(DECISIONS)
    trace = {
        "type": "heatmap",
        "x": names,
        "y": names,
        **cells(scores["all"]),
        "texttemplate": "%{text}",
        "textfont": {"size": 18},
        "colorscale": "@heat",
        "zmin": 0,
        "zmax": 1,
        "xgap": 3,
        "ygap": 3,
        "showscale": False,
        "hoverongaps": False,
        "hovertemplate": "label %{y}, decision %{x}: %{text} prompts, %{z:.0%} of the label<extra></extra>",
    }
    figure = _figure([trace], {"title": {"text": "label"}, "autorange": "reversed", "showgrid": False})
    figure["layout"]["xaxis"] = {"title": {"text": "decision"}, "showgrid": False}
    if len(scores) > 1:
        figure["choices"] = [
            _choice(LANGUAGES.get(name, name), {key: [value] for key, value in cells(score).items()}, {})
            for name, score in scores.items()
        ]
    words = "Counts of held-out prompts; the colour is the share of the row. The diagonal is right."
    return Chart("confusion", "Labels and decisions", words, figure)


def _reliability(found: VerificationPart) -> Chart:
    """What the head says against what comes true, with how many tokens say so."""
    bins = found.reliability
    said, true = [one.mean_probability for one in bins], [one.share_true for one in bins]
    counts = [one.count for one in bins]
    largest = max(counts, default=1)
    hover = "says %{x:.1%}, %{y:.1%} agree<br>%{customdata:,} tokens<extra></extra>"
    size = [8 + 20 * (count / largest) ** 0.5 for count in counts]
    dots = {"marker": {"size": size, "color": "@blue"}, "mode": "lines+markers", "cliponaxis": False}
    bars = {"type": "bar", "yaxis": "y2", "width": 0.04, "marker": {"color": "@sky"}, "hoverinfo": "skip"}
    traces = [
        _plain_line([0, 1], [0, 1], "exactly calibrated", "@grey", "dash") | {"hoverinfo": "skip"},
        _plain_line(said, true, "this student", "@blue")
        | dots
        | {"customdata": counts, "hovertemplate": hover},
        {"x": said, "y": counts, "name": "tokens", **bars},
    ]
    share = {"tickformat": ".0%", "range": [-0.05, 1.08]}
    figure = _figure(
        traces if bins else [], {"title": {"text": "agrees with the teacher"}, **share, "domain": [0.3, 1]}
    )
    figure["layout"]["xaxis"] = {"title": {"text": "probability it gives"}, "anchor": "y2", **share}
    figure["layout"]["yaxis2"] = {"domain": [0, 0.22], "title": {"text": "tokens"}, "nticks": 3}
    words = "On the dashed line the head can be taken at its word. Larger dots and bars: more tokens."
    return Chart("reliability", "Reliability", words, figure)


def _cascade(found: VerificationPart) -> Chart:
    """Agreement of student and teacher together against what the teacher is asked."""
    asked, agree = [one.escalated for one in found.cascade], [one.agreement for one in found.cascade]
    hover = "teacher answers %{x:.1%}, %{y:.1%} agree<br>asks below a probability of %{customdata:.3f}<extra></extra>"
    below = [one.threshold for one in found.cascade]
    traces = [
        _plain_line(asked, agree, "least certain tokens", "@blue")
        | {"customdata": below, "hovertemplate": hover},
        _plain_line([0, 1], [found.agreement, 1], "picked blindly", "@grey", "dash") | {"hoverinfo": "skip"},
    ]
    if (goal := cascade_goal(found)) is not None:
        words = f"{CASCADE_GOAL:.0%}: teacher answers {goal.escalated:.0%}"
        traces.append(
            _mark(goal.escalated, goal.agreement, words) | {"hovertemplate": f"{words}<extra></extra>"}
        )
    share = {"tickformat": ".0%", "range": [-0.02, 1.03]}
    axis = {"title": {"text": "agreement with the teacher"}, "tickformat": ".0%"}
    figure = _figure(traces if found.cascade else [], axis)
    figure["layout"]["xaxis"] = {"title": {"text": "share of tokens the teacher answers"}, **share}
    words = "Solid: the teacher answers the student's least certain tokens. Dashed: as many, picked blindly."
    return Chart("cascade", "Cascade: student and teacher together", words, figure)


def _figure(traces: list[Trace], axis: dict[str, Any]) -> dict[str, Any]:
    layout: dict[str, Any] = {"xaxis": dict(STEPS), "yaxis": dict(axis), "showlegend": len(traces) > 1}
    return {"data": traces, "layout": layout}


def _log_axis(traces: list[Trace], title: str = "") -> dict[str, Any]:
    """A logarithmic axis that names no more values than fit one above the other."""
    known = [value for trace in traces for value in trace["y"] if value]
    span = max(known) / min(known) if known else 1.0
    ticks = {} if span < 10 else {"dtick": "D2"} if span < 1e4 else {"dtick": 1}
    return {"type": "log", "tickformat": "~g", "title": {"text": title}, **ticks}


def _trace(curve: Curve, **style: Any) -> Trace:
    return {"type": "scatter", "x": curve.steps, "y": curve.values, **style}


def _plain_line(x: list[float], y: list[float], name: str, colour: str, dash: str = "solid") -> Trace:
    """A line over something else than steps."""
    line = {"color": colour, "dash": dash, "width": 2.0}
    return {"type": "scatter", "x": x, "y": y, "mode": "lines", "name": name, "line": line}


def _line(curve: Curve, name: str, colour: str, dash: str = "solid", width: float = 2.0) -> Trace:
    return _trace(curve, name=name, mode="lines", line={"color": colour, "dash": dash, "width": width})


def _level(trace: Trace, value: float, name: str, dash: str) -> Trace:
    """A level line along a trace that is not empty."""
    return _line(Curve([trace["x"][0], trace["x"][-1]], [value, value]), name, "@red", dash)


def _curve(
    report: Report, key: str, name: str, colour: str, *, dash: str = "solid", width: float = 2.0
) -> list[Trace]:
    """The run's curve of that key, if it has one."""
    if key not in report.curves or not report.curves[key].steps:
        return []
    return [_line(report.curves[key], name, colour, dash, width)]


def _points(points: list[HeldOutPoint], key: str, name: str, colour: str, dash: str) -> Trace:
    """One held-out figure, at the steps where it was measured."""
    curve = Curve([point.step for point in points], [getattr(point, key) for point in points])
    return _line(curve, name, colour, dash) | {
        "mode": "lines+markers",
        "marker": {"size": 7, "color": colour},
    }


def _mark(x: float, y: float, name: str) -> Trace:
    """One point that stands out, with its name beside it in the legend."""
    marker = {"symbol": "star", "size": 16, "color": "@red", "line": {"width": 1, "color": "@ground"}}
    return {"type": "scatter", "x": [x], "y": [y], "mode": "markers", "name": name, "marker": marker}


def _choice(label: str, data: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    """One button: what it changes in the traces and in the layout."""
    return {"label": label, "data": data, "layout": layout}
