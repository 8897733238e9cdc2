"""The tables of a report, the same in the terminal and on the page: plain strings, nothing
escaped yet.

Over 400 lines because every table of the report is a short function here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import PureWindowsPath
from typing import Any

from distill.heads.prompts import BUILT_IN, TEACHER
from distill.metrics.closeness import STORED_TARGETS, kl_name
from distill.metrics.intervals import Ratio
from distill.metrics.safety import FIRST, SafetyScore, first_ratios, ratios
from distill.metrics.verification import CASCADE_GOAL, VerificationPart, cascade_goal
from distill.reports.document import Section, Table
from distill.reports.run.guard_log import counted, guard_sections
from distill.reports.run.health_tables import health_sections
from distill.reports.run.report import Comparison, Report
from distill.reports.weights.report import summary_words
from distill.reports.weights.sections import tensor_tables
from distill.runs.records import (
    EvaluationPart,
    ModelScore,
    Results,
    SafetyPart,
    StorePart,
    StudentPart,
    TeacherPart,
    VocabularyPart,
)
from distill.runtime.format import MISSING, figure, human_bytes, human_count, number, share
from students.model.head_decisions import DECISIONS

OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon for the matrices of layers, AdamW for the rest"}
LANGUAGES = {"all": "all languages", "en": "English", "ja": "Japanese"}


def sections(report: Report) -> list[Section]:
    """The parts of the report on one run; those of which nothing is known are left out."""
    result = [_source(report)]
    results = report.results
    if results is not None:
        result.append(result_section(results))
    result.append(_training(report))
    result += guard_sections(report.events, report.undone, report.guarded)
    result += health_sections(report.weights, report.probe, report.full_ranks)
    result += [_rotations(report), *_final_weights(report)]
    if results is not None and results.heads.safety is not None:
        result.append(safety_section(results.heads.safety))
    if results is not None and results.heads.verification is not None:
        result.append(verification_section(results.heads.verification))
    if results is not None:
        result.append(environment_section(results, report.seed))
    return result


def comparison_sections(comparison: Comparison) -> list[Section]:
    """The parts of a comparison."""
    first, second = comparison.first, comparison.second
    rows = [
        [title, one, other]
        for (title, one), (_, other) in zip(_summary(first), _summary(second), strict=True)
        if (one, other) != (MISSING, MISSING)
    ]
    settings = [[one.key, _plain(one.value), _plain(one.default)] for one in comparison.differences]
    heads = [f"A: {first.name}", f"B: {second.name}"]
    tables = [Table("Both runs", ["", *heads], rows)]
    if settings:
        tables.append(Table("Settings in which they differ", ["setting", *heads], settings))
    words = comparison.cautions or ["Same teacher and soft targets, same validation text."]
    if not settings:
        words = [*words, "No setting differs."]
    return [Section("both", "Side by side", words, tables), Section("curves", "Over steps")]


def _source(report: Report) -> Section:
    """Teacher, student, store, and the settings that are not the defaults."""
    teacher, results = report.teacher, report.results
    rows = [["teacher", teacher_text(teacher)], ["student", student_text(report.student)]]
    if results is not None:
        rows.append(["soft targets", _store_words(results.soft_targets)])
    elif report.soft_targets:
        rows.append(["soft targets", f"those with the key {report.soft_targets[:16]}…"])
    if teacher.sha256:
        rows.append(["teacher's SHA-256", teacher.sha256])
    rows.append(["folder", report.folder])
    tables = [Table("", ["", ""], rows, wide=True)]
    settings = [[one.key, _plain(one.value), _plain(one.default)] for one in report.settings]
    if settings:
        tables.append(
            Table(
                "Settings that are not the defaults",
                ["setting", "this run", "default"],
                settings,
                wide=True,
            )
        )
    words = [] if settings else ["All settings are the defaults."]
    return Section("source", "What was distilled", words, tables)


def teacher_text(teacher: TeacherPart) -> str:
    """What is known of the teacher, in a line."""
    parts = [teacher.name]
    parts += [teacher.architecture] if teacher.architecture else []
    parts += [f"{human_count(teacher.parameters)} parameters"] if teacher.parameters else []
    if teacher.width is not None and teacher.layers is not None:
        parts.append(f"width {teacher.width:,} × {teacher.layers} layers")
    parts += [f"{teacher.vocab_size:,} tokens in its vocabulary"] if teacher.vocab_size else []
    parts += [human_bytes(teacher.file_bytes)] if teacher.file_bytes else []
    return ", ".join(parts)


def student_text(student: StudentPart) -> str:
    """What is known of the student, in a line."""
    parts = [f"SO8T {student.size}" if student.size else "SO8T, size following the teacher's"]
    parts += [f"{human_count(student.parameters)} parameters"] if student.parameters else []
    parts += [f"{human_bytes(student.file_bytes)} as {student.quant}"] if student.file_bytes else []
    return ", ".join(parts)


def _store_words(store: StorePart) -> str:
    words = [
        f"{store.sequences:,} sequences, {human_count(store.tokens)} tokens, "
        f"{human_bytes(store.bytes)}"
    ]
    if store.positions is not None:
        words.append(f"{human_count(store.positions)} tokens trained on")
    kind = store.recipe.get("kind")
    if kind is not None:
        topk = f" (top {store.recipe.get('num_topk')})" if kind == "compact" else ""
        words.append(f"kind {kind}{topk}")
    if store.sketch is not None:
        size, kl = store.sketch["bytes"], store.sketch["kl"]
        words.append(f"the tail's shape in {size:g} bytes, to a KL of {kl:.2g}")
    if store.truncation:
        words.append(f"truncated: {store.truncation}")
    words.append("captured before" if store.reused else "captured by this run")
    return f"{', '.join(words)}; {store.folder}"


def result_section(results: Results) -> Section:
    """Teacher, student and exported file at a glance, and the proof."""
    result = results.evaluation
    note = (
        f"Over {result.positions:,} validation tokens at temperature 1, against the "
        f"{result.against}; "
        f"{kl_name(result.kl_over)} over the {result.kl_over}."
    )
    if results.vocabulary is not None:
        note += f" {vocabulary_words(results.vocabulary)}"
    if result.against == STORED_TARGETS:
        note += " The teacher was not there: its perplexity is what its stored targets give."
    head = ["", "teacher", "before training", "trained", "exported file", ""]
    glance = Table(
        "",
        head,
        [
            *_score_rows(result),
            *_vocabulary_rows(results.vocabulary),
            *_size_rows(results),
            *_head_rows(results),
        ],
        note,
        spare=(3,),
    )
    return Section("result", "Teacher, student and exported file", [], [glance, _proof(results)])


def _score_rows(result: EvaluationPart) -> list[list[str]]:
    known, about = result.teacher, "≈ " if result.against == STORED_TARGETS else ""
    own = MISSING if known is None or known.perplexity is None else about + number(known.perplexity)
    rows = []
    for title, key, teacher in (
        (f"{kl_name(result.kl_over)} (nats/token)", "kl", "0"),
        ("same top token", "agreement", "100%"),
        ("perplexity", "perplexity", own),
    ):
        scores = [_score(score, key) for score in (result.before, result.after, result.exported)]
        low, high = result.exported.intervals.get(key, (None, None))
        interval = ""
        if low is not None and high is not None and low <= high:
            ends = (share(low), share(high)) if key == "agreement" else (figure(low), figure(high))
            interval = f"95 %: {ends[0].removesuffix('%')}–{ends[1]}"
        rows.append([title, teacher, *scores, interval])
    return rows


def vocabulary_words(part: VocabularyPart) -> str:
    """What a student's vocabulary is, and what of the teacher is not in it."""
    return (
        f"The student has {part.kept:,} of the teacher's {part.of:,} tokens: of text that the "
        f"choice did not see, they hold {1 - part.dropped_mass:.2%} of the teacher's probability "
        f"and make {part.added_tokens:+.2%} tokens. That of the others counts for the first piece "
        "of their text."
    )


