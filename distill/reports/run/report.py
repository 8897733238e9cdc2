"""A run, or two side by side, as plain data: what the terminal, ``report.html`` and ``--json``
all show."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.config.loading import flatten, load_config
from distill.metrics.closeness import kl_name
from distill.metrics.intervals import Ratio
from distill.metrics.safety import ratios
from distill.reports.document import Curve, Fact
from distill.reports.run.guard_log import guard_facts, health_facts
from distill.reports.run.health import health
from distill.reports.verdict import run_verdict
from distill.reports.weights.final import FinalWeights, final_facts, final_weights, full_ranks
from distill.reports.weights.report import without_infinities
from distill.runs.metrics_log import LOSS_PARTS, GuardEvent, HeldOutPoint, Line, best_point, step_of
from distill.runs.records import (
    Records,
    Results,
    StudentPart,
    TeacherPart,
    max_grad_norm,
    read_records,
)
from distill.runtime.progress import Console

CURVE_POINTS = 800  # of one curve at most; a longer one keeps the extremes of each stretch


@dataclass(frozen=True)
class Setting:
    """A setting that is not the default (``None``: there is no such setting, or no value)."""

    key: str
    value: Any
    default: Any


@dataclass(frozen=True)
class Report:
    """Everything about one run.

    ``state``: finished, running or stopped. ``level`` and ``verdict``: of use
    (``distill.reports.verdict``); ``health``: how training went. ``curves``: training, by
    name; ``validation_kl``: what the KL of the validation points is called; ``steps_logged``: how
    many steps that was. ``safety_ratios``: by language, ``all`` first. ``guarded``: a guard
    watched; ``undone``: logged steps taken back. ``weights`` and ``probe``: figures of the
    student's inside over steps (``distill.runs.metrics_log``); ``full_ranks``: the smaller side of
    each matrix by name.
    """

    name: str
    folder: str
    state: str
    level: str
    verdict: list[Fact]
    health: list[Fact]
    teacher: TeacherPart
    student: StudentPart
    settings: list[Setting]
    seed: int | None
    max_grad_norm: float | None
    commutator_margin: float | None
    steps_logged: int
    last_step: int
    best_step: int | None
    curves: dict[str, Curve]
    held_out: list[HeldOutPoint]
    validation_kl: str
    safety_ratios: dict[str, list[Ratio]]
    results: Results | None
    soft_targets: str
    guarded: bool
    events: list[GuardEvent]
    undone: int
    weights: list[Line]
    probe: list[Line]
    full_ranks: dict[str, int]
    final_weights: FinalWeights | None

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        tree: dict[str, Any] = without_infinities(asdict(self))
        return {"kind": "run", **tree}


@dataclass(frozen=True)
class Comparison:
    """Two runs. ``differences``: settings in which they differ (``value`` the first's, ``default``
    the second's).

    ``cautions``: why their figures may not be comparable.
    """

    first: Report
    second: Report
    differences: list[Setting]
    cautions: list[str]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        differences = [
            {"key": one.key, "first": one.value, "second": one.default} for one in self.differences
        ]
        return {
            "runs": [self.first.to_json(), self.second.to_json()],
            "differences": differences,
            "cautions": self.cautions,
        }


def read_report(path: Path, progress: Console | None = None) -> Report:
    """The report on one run's folder; ``progress`` shows how far it is, where it takes long.

    Raises:
        UserError: see ``distill.runs.records.read_records``.
    """
    return build_report(read_records(path), progress)


def build_report(records: Records, progress: Console | None = None) -> Report:
    """The report on what is written down."""
    results, config = records.results, records.config
    seed = config.get("seed")
    teacher = TeacherPart(
        records.identity.get("teacher_name", "unknown teacher"),
        records.identity.get("teacher_sha256", ""),
    )
    size = _entry(config, "student", "size")
    best = best_point(records.held_out)
    state = "finished" if results is not None else "running" if records.held else "stopped"
    metrics, final = records.metrics, final_weights(records, progress)
    result = run_verdict(records)
    first, *facts = health(records)
    facts = [first, *guard_facts(metrics, state == "finished"), *facts, *health_facts(metrics)]
    return Report(
        name=records.folder.resolve().name,
        folder=str(records.folder),
        state=state,
        level=result.level,
        verdict=result.facts,
        health=[*facts, *final_facts(final)],
        teacher=teacher if results is None else results.teacher,
        student=StudentPart(None if size is None else str(size))
        if results is None
        else results.student,
        settings=_differences(
            flatten(config), flatten(load_config(None, {}, []).model_dump(mode="json"))
        ),
        seed=seed if isinstance(seed, int) else None,
        max_grad_norm=max_grad_norm(records),
        commutator_margin=_number(_entry(config, "loss", "commutator_margin")),
        steps_logged=len(records.train),
        last_step=records.last_step,
        best_step=results.training.best_step
        if results is not None
        else best.step
        if best is not None
        else None,
        curves=_curves(records),
        held_out=records.held_out,
        validation_kl=f"validation {kl_name(records.validation_over)}",
        safety_ratios=_safety_ratios(results),
        results=results,
        soft_targets=records.identity.get("soft_targets", ""),
        guarded=metrics.guarded,
        events=metrics.events,
        undone=metrics.undone,
        weights=metrics.weights,
        probe=metrics.probe,
        full_ranks=full_ranks(records, final) if metrics.weights else {},
        final_weights=final,
    )


def compare(first: Report, second: Report) -> Comparison:
    """Two runs side by side, and why they may not be comparable."""
    ours, theirs = ({one.key: one for one in report.settings} for report in (first, second))
    differences = []
    for key in sorted(ours.keys() | theirs.keys()):
        default = (ours.get(key) or theirs[key]).default
        values = [runs[key].value if key in runs else default for runs in (ours, theirs)]
        if values[0] != values[1]:
            differences.append(Setting(key, *values))
    cautions = []
    if (first.teacher.name, first.teacher.sha256) != (second.teacher.name, second.teacher.sha256):
        cautions.append("They have different teachers, so their KL is not to the same thing.")
    if not (first.soft_targets and second.soft_targets):
        cautions.append(
            "Not both say which soft targets they learnt from, so their validation text may differ."
        )
    elif first.soft_targets != second.soft_targets:
        cautions.append(
            "They learnt from different soft targets, and their validation text is not the same."
        )
    elif (first.seed, _held_out_share(ours)) != (second.seed, _held_out_share(theirs)):
        cautions.append("Another seed or data.held_out chose other validation text.")
    elif _watched(first) != _watched(second):
        cautions.append(
            "In training, validation scored more of the same text in one than in the other, so "
            "their curves differ by that too."
        )
    if first.results is not None and second.results is not None:
        one, other = first.results.evaluation, second.results.evaluation
        if (one.against, one.kl_over) != (other.against, other.kl_over):
            cautions.append(
                "One was measured against the teacher, the other against stored soft targets."
            )
        cuts = (first.results.vocabulary, second.results.vocabulary)
        if len({None if cut is None else cut.kept for cut in cuts}) > 1:
            cautions.append(
                "Their vocabularies differ, so KL, perplexity and losses are per other tokens; "
                "bits per byte can be compared."
            )
    return Comparison(first, second, differences, cautions)


def _watched(report: Report) -> set[float | None]:
    """Of how many sequences its validation points are."""
    return {point.sequences for point in report.held_out}


def thinned(values: list[float | None], limit: int = CURVE_POINTS) -> list[int]:
    """Places of at most about ``limit`` values that look like all of them: the extremes of each
    stretch, every stretch's first hole, and both ends."""
    if len(values) <= limit:
        return list(range(len(values)))
    stretches = limit // 3
    kept = {0, len(values) - 1}
    for number in range(stretches):
        span = range(number * len(values) // stretches, (number + 1) * len(values) // stretches)
        known = [(value, place) for place in span if (value := values[place]) is not None]
        if known:
            kept |= {min(known)[1], max(known)[1]}
        kept |= (
            {next((place for place in span if values[place] is None), span[0])}
            if len(known) < len(span)
            else set()
        )
    return sorted(kept)


def _curves(records: Records) -> dict[str, Curve]:
    """Every figure of training over steps.

    The parts of the loss share the places of the loss, so that they add up.
    """
    names = dict.fromkeys(name for line in records.train for name in line)
    parts = {"loss", *LOSS_PARTS}
    lines = [line for line in records.train if "loss" in line]
    shared = [lines[place] for place in thinned([line["loss"] for line in lines])]
    curves = {}
    for name in names:
        if name in parts:
            there = [line for line in shared if name in line]
            curves[name] = Curve([step_of(line) for line in there], [line[name] for line in there])
        elif name != "step":
            steps, values = records.column(name)
            places = thinned(values)
            curves[name] = Curve(
                [steps[place] for place in places], [values[place] for place in places]
            )
    return curves


def _safety_ratios(results: Results | None) -> dict[str, list[Ratio]]:
    if results is None or results.heads.safety is None:
        return {}
    safety = results.heads.safety
    return {"all": ratios(safety.test)} | {
        name: ratios(score) for name, score in safety.languages.items()
    }


def _differences(result: dict[str, Any], defaults: dict[str, Any]) -> list[Setting]:
    """What is not as it would be without any flag."""
    return [
        Setting(key, value, defaults.get(key))
        for key, value in result.items()
        if key not in defaults or value != defaults[key]
    ]


def _held_out_share(settings: dict[str, Setting]) -> Any:
    return settings["data.held_out"].value if "data.held_out" in settings else None


def _entry(config: dict[str, Any], section: str, key: str) -> Any:
    result = config.get(section)
    return result.get(key) if isinstance(result, dict) else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
