"""What a comparison says in plain words: each fact is computed from it, and none is said without
its figures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from distill.evaluation.pareto import fidelity_of, kl_of, quantizations, size_front
from distill.evaluation.records import Comparison, ModelEvaluation
from distill.metrics.closeness import BOUNDS, WHOLE_VOCABULARY, level_of
from distill.metrics.intervals import Figure
from distill.metrics.safety import REFUSE_RECALL
from distill.reports.document import Fact
from distill.reports.verdict import Verdict, level_fact, share_spread
from distill.runtime.format import human_bytes, number
from students.model.head_decisions import REFUSE

FEW_SEQUENCES = 30  # with fewer, the intervals are themselves rough


def trade_facts(comparison: Comparison) -> list[Fact]:
    """What else there is to say, the most important first."""
    teacher, students = comparison.teacher, comparison.students
    facts = _extremes(teacher, students)
    facts += [_quantisation(group) for group in quantizations(students)]
    facts += [*_beaten(students), _perplexity(teacher, students), _draft(students)]
    facts += [*_task(comparison), *_safety(students), *_doubts(comparison)]
    return facts


def level_name(student: ModelEvaluation) -> str:
    """The level of a student's closeness."""
    fidelity = fidelity_of(student)
    return level_of(fidelity.kl.value, fidelity.top1.value).name


def verdict_of(students: Sequence[ModelEvaluation]) -> Verdict:
    """The verdict on the nearest student; which others share its level."""
    order = sorted(students, key=kl_of)
    best = order[0]
    fidelity = fidelity_of(best)
    level, fact = level_fact(fidelity.kl, fidelity.top1, WHOLE_VOCABULARY, best.name)
    facts = [fact, Fact("plain", f"Bounds: {BOUNDS} (reasons: docs/verdict.md).")]
    if len(order) > 1:
        words = f"It is the nearest of {len(order)} students"
        rivals = [other.name for other in order[1:] if _overlap(fidelity.kl, fidelity_of(other).kl)]
        if rivals:
            words += f". Its interval overlaps that of {_some(rivals)}"
        for name, some in groupby(order, level_name):
            words += f". {name.capitalize()}: {_some([one.name for one in some])}"
        facts.insert(1, Fact("plain", words + "."))
    return Verdict(level, facts)


def _extremes(teacher: ModelEvaluation, students: Sequence[ModelEvaluation]) -> list[Fact]:
    """The smallest and the fastest student against the teacher."""
    small = min(students, key=lambda student: student.file_bytes)
    fast = max(students, key=lambda student: student.generation_speed)
    part = small.file_bytes / teacher.file_bytes
    times = fast.generation_speed / teacher.generation_speed
    size = f"{human_bytes(small.file_bytes)}, {_part(part)} of the teacher's file."
    speed = f"{fast.generation_speed:,.0f} tokens per second, {_times(times)} the teacher's."
    if len(students) > 1:
        words = [f"Smallest: {small.name}, {size}", f"Fastest: {fast.name}, {speed}"]
    else:
        words = [f"{small.name} takes {size}", f"{fast.name} writes {speed}"]
    better = [part < 1, times > 1]
    return [
        Fact("good" if is_so else "warning", one) for one, is_so in zip(words, better, strict=True)
    ]


def _quantisation(group: Sequence[ModelEvaluation]) -> Fact:
    """What the smaller files of one model lose against its largest."""
    whole, *smaller = group
    full = fidelity_of(whole).kl

    def cost(student: ModelEvaluation) -> str:
        change = kl_of(student) - full.value
        more = f"{number(abs(change))} {'higher' if change >= 0 else 'lower'}"
        part = _part(student.file_bytes / whole.file_bytes)
        return f"{student.file_type} has {part} of the bytes, and its KL is {more}"

    words = (
        f"Quantisation, if the {len(group)} students of architecture {whole.architecture} with "
        f"{whole.parameters:,} parameters are one model: against {whole.file_type} (KL "
        f"{number(full.value)}), "
    )
    free = [student for student in smaller if _overlap(full, fidelity_of(student).kl)]
    if free and free[-1] is not smaller[-1]:
        words += f"{cost(free[-1])}: it is the smallest whose interval overlaps; "
    words += cost(smaller[-1])
    if free and free[-1] is smaller[-1]:
        words += ": its interval overlaps"
    elif not free and full.low is not None:
        words += ". No interval of the others overlaps"
    return Fact("plain", words + ".")