def _vocabulary_rows(part: VocabularyPart | None) -> list[list[str]]:
    """A vocabulary that is a part of the teacher's, and what that costs."""
    if part is None:
        return []
    bits = part.bits_per_byte
    teacher, student, over = (
        number(bits[name]) if name in bits else MISSING
        for name in ("teacher", "student", "reduced_teacher")
    )
    fewer = f"{part.of / max(1, part.kept):.1f}× fewer"
    note = "" if over == MISSING else f"teacher over the student's tokens: {over}"
    return [
        ["bits per byte", teacher, *[MISSING] * 2, student, note],
        ["vocabulary", f"{part.of:,}", *[f"{part.kept:,}"] * 3, fewer],
    ]


def _size_rows(results: Results) -> list[list[str]]:
    teacher, student = results.teacher, results.student
    fewer = _times(teacher.parameters, student.parameters, ("fewer", "more"))
    smaller = _times(teacher.file_bytes, student.file_bytes, ("smaller", "larger"))
    quant = f" ({student.quant})" if student.quant else ""
    rows = [
        ["parameters", _count(teacher.parameters), *[_count(student.parameters)] * 3, fewer],
        ["file size", _bytes(teacher.file_bytes), *[MISSING] * 2, _bytes(student.file_bytes)],
    ]
    rows[1].append(smaller + quant)
    for kind, title in (("generation", "decode (tokens/s)"), ("prompt", "prefill (tokens/s)")):
        speeds = [
            results.tokens_per_second.get(model, {}).get(kind) for model in ("teacher", "student")
        ]
        first, last = (MISSING if speed is None else f"{speed:,.0f}" for speed in speeds)
        ratio = f"{speeds[1] / speeds[0]:.1f}×" if speeds[0] and speeds[1] else ""
        rows.append([title, first, MISSING, MISSING, last, ratio])
    return rows


