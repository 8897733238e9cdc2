"""The tables of a comparison's page: plain strings, nothing escaped yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill.evaluation.pareto import fidelity_of, size_front, speed_front
from distill.evaluation.records import Comparison, ModelEvaluation
from distill.metrics.intervals import Z95, Figure
from distill.metrics.safety import ratios
from distill.reports.comparison.facts import counted, level_name
from distill.reports.document import Section, Table
from distill.reports.verdict import share_spread, spread
from distill.runtime.format import MISSING, human_bytes, human_count, number
from students.model.head_decisions import DECISIONS


def sections(comparison: Comparison) -> list[Section]:
    """The parts of the page; those of which nothing is known are left out."""
    result = [_trade(comparison), _fidelity(comparison), _text(comparison)]
    everyone = [comparison.teacher, *comparison.students]
    if any(model.task for model in everyone):
        result.append(_tasks(everyone))
    if any(model.safety for model in everyone):
        result.append(_safety(everyone))
    if any(model.harness for model in everyone):
        result.append(_harness(everyone))
    return [*result, _source(comparison), _environment(comparison)]


def harness_rows(models: Sequence[ModelEvaluation]) -> list[tuple[str, str]]:
    """All tasks and metrics of lm-evaluation-harness that any model has, without their standard
    errors."""
    result = dict.fromkeys(
        (task, metric)
        for model in models
        for task, metrics in model.harness.items()
        for metric in metrics
        if "_stderr" not in metric
    )
    return list(result)


def harness_figure(model: ModelEvaluation, task: str, metric: str) -> Figure | None:
    """A metric with the normal 95 % interval that its standard error gives."""
    metrics = model.harness.get(task, {})
    value = metrics.get(metric)
    if value is None:
        return None
    name, comma, chain = metric.partition(",")
    error = metrics.get(f"{name}_stderr{comma}{chain}")
    return (
        Figure(value) if error is None else Figure(value, value - Z95 * error, value + Z95 * error)
    )


def _trade(comparison: Comparison) -> Section:
    """Size, speed and nearness of every model."""
    teacher, students = comparison.teacher, comparison.students
    small, fast = size_front(students), speed_front(students)
    rows = [[f"{teacher.name} (teacher)", *_cost(teacher, teacher), "0", MISSING, MISSING]]
    for place, student in enumerate(students):
        fronts = [name for name, kept in (("size", small), ("speed", fast)) if place in kept]
        kl = number(fidelity_of(student).kl.value)
        front = " and ".join(fronts) or "neither"
        rows.append([student.name, *_cost(student, teacher), kl, level_name(student), front])
    head = [
        "",
        "file type",
        "parameters",
        "file size",
        "reading",
        "writing",
        "peak memory",
        "KL",
        "closeness",
        "front",
    ]
    if len(students) == 1:
        head, rows = head[:-1], [row[:-1] for row in rows]
    note = (
        "File size: with its share of the teacher's. Reading and writing: tokens per second of one "
        "sequence, on the "
        "machine that is named below."
    )
    if len(students) > 1:
        note += (
            " Front: no other student is as near to the teacher and smaller (size), or faster "
            "at writing (speed)."
        )
    return Section("trade", "Size, speed and nearness", [], [Table("", head, rows, note)])


def _cost(model: ModelEvaluation, teacher: ModelEvaluation) -> list[str]:
    return [
        model.file_type or MISSING,
        human_count(model.parameters),
        f"{human_bytes(model.file_bytes)} ({model.file_bytes / teacher.file_bytes:.1%})",
        f"{model.prompt_speed:,.0f}",
        f"{model.generation_speed:,.0f}",
        human_bytes(model.peak_memory),
    ]


def _fidelity(comparison: Comparison) -> Section:
    """How near every student is to the teacher."""
    near, draft = [], []
    for student in comparison.students:
        one = fidelity_of(student)
        figures = [
            spread(one.kl),
            spread(one.reverse_kl),
            share_spread(one.top1),
            share_spread(one.top5),
        ]
        near.append([student.name, *figures])
        alike = MISSING if one.greedy_prefix is None else spread(one.greedy_prefix, ".1f")
        draft.append(
            [
                student.name,
                *_apart(share_spread(one.acceptance)),
                f"{one.tokens_per_pass:.2f}",
                alike,
            ]
        )
    first = fidelity_of(comparison.students[0])
    tables = [
        Table(
            "",
            ["", "KL (nats/token)", "reverse KL", "same top token", "top 5"],
            near,
            "KL is KL(teacher ‖ student), reverse KL is KL(student ‖ teacher). Top 5: how many of "
            "the teacher's five "
            "most probable tokens are among the student's.",
        ),
        Table(
            "As a draft for the teacher, and writing by itself",
            ["", "acceptance", "95 % interval", "tokens per pass", "written alike"],
            draft,
            "Acceptance: the chance that the teacher takes a token that the student drafts. Tokens "
            "per pass: how many "
            f"each pass of the teacher then gives, of {first.draft_length} drafted. Written alike: "
            "how many tokens, of "
            f"{first.prefix_length} at most, both write in the same way at temperature 0.",
        ),
    ]
    words = ["Measured at temperature 1, over the whole vocabulary, at the same positions for all."]
    if first.kl.low is not None:
        words[0] += " In brackets: 95 % intervals, over sequences."
        if len(comparison.students) > 1:
            words[0] += (
                " The students read the same text, so a difference between two of them is surer "
                "than their "
                "intervals look."
            )
    return Section("fidelity", "How near the students are", words, tables)


def _text(comparison: Comparison) -> Section:
    """The text's own next tokens."""
    teacher = comparison.teacher
    rows = []
    for model in (teacher, *comparison.students):
        name = f"{model.name} (teacher)" if model is teacher else model.name
        ratio = model.perplexity.value / teacher.perplexity.value
        rows.append(
            [
                name,
                *_apart(spread(model.perplexity)),
                f"{ratio:.3f}",
                f"{model.calibration_error:.3f}",
            ]
        )
    head = ["", "perplexity", "95 % interval", "of the teacher's", "calibration error"]
    note = (
        "Perplexity of the next tokens that the text really has. Calibration error: how far the "
        "probability of the "
        "most probable token is from how often it is right, over 15 bins."
    )
    return Section("text", "The text's own next tokens", [], [Table("", head, rows, note)])


