"""The charts of a run's report, and of two side by side.

Over 400 lines because every chart of the report is a short function here.
"""

from __future__ import annotations

from html import escape
from typing import Any

from distill.metrics.safety import SafetyScore
from distill.metrics.verification import CASCADE_GOAL, VerificationPart, cascade_goal
from distill.reports import document
from distill.reports.document import Curve
from distill.reports.render import plotly as draw
from distill.reports.run.guard_log import add_marks
from distill.reports.run.health_charts import health_charts
from distill.reports.run.report import Comparison, Report
from distill.reports.run.sections import LANGUAGES
from distill.reports.weights.charts import weight_charts
from distill.runs.metrics_log import LOSS_PARTS, ROTATION_ERROR, HeldOutPoint
from students.model.head_decisions import DECISIONS

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
RUN_STYLES = (("@blue", "solid"), ("@red", "dash"))


def charts(report: Report) -> dict[str, list[document.Chart]]:
    """The charts of each section; those without data are left out."""
    result = {
        "training": [
            _loss(report),
            *_held_out(report),
            _gradient(report),
            _rate(report),
            _update(report),
        ],
        "health": health_charts(report.weights, report.probe, report.full_ranks),
        "rotations": _rotations(report),
    }
    if report.final_weights is not None and report.final_weights.report is not None:
        result |= weight_charts(report.final_weights.report)
    if report.results is not None and (safety := report.results.heads.safety) is not None:
        result["safety"] = [_confusion({"all": safety.test, **safety.languages})]
    if (
        report.results is not None
        and (verification := report.results.heads.verification) is not None
    ):
        result["verification"] = [_reliability(verification), _cascade(verification)]
    return {key: [chart for chart in some if chart.figure["data"]] for key, some in result.items()}