def _head_rows(results: Results) -> list[list[str]]:
    """One row for each head that the student has."""
    rows, heads = [], results.heads
    if heads.safety is not None:
        shares = " · ".join(share(ratio.value) for ratio in first_ratios(heads.safety.test))
        words = "refuse, allow recall · false refusals"
        rows.append(["safety head", *[MISSING] * 3, shares, words])
    if (result := heads.verification) is not None:
        known = "" if result.auroc is None else f"AUROC {result.auroc:.3f}"
        error = f"calibration error {result.calibration_error:.3f}"
        rows.append(["verification head", *[MISSING] * 3, known or MISSING, error])
    return rows


def _times(teacher: float | None, student: float | None, words: tuple[str, str]) -> str:
    """How many times less than the teacher's, or more."""
    if not teacher or not student:
        return ""
    ratio = teacher / student
    return f"{ratio:.1f}× {words[0]}" if ratio >= 1 else f"{1 / ratio:.1f}× {words[1]}"


def _proof(results: Results) -> Table:
    proof, original = results.proof, results.f32_proof
    proofs = [proof] if original is None or original == proof else [original, proof]
    rows = [
        ["compared with", *(one.against for one in proofs)],
        ["positions compared", *(f"{one.positions:,}" for one in proofs)],
        ["largest difference of a logit", *(f"{one.max_logit_difference:.2e}" for one in proofs)],
        ["KL from that (nats/token)", *(f"{one.mean_kl:.2e}" for one in proofs)],
        ["same top token", *(f"{one.agreement:.2%}" for one in proofs)],
        ["texts with the teacher's token ids", *(f"{one.token_lines:,}" for one in proofs)],
    ]
    title = "Proof: the file in llama.cpp is the trained model"
    return Table(title, ["", *(one.quant for one in proofs)], rows)


def _training(report: Report) -> Section:
    """Validation scores over steps."""
    rows = []
    for point in report.held_out:
        best = " (best)" if point.step == report.best_step else ""
        rows.append(
            [
                f"{point.step:,}{best}",
                figure(point.kl),
                share(point.agreement),
                figure(point.cross_entropy),
            ]
        )
    words = [
        f"{report.steps_logged:,} steps are logged. All parts of the loss are weighted: they add "
        "up to it."
    ]
    name = report.validation_kl
    head = ["step", name.removeprefix("validation "), "same top token", "cross-entropy"]
    note = f"At T = 1; {name} and cross-entropy in nats per token."
    return Section(
        "training", "Training", words, [Table("Validation", head, rows, note)] if rows else []
    )