def _apart(said: str) -> list[str]:
    """A figure with its interval in brackets, as two cells."""
    value, _, interval = said.partition(" ")
    return [value, interval.strip("()") or MISSING]


def _tasks(everyone: Sequence[ModelEvaluation]) -> Section:
    rows = []
    for place, model in enumerate(everyone):
        if model.task is not None:
            name = model.name if place else f"{model.name} (teacher)"
            rows.append(
                [
                    name,
                    f"{model.task.right} of {model.task.prompts}",
                    share_spread(model.task.share),
                ]
            )
    names = sorted({model.task.name for model in everyone if model.task is not None})
    note = f"{', '.join(names)}: answers at temperature 0, with Wilson's 95 % interval."
    return Section(
        "tasks", "Prompts with known answers", [], [Table("", ["", "right", "share"], rows, note)]
    )


def _safety(everyone: Sequence[ModelEvaluation]) -> Section:
    """Ratios of every safety head, and its counts."""
    tables = []
    for model in everyone:
        if model.safety is None:
            continue
        rows = []
        for ratio in ratios(model.safety):
            known = Figure(ratio.value, ratio.low, ratio.high) if ratio.value is not None else None
            cases = f"{ratio.right} of {ratio.cases}" if ratio.cases else "no case"
            rows.append([ratio.name, cases, MISSING if known is None else share_spread(known)])
        counts = [
            ", ".join(f"{count} {name}" for count, name in zip(row, DECISIONS, strict=True))
            for row in model.safety.confusion
        ]
        told = [f"{name}: {row}" for name, row in zip(DECISIONS, counts, strict=True) if row]
        note = f"{model.safety.prompts:,} prompts. Decisions by label: {'; '.join(told)}."
        tables.append(Table(model.name, ["", "cases", "share"], rows, note))
    words = [
        "What each safety head decides on labelled prompts. The 95 % intervals (Wilson) take "
        "prompts as independent; "
        "where several tell the same matter, the real uncertainty is larger."
    ]
    return Section("safety", "Safety decisions", words, tables)


def _harness(everyone: Sequence[ModelEvaluation]) -> Section:
    told = [model for model in everyone if model.harness]
    rows = []
    for task, metric in harness_rows(everyone):
        figures = [harness_figure(model, task, metric) for model in told]
        rows.append(
            [f"{task}: {metric}", *(MISSING if one is None else spread(one) for one in figures)]
        )
    head = [
        "",
        *(f"{model.name} (teacher)" if model is everyone[0] else model.name for model in told),
    ]
    note = "With the 95 % interval that the harness's standard error gives, where it gives one."
    return Section("harness", "lm-evaluation-harness", [], [Table("", head, rows, note)])


def _source(comparison: Comparison) -> Section:
    """The text, the files, and what the figures cannot say."""
    much = (
        f"{counted(comparison.sequences, 'sequence')}, "
        f"{counted(comparison.positions, 'next token')}"
    )
    words = [f"Text: {comparison.text}. {much}."]
    if comparison.skipped:
        words.append(
            "Left out, longer than a model's context holds: "
            f"{counted(comparison.skipped, 'sequence')}."
        )
    if comparison.sequences > 1:
        words.append(
            "Intervals are over sequences: they say how much the figures would move with other "
            "text of the same kind, "
            "and nothing about other kinds."
        )
    else:
        words.append("With one sequence there are no intervals.")
    rows = [["tokens' SHA-256", comparison.text_sha256], ["seed", str(comparison.seed)]]
    tables = [Table("Text", ["", ""], rows, wide=True)]
    files = []
    for model in (comparison.teacher, *comparison.students):
        files.append(
            [model.name, model.architecture, model.file_type or MISSING, model.path, model.sha256]
        )
    tables.append(
        Table("Files", ["", "architecture", "file type", "path", "SHA-256"], files, wide=True)
    )
    return Section("source", "What was compared", words, tables)


def _environment(comparison: Comparison) -> Section:
    """What computed it, whatever is known of it."""
    rows = [[str(name), value] for name, value in _flat(comparison.environment)]
    return Section("environment", "What computed it", [], [Table("", ["", ""], rows, wide=True)])


def _flat(tree: dict[str, Any]) -> list[tuple[str, str]]:
    result: list[tuple[str, str]] = []
    for name, value in tree.items():
        result += _flat(value) if isinstance(value, dict) else [(name, str(value))]
    return result