def comparison_charts(comparison: Comparison) -> dict[str, list[document.Chart]]:
    """Both runs' validation scores, loss and gradient norm in one chart each."""
    runs = [("A", comparison.first), ("B", comparison.second)]
    names = [
        escape(f"{letter}: {report.name}", quote=False) for letter, report in runs
    ]  # Plotly reads some markup
    result = []
    for name, title in (
        ("kl", " / ".join(dict.fromkeys(_title(report) for _, report in runs))),
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
        result.append(
            document.Chart(
                f"both-{name}",
                title,
                "On validation text.",
                draw.figure(traces, axis),
                wide=name == "kl",
            )
        )
    for name, title in (("loss", "Training loss"), ("grad_norm", "Gradient norm before clipping")):
        traces = [
            draw.line(report.curves[name], names[place], RUN_STYLES[place][0], width=1.2)
            for place, (_, report) in enumerate(runs)
            if name in report.curves
        ]
        words = (
            "Of every step; the weights of its parts may differ."
            if name == "loss"
            else "Of every step."
        )
        figure = draw.figure(
            traces, draw.log_axis(traces, "nats per token" if name == "loss" else "")
        )
        result.append(document.Chart(f"both-{name}", title, words, figure, wide=name == "loss"))
    told = [
        draw.line(curve, names[place], *RUN_STYLES[place])
        for place, (_, report) in enumerate(runs)
        if (curve := draw.curve_of(report.probe, "information")).steps
    ]
    words = (
        "What the next-token distributions say about their place in a fixed text: 0 says the "
        "same everywhere."
    )
    figure = draw.figure(told, {"title": {"text": "nats"}, "rangemode": "tozero"})
    result.append(document.Chart("both-information", "Information", words, figure))
    return {"curves": [chart for chart in result if chart.figure["data"]]}


def _loss(report: Report) -> document.Chart:
    """The loss as a stack of its parts, or every part as a line on a logarithmic axis: two
    buttons."""
    names = [name for name in LOSS_PARTS if name in report.curves]
    stacked, lines = [], []
    for place, name in enumerate(names):
        curve, colour = report.curves[name], draw.COLORS[place % len(draw.COLORS)]
        shared = {"name": PART_WORDS[name], "legendgroup": name}
        stack = {
            "stackgroup": "loss",
            "line": {"width": 0.5, "color": colour},
            "fillcolor": f"{colour}",
        }
        stacked.append(draw.trace(curve, **shared, mode="lines", **stack))
        # A part of exactly 0 has no place on a logarithmic axis.
        above = Curve(curve.steps, [value if value else None for value in curve.values])
        line = {"color": colour, "width": 1.5, "dash": "solid" if place < 4 else "dot"}
        lines.append(draw.trace(above, **shared, mode="lines", line=line, visible=False))
    if "loss" in report.curves:
        total = {"color": "@ink", "width": 1.5}
        lines.append(
            draw.trace(report.curves["loss"], name="loss", mode="lines", line=total, visible=False)
        )
    figure = draw.figure([*stacked, *lines], {"title": {"text": "nats per token"}})
    marks = (
        add_marks(figure, report.events, report.curves["loss"]) if "loss" in report.curves else 0
    )
    shown = [
        [stack] * len(stacked) + [not stack] * len(lines) + [True] * marks
        for stack in (True, False)
    ]
    figure["choices"] = [
        draw.choice(
            "Stacked", {"visible": shown[0]}, {"yaxis.type": "linear", "yaxis.autorange": True}
        ),
        draw.choice(
            "Lines, log scale",
            {"visible": shown[1]},
            {"yaxis.type": "log", "yaxis.autorange": True, "yaxis.exponentformat": "power"},
        ),
    ]
    words = (
        "Each part with its weight; together they are the loss. A click in the legend hides a part."
    )
    return document.Chart("loss", "Loss and its parts", words, figure, wide=True)


def _title(report: Report) -> str:
    return report.validation_kl.replace("v", "V", 1)


def _held_out(report: Report) -> list[document.Chart]:
    """KL and cross-entropy in validation in one chart, agreement in another, each with the best
    step."""
    points = report.held_out
    best = next((point for point in points if point.step == report.best_step), None)
    nats = [
        _points(points, "kl", report.validation_kl, "@blue", "solid"),
        _points(points, "cross_entropy", "cross-entropy", "@orange", "dash"),
    ]
    shares = [_points(points, "agreement", "same top token", "@green", "solid")]
    if best is not None and best.kl is not None:
        nats.append(draw.mark(best.step, best.kl, f"best step {best.step:,}"))
    if best is not None and best.agreement is not None:
        shares.append(draw.mark(best.step, best.agreement, f"best step {best.step:,}"))
    return [
        document.Chart(
            "validation",
            f"{_title(report)} and cross-entropy",
            "Lower is better; the student keeps the weights of the step with the lowest "
            f"{report.validation_kl}.",
            draw.figure(nats, {"title": {"text": "nats per token"}, "rangemode": "tozero"}),
        ),
        document.Chart(
            "agreement",
            "Validation agreement",
            "Share of tokens for which student and teacher have the same most probable token.",
            draw.figure(
                shares,
                {"title": {"text": "share of tokens"}, "tickformat": ".0%", "rangemode": "tozero"},
            ),
        ),
    ]


def _gradient(report: Report) -> document.Chart:
    """Gradient norm on a logarithmic axis, with the limit."""
    traces = _curve(report, "grad_norm", "gradient norm", "@blue", width=1.2)
    limit = report.max_grad_norm
    if traces and limit is not None:
        traces.append(draw.level(traces[0], limit, f"clipped above {limit:g}", "dash"))
    words = (
        "Before clipping. Steps above the line are scaled down to it, or to a dot: a lower "
        "limit of that step."
    )
    curve, own = traces[:1], _curve(report, "clip_limit", "lower limit", "@orange")
    for limits in own:
        limits |= {"mode": "markers", "marker": {"size": 4, "color": "@orange"}}
    figure = draw.figure([*traces, *own], draw.log_axis([*traces, *own]))
    if curve:
        add_marks(figure, report.events, report.curves["grad_norm"])
    return document.Chart("gradient", "Gradient norm", words, figure)


def _update(report: Report) -> document.Chart:
    """The largest relative change of any weight in a step."""
    traces = _curve(report, "update_ratio", "largest change", "@purple", width=1.2)
    words = "The largest change of any weight in one step, as a share of the weight's own size."
    figure = draw.figure(traces, draw.log_axis(traces))
    if traces:
        add_marks(figure, report.events, report.curves["update_ratio"])
    return document.Chart("update-ratio", "Size of the steps", words, figure)


def _rate(report: Report) -> document.Chart:
    traces = _curve(report, "learning_rate", "learning rate", "@green")
    return document.Chart(
        "rate",
        "Learning rate",
        "Warm-up, then the schedule.",
        draw.figure(traces, {"rangemode": "tozero"}),
    )


def _rotations(report: Report) -> list[document.Chart]:
    """Four figures of the rotations over steps."""
    commutators = _curve(report, "mean_commutator", "mean", "@blue") + _curve(
        report, "min_commutator", "smallest", "@orange", dash="dash"
    )
    margin = report.commutator_margin
    if commutators and margin is not None:
        commutators.append(draw.level(commutators[0], margin, f"margin {margin:g}", "dot"))
    bends = _curve(report, "second_difference", "second difference", "@green")
    errors = _curve(report, "rotation_error", "error", "@blue")
    if errors:
        errors.append(
            draw.level(errors[0], ROTATION_ERROR, f"no rotation above {ROTATION_ERROR:g}", "dash")
        )
    return [
        document.Chart(
            "rotation-error",
            "Distance from a rotation",
            "Largest orthogonality error of any block; float32 alone gives about 1e-7.",
            draw.figure(errors, {"type": "log", "tickformat": ".0e", "dtick": 1}),
        ),
        document.Chart(
            "commutators",
            "Commutators",
            "Norm of R_cmd R_safe − R_safe R_cmd: 0 where both commute. Below the margin the loss "
            "pushes.",
            draw.figure(commutators, {"rangemode": "tozero"}),
        ),
        document.Chart(
            "drift",
            "Drift",
            "Mean squared distance of the rotations from their moving average.",
            draw.figure(
                _curve(report, "rotation_drift", "drift", "@purple"),
                {"rangemode": "tozero", "exponentformat": "e"},
            ),
        ),
        document.Chart(
            "second-difference",
            "Second difference",
            "How sharply the final hidden states turn from token to token (what PET weighs).",
            draw.figure(bends, draw.log_axis(bends)),
        ),
    ]


def _confusion(scores: dict[str, SafetyScore]) -> document.Chart:
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
        "hovertemplate": "label %{y}, decision %{x}: %{text} prompts, %{z:.0%} of the "
        "label<extra></extra>",
    }
    figure = draw.figure(
        [trace], {"title": {"text": "label"}, "autorange": "reversed", "showgrid": False}
    )
    figure["layout"]["xaxis"] = {"title": {"text": "decision"}, "showgrid": False}
    if len(scores) > 1:
        figure["choices"] = [
            draw.choice(
                LANGUAGES.get(name, name), {key: [value] for key, value in cells(score).items()}, {}
            )
            for name, score in scores.items()
        ]
    words = "Counts of test prompts; the colour is the share of the row. The diagonal is right."
    return document.Chart("confusion", "Labels and decisions", words, figure)