def _rotations(report: Report) -> Section:
    """What the rotations must keep to, and whether they did."""
    words = (
        "Each layer's attention output passes two rotations of SO(8): they must stay "
        "orthogonal and never commute."
    )
    if report.commutator_margin is not None:
        words += f" The loss pushes commutators that are smaller than {report.commutator_margin:g}."
    rows = []
    for title, name in (
        ("distance from a rotation", "rotation_error"),
        ("smallest commutator", "min_commutator"),
        ("mean commutator", "mean_commutator"),
        ("drift from their average", "rotation_drift"),
        ("second difference", "second_difference"),
    ):
        known = (
            [value for value in report.curves[name].values if value is not None]
            if name in report.curves
            else []
        )
        if known:
            rows.append([title, *map(number, (known[0], min(known), max(known), known[-1]))])
    head = ["over all steps", "first", "smallest", "largest", "last"]
    return Section("rotations", "Rotations", [words], [Table("", head, rows)] if rows else [])


def _final_weights(report: Report) -> list[Section]:
    """The weights that there are now."""
    final = report.final_weights
    if final is None or final.report is None:
        return []
    words = [f"Of {final.source}: {summary_words(final.report)}."]
    words += [
        f"{len(names):,} tensors were left out: {reason}."
        for reason, names in final.report.left_out.items()
    ]
    return [Section("weights", "Weights", words, tensor_tables(final.report.tensors))]


def safety_section(safety: SafetyPart) -> Section:
    """The safety head's ratios with their intervals, by language, and its confusion matrix."""
    origin = {BUILT_IN: "come with the program", TEACHER: "are the teacher's own judgment"}
    prompts, scenarios = safety.prompts, safety.scenarios
    labels = origin.get(safety.labels_from, f"come from {PureWindowsPath(safety.labels_from).name}")
    others, crossed = prompts.get("validation", 0), safety.cross_validation
    read = others if crossed is None else crossed.prompts
    calibrated = f"{read:,} of these, which the student has read" if read < others else "these"
    words = [
        f"Labels {labels}. Fitted to {prompts.get('train', 0):,} prompts and {others:,} others; "
        f"its probabilities are calibrated on {calibrated}, each predicted by a head that had seen "
        "none of its author or scene. "
        + ("Of prompts that it has not read, the words alone count. " if read < others else "")
        + "All figures but those of the cross-validation are over "
        f"{safety.test.prompts:,} held-out prompts of {scenarios.get('test', 0):,} scenarios, none "
        "of which the student has seen.",
        "The 95 % intervals take prompts as independent. Several prompts tell the same scenario, "
        "so the real uncertainty is larger.",
        _rule(safety),
    ]
    by_language = {
        name: safety_rows(score) for name, score in {"all": safety.test, **safety.languages}.items()
    }
    tables = [
        Table(
            f"Held-out prompts, {LANGUAGES.get(language, language)}",
            ["", "share", "cases", "95 % interval"],
            result,
        )
        for language, result in by_language.items()
    ]
    if (left_out := safety.cross_validation) is not None:
        title = "Cross-validation: scenes that were left out"
        tables.append(Table(title, ["", "share", "cases", "95 % interval"], safety_rows(left_out)))
    score = {"all": safety.test, **safety.languages}
    rows = [
        [
            LANGUAGES.get(name, name),
            f"{one.prompts:,}",
            f"{one.accuracy:.1%}",
            f"{one.calibration_error:.3f}",
        ]
        for name, one in score.items()
    ]
    tables.insert(
        1, Table("By language", ["", "prompts", "right decisions", "calibration error"], rows)
    )
    counts = [
        [name, *map(str, row)] for name, row in zip(DECISIONS, safety.test.confusion, strict=True)
    ]
    tables.insert(1, Table("Label (row) and decision (column)", ["", *DECISIONS], counts))
    if safety.test.reliability:
        tables.insert(2, _reliability(safety))
    return Section("safety", "Safety head", words, tables)