def _beaten(students: Sequence[ModelEvaluation]) -> list[Fact]:
    """Students that another one beats in size and nearness."""
    kept = size_front(students)
    beaten = [student.name for place, student in enumerate(students) if place not in kept]
    if not beaten:
        return []
    return [
        Fact(
            "plain",
            "Another student is both at least as small and at least as near as "
            f"{_some(beaten, 'or')}.",
        )
    ]


def _perplexity(teacher: ModelEvaluation, students: Sequence[ModelEvaluation]) -> Fact:
    values = sorted(student.perplexity.value for student in students)
    theirs = (
        number(values[0]) if len(values) == 1 else f"{number(values[0])} to {number(values[-1])}"
    )
    who = "student's" if len(values) == 1 else "students'"
    own = number(teacher.perplexity.value)
    return Fact(
        "plain",
        f"Perplexity of the text's own next tokens: the teacher's {own}, the {who} {theirs}.",
    )


def _draft(students: Sequence[ModelEvaluation]) -> Fact:
    best = max(students, key=lambda student: fidelity_of(student).tokens_per_pass)
    fidelity = fidelity_of(best)
    return Fact(
        "plain",
        f"As a draft for the teacher, {best.name} would have {share_spread(fidelity.acceptance)} "
        "of its tokens taken: "
        f"{fidelity.tokens_per_pass:.2f} tokens per pass of the teacher when it drafts "
        f"{fidelity.draft_length}.",
    )


def _task(comparison: Comparison) -> list[Fact]:
    told = [student for student in comparison.students if student.task is not None]
    if not told:
        return []
    best = max(told, key=lambda student: student.task.share.value if student.task else 0.0)
    assert best.task is not None
    score = best.task
    words = (
        f"Prompts with known answers ({score.name}): {best.name} has {score.right} of "
        f"{score.prompts} right"
    )
    if comparison.teacher.task is not None:
        words += f", the teacher {comparison.teacher.task.right}"
    return [Fact("plain", words + ".")]


def _safety(students: Sequence[ModelEvaluation]) -> list[Fact]:
    """The safety head that refuses least of what is to be refused, against what it should."""
    known = [
        (student.safety.refuse_recall, student.name, student.safety.confusion[REFUSE])
        for student in students
        if student.safety is not None and student.safety.refuse_recall is not None
    ]
    if not known:
        return []
    recall, name, row = min(known)
    least = (
        f"The safety head of {name}"
        if len(known) == 1
        else f"Of the safety heads, that of {name} refuses least: it"
    )
    words = f"{least} refuses {recall:.1%} ({row[REFUSE]} of {sum(row)}) of what is to be refused"
    if recall < REFUSE_RECALL:
        return [Fact("warning", f"{words}; it should be {REFUSE_RECALL:.0%}.")]
    return [Fact("good", f"{words}; it should be {REFUSE_RECALL:.0%}.")]


def _doubts(comparison: Comparison) -> list[Fact]:
    """Why the figures may be worth less than they seem."""
    facts = [Fact("warning", _sentence(words)) for words in comparison.warnings]
    if comparison.sequences < FEW_SEQUENCES:
        words = f"All is measured on {counted(comparison.sequences, 'sequence')}, which is little"
        facts.append(Fact("warning", f"{words}: the real uncertainty is larger than it looks."))
    if comparison.skipped:
        words = (
            "Left out, longer than a model's context holds: "
            f"{counted(comparison.skipped, 'sequence')}"
        )
        facts.append(Fact("warning", f"{words}. The figures are of the shorter ones."))
    return facts


def _sentence(words: str) -> str:
    """With a capital letter, and a full stop where it does not end otherwise."""
    return f"{words[:1].upper()}{words[1:]}{'' if words.endswith(('.', '?', '!')) else '.'}"


def counted(number: int, thing: str) -> str:
    """So many things: 1 sequence, 2 sequences."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _overlap(first: Figure, second: Figure) -> bool:
    """Whether the intervals of two figures meet; without intervals nothing is said."""
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return False
    return first.low <= second.high and second.low <= first.high


def _part(ratio: float) -> str:
    """A part of something: 12.3 %, or so many times it."""
    return f"{ratio:.1%}" if ratio < 1.5 else f"{ratio:.1f} times"


def _times(ratio: float) -> str:
    return f"{ratio:.2f} times" if ratio < 10 else f"{ratio:,.0f} times"


def _some(names: Sequence[str], word: str = "and") -> str:
    """Up to three names, and how many more."""
    shown = [*names[:3], *([f"{len(names) - 3} more"] if len(names) > 3 else [])]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} {word} {shown[-1]}"