def _reliability(result: VerificationPart) -> document.Chart:
    """What the head says against what comes true, with how many tokens say so."""
    bins = result.reliability
    said, true = [one.mean_probability for one in bins], [one.share_true for one in bins]
    counts = [one.count for one in bins]
    largest = max(counts, default=1)
    hover = "says %{x:.1%}, %{y:.1%} agree<br>%{customdata:,} tokens<extra></extra>"
    size = [8 + 20 * (count / largest) ** 0.5 for count in counts]
    dots = {
        "marker": {"size": size, "color": "@blue"},
        "mode": "lines+markers",
        "cliponaxis": False,
    }
    bars = {
        "type": "bar",
        "yaxis": "y2",
        "width": 0.04,
        "marker": {"color": "@sky"},
        "hoverinfo": "skip",
    }
    traces = [
        draw.plain_line([0, 1], [0, 1], "exactly calibrated", "@grey", "dash")
        | {"hoverinfo": "skip"},
        draw.plain_line(said, true, "this student", "@blue")
        | dots
        | {"customdata": counts, "hovertemplate": hover},
        {"x": said, "y": counts, "name": "tokens", **bars},
    ]
    share = {"tickformat": ".0%", "range": [-0.05, 1.08]}
    figure = draw.figure(
        traces if bins else [],
        {"title": {"text": "agrees with the teacher"}, **share, "domain": [0.3, 1]},
    )
    figure["layout"]["xaxis"] = {"title": {"text": "probability it gives"}, "anchor": "y2", **share}
    figure["layout"]["yaxis2"] = {"domain": [0, 0.22], "title": {"text": "tokens"}, "nticks": 3}
    words = (
        "On the dashed line the head can be taken at its word. Larger dots and bars: more tokens."
    )
    return document.Chart("reliability", "Reliability", words, figure)


def _cascade(result: VerificationPart) -> document.Chart:
    """Agreement of student and teacher together against what the teacher is asked."""
    asked, agree = (
        [one.escalated for one in result.cascade],
        [one.agreement for one in result.cascade],
    )
    hover = (
        "teacher answers %{x:.1%}, %{y:.1%} agree<br>asks below a probability of "
        "%{customdata:.3f}<extra></extra>"
    )
    below = [one.threshold for one in result.cascade]
    traces = [
        draw.plain_line(asked, agree, "least certain tokens", "@blue")
        | {"customdata": below, "hovertemplate": hover},
        draw.plain_line([0, 1], [result.agreement, 1], "picked blindly", "@grey", "dash")
        | {"hoverinfo": "skip"},
    ]
    if (goal := cascade_goal(result)) is not None:
        words = f"{CASCADE_GOAL:.0%}: teacher answers {goal.escalated:.0%}"
        traces.append(
            draw.mark(goal.escalated, goal.agreement, words)
            | {"hovertemplate": f"{words}<extra></extra>"}
        )
    share = {"tickformat": ".0%", "range": [-0.02, 1.03]}
    axis = {"title": {"text": "agreement with the teacher"}, "tickformat": ".0%"}
    figure = draw.figure(traces if result.cascade else [], axis)
    figure["layout"]["xaxis"] = {"title": {"text": "share of tokens the teacher answers"}, **share}
    words = (
        "Solid: the teacher answers the student's least certain tokens. Dashed: as many, "
        "picked blindly."
    )
    return document.Chart("cascade", "Cascade: student and teacher together", words, figure)


def _curve(
    report: Report, key: str, name: str, colour: str, *, dash: str = "solid", width: float = 2.0
) -> list[draw.Trace]:
    """The run's curve of that key, if it has one."""
    if key not in report.curves or not report.curves[key].steps:
        return []
    return [draw.line(report.curves[key], name, colour, dash, width)]


def _points(points: list[HeldOutPoint], key: str, name: str, colour: str, dash: str) -> draw.Trace:
    """One validation figure, at the steps where it was measured."""
    curve = Curve([point.step for point in points], [getattr(point, key) for point in points])
    return draw.line(curve, name, colour, dash) | {
        "mode": "lines+markers",
        "marker": {"size": 7, "color": colour},
    }