def safety_rows(score: SafetyScore) -> list[list[str]]:
    """Every ratio with cases and interval, then the expected cost."""
    rows = [_ratio_row(ratio) for ratio in ratios(score)]
    if score.cost is not None and score.cost_interval is not None:
        low, high = score.cost_interval
        rows.append(
            [
                "Expected Cost",
                f"{score.cost:.3f}",
                f"escalating everything {score.cost_escalating:.3f}",
                f"{low:.3f} to {high:.3f}",
            ]
        )
    return rows


def _rule(safety: SafetyPart) -> str:
    """How decisions come of probabilities."""
    if not safety.costs:
        refuse, allow = (safety.thresholds.get(name, 0.0) for name in ("refuse", "allow"))
        return (
            f"It refuses from a REFUSE probability of {refuse:.3f} on. Of the others it allows "
            f"those where ALLOW holds at least {allow:.3f} of what REFUSE leaves, and escalates "
            "the rest."
        )
    told = [
        f"{label} {' / '.join(f'{cost:g}' for cost in row)}"
        for label, row in zip(DECISIONS, safety.costs, strict=True)
    ]
    return (
        "It decides what costs least by its probabilities, where ALLOW / ESCALATE / REFUSE cost, "
        f"by label: {'; '.join(told)}. What is unclear is therefore escalated."
    )


def _reliability(safety: SafetyPart) -> Table:
    """How often decisions were right, by the probability that they would be."""
    rows = [
        [f"{mean:.0%}", f"{true:.0%}", f"{count:,}"]
        for count, mean, true in safety.test.reliability
    ]
    title = "Confidence: how often decisions were right"
    return Table(title, ["mean probability", "right", "prompts"], rows)


def _ratio_row(ratio: Ratio) -> list[str]:
    if ratio.value is None or ratio.low is None or ratio.high is None:
        return [ratio.name, MISSING, "no case", MISSING]
    interval = f"{100 * ratio.low:.1f}–{ratio.high:.1%}"
    return [ratio.name, f"{ratio.value:.1%}", f"{ratio.right} of {ratio.cases}", interval]


def verification_section(result: VerificationPart) -> Section:
    """Whether the student knows where it agrees with the teacher, and what that is good for."""
    words = [
        "For every token it writes, the student says how probably the teacher would write the "
        "same one. Here over "
        f"{result.positions:,} validation tokens, of which {result.agreement:.1%} agree."
    ]
    rows = [
        [
            "AUROC (0.5: guessing, 1: knows)",
            MISSING if result.auroc is None else f"{result.auroc:.3f}",
        ],
        ["calibration error", f"{result.calibration_error:.3f}"],
        ["the student alone agrees", f"{result.agreement:.1%}"],
        ["asks the teacher below a probability of", f"{result.trust:.3f}"],
    ]
    if (there := result.at_trust) is not None:
        rows.append(["teacher then answers", f"{there.escalated:.1%}"])
        rows.append(["and of all tokens agree", f"{there.agreement:.1%}"])
    if (goal := cascade_goal(result)) is not None:
        words.append(cascade_words(result))
        rows.append([f"teacher answers, for {CASCADE_GOAL:.0%} agreement", f"{goal.escalated:.1%}"])
    return Section("verification", "Verification head", words, [Table("", ["", ""], rows)])


def cascade_words(result: VerificationPart) -> str:
    """One sentence on the cascade's goal."""
    goal = cascade_goal(result)
    if goal is None:
        return f"No share of tokens answered by the teacher reaches {CASCADE_GOAL:.0%} agreement."
    return (
        f"If the teacher answers the {goal.escalated:.0%} of tokens of which the student is least "
        "certain, and the "
        f"student the other {1 - goal.escalated:.0%}, {goal.agreement:.1%} of all tokens are the "
        "teacher's."
    )


def environment_section(results: Results, seed: int | None) -> Section:
    """Versions, seed and time."""
    result, padding = results.environment, results.training.padding
    rows = [
        ["seed", MISSING if seed is None else str(seed)],
        ["Python", result.python],
        [
            "processor",
            f"{result.machine}, {result.cpu}, {result.threads} "
            f"thread{'s' if result.threads != 1 else ''}",
        ],
        ["precision of training", results.training.precision],
        ["optimizer", OPTIMIZERS.get(results.training.optimizer, results.training.optimizer)],
        *([["padding in training", share(padding)]] if padding is not None else []),
        *([name, version] for name, version in result.packages.items()),
        *([["llama.cpp ran", results.llama_cpp.text]] if results.llama_cpp.text else []),
    ]
    stages = [[name, f"{seconds:,.1f} s"] for name, seconds in results.stage_seconds.items()]
    return Section(
        "environment",
        "Environment",
        [],
        [
            Table("What computed it", ["", ""], rows, wide=True),
            Table("How long it took", ["stage", "time"], stages),
        ],
    )


def _summary(report: Report) -> Iterable[tuple[str, str]]:
    """Titles and figures of one run, as a comparison shows them."""
    results = report.results
    yield (
        "state",
        {"finished": "finished", "running": "still running"}.get(report.state, "not finished"),
    )
    yield "teacher", report.teacher.name
    yield "student", report.student.size or MISSING
    yield "parameters", _count(report.student.parameters)
    yield "file size", _bytes(report.student.file_bytes)
    yield "steps", f"{report.last_step:,}"
    yield (
        "tokens learnt from",
        MISSING if results is None else human_count(results.training.tokens_seen),
    )
    yield "closeness", report.level
    yield "seconds of training", MISSING if results is None else f"{results.training.seconds:,.0f}"
    actions = Counter(event.action for event in report.events)
    words = ", ".join(counted(action, count) for action, count in actions.items()) or "nothing"
    yield "the guard did", words if report.guarded else MISSING
    yield "steps taken back", f"{report.undone:,}" if report.guarded else MISSING
    told = [value for line in report.probe if (value := line.get("information")) is not None]
    yield "information at the end (nats)", figure(told[-1]) if told else MISSING
    best = next((point for point in report.held_out if point.step == report.best_step), None)
    yield "best step", MISSING if report.best_step is None else f"{report.best_step:,}"
    for name in ("validation KL", "validation bucket KL"):
        kl = best.kl if best is not None and report.validation_kl == name else None
        yield f"best {name}", figure(kl)
    yield "its agreement", MISSING if best is None else share(best.agreement)
    yield "its cross-entropy", MISSING if best is None else figure(best.cross_entropy)
    exported = None if results is None else results.evaluation.exported
    known_kl = {} if results is None else {kl_name(results.evaluation.kl_over): exported}
    for name in ("KL", "bucket KL"):
        one = known_kl.get(name)
        yield f"exported file, {name}", MISSING if one is None else figure(one.kl)
    for name in ("agreement", "perplexity"):
        yield f"exported file, {name}", MISSING if exported is None else _score(exported, name)
    result = report.safety_ratios.get("all", [])
    for place, name in enumerate(FIRST):
        yield f"safety, {name.lower()}", share(result[place].value) if result else MISSING
    head = None if results is None else results.heads.verification
    goal = None if head is None else cascade_goal(head)
    yield "verification, AUROC", MISSING if head is None else figure(head.auroc)
    yield (
        f"teacher answers, for {CASCADE_GOAL:.0%}",
        MISSING if goal is None else f"{goal.escalated:.1%}",
    )
    speeds = {} if results is None else results.tokens_per_second
    yield "writing (tokens/s)", _speed(speeds, "student", "generation")


def _score(score: ModelScore, key: str) -> str:
    value = getattr(score, key)
    return share(value) if key == "agreement" else figure(value)


def _speed(speeds: dict[str, dict[str, float]], model: str, kind: str) -> str:
    value = speeds.get(model, {}).get(kind)
    return MISSING if value is None else f"{value:,.0f}"


def _count(value: int | None) -> str:
    return MISSING if value is None else human_count(value)


def _bytes(value: int | None) -> str:
    return MISSING if value is None else human_bytes(value)


def _plain(value: Any) -> str:
    """A setting's value as one would write it."""
    return (
        "none"
        if value is None
        else value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False)
    )
