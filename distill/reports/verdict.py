"""The verdict on a student: its level of closeness by stated bounds, and what the next level would
take. How training went is another matter (``distill.reports.run.health``)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from distill.metrics.closeness import (
    BOUNDS,
    CLOSE,
    FARTHEST,
    LEAST_POINTS,
    NOT_YET,
    TELLING_POINTS,
    VERY_CLOSE,
    WHOLE_VOCABULARY,
    Closeness,
    Curve,
    Forecast,
    expected,
    fit_curve,
    forecast,
    kl_name,
    level_of,
)
from distill.metrics.intervals import Figure
from distill.reports.document import Fact, Level
from distill.runs.metrics_log import best_point, step_of
from distill.runs.records import ModelScore, Records, VocabularyPart
from distill.runtime.format import human_count, human_time, number

SIGN: dict[str, Level] = {
    NOT_YET.name: "warning",
    CLOSE.name: "plain",
    VERY_CLOSE.name: "good",
}
UNKNOWN = "not known"


@dataclass(frozen=True)
class Verdict:
    """The level's name, or ``UNKNOWN``, and what there is to say about it."""

    level: str
    facts: list[Fact]


def spread(figure: Figure, form: str = "") -> str:
    """A figure with its interval, where it has one; ``form``: how to write them, if not with
    three digits or so."""

    def said(value: float) -> str:
        return format(value, form) if form else number(value)

    if figure.low is None or figure.high is None:
        return said(figure.value)
    return f"{said(figure.value)} ({said(figure.low)}–{said(figure.high)})"


def share_spread(figure: Figure) -> str:
    """A share with its interval in percent."""
    if figure.low is None or figure.high is None:
        return f"{figure.value:.1%}"
    return f"{figure.value:.1%} ({100 * figure.low:.1f}–{figure.high:.1%})"


def level_fact(kl: Figure, agreement: Figure, over: str, name: str = "") -> tuple[str, Fact]:
    """The level of a student and the sentence that says it; ``over``: what the KL is over."""
    level = level_of(kl.value, agreement.value)
    whole = over == WHOLE_VOCABULARY
    said = level.name if whole or level is NOT_YET else f"at best {level.name}"
    words = (
        f"{name or 'The student'} is {said}: {kl_name(over)} {spread(kl)} nats per token "
        f"(over the {over}), the same top token in {share_spread(agreement)} of the positions."
    )
    ends = (kl.low, kl.high, agreement.low, agreement.high)
    if None not in ends:
        best, worst = level_of(ends[0], ends[3]), level_of(ends[1], ends[2])  # type: ignore[arg-type]
        others = [one.name for one in dict.fromkeys((worst, best)) if one is not level]
        if others:
            words += f" The 95 % intervals allow “{'” and “'.join(others)}” as well."
    if not whole:
        words += " The bucket KL is at most the KL that levels are bounds of."
    return said, Fact(SIGN[level.name], words)


def run_verdict(records: Records) -> Verdict:
    """The verdict on a run's student: of the exported file, or as far as training has come."""
    best = best_point(records.held_out)
    if records.results is not None:
        evaluation = records.results.evaluation
        score, over = evaluation.exported, evaluation.kl_over
    elif best is not None:
        score = ModelScore(best.kl, best.agreement, best.cross_entropy, None)
        over = records.validation_over
    else:
        return Verdict(UNKNOWN, [Fact("plain", "Nothing has been measured of the student yet.")])
    if score.kl is None or score.agreement is None:
        return Verdict(UNKNOWN, [Fact("warning", "The student's KL is not finite: no verdict.")])
    ends = {
        name: pair
        for name, pair in score.intervals.items()
        if None not in pair and pair[0] <= pair[1]  # type: ignore[operator]
    }
    kl = Figure(score.kl, *ends.get("kl", (None, None)))
    agreement = Figure(score.agreement, *ends.get("agreement", (None, None)))
    name = "" if records.results is not None else "So far the student"
    level, fact = level_fact(kl, agreement, over, name)
    facts = [fact, Fact("plain", f"Bounds: {BOUNDS} (reasons: docs/verdict.md).")]
    if level_of(score.kl, score.agreement) is not VERY_CLOSE:
        facts.append(
            Fact("plain", _next_level(records, Closeness(score.kl, score.agreement), over))
        )
    if (part := None if records.results is None else records.results.vocabulary) is not None:
        facts.append(Fact("plain", _of_the_cut(part)))
    return Verdict(level, facts)


def _of_the_cut(part: VocabularyPart) -> str:
    """What KL does not see of a student with a part of its teacher's vocabulary."""
    bits = part.bits_per_byte
    names = {
        "teacher": "teacher",
        "reduced_teacher": "teacher over these tokens",
        "student": "student",
    }
    known = [f"{title} {number(bits[name])}" for name, title in names.items() if name in bits]
    return (
        f"All this is over the {part.kept:,} of the teacher's {part.of:,} tokens that the student "
        f"has; what their choice costs shows in bits per byte: {', '.join(known) or 'not known'}."
    )


def _next_level(records: Records, measured: Closeness, over: str) -> str:
    """What the level above would take, or why that is not said."""
    if over != WHOLE_VOCABULARY or not records.knows_tail:
        return (
            "No forecast: these soft targets know the bucket KL alone in validation, and levels "
            "are bounds of the KL."
        )
    curves, best = curves_of(records), best_point(records.held_out)
    if curves is None or best is None or best.kl is None or best.agreement is None:
        return (
            f"No forecast: fewer than {LEAST_POINTS} validation points after the start are too few "
            "for a curve; train longer, or raise train.evaluations."
        )
    result = forecast(curves, measured, Closeness(best.kl, best.agreement))
    assert result is not None, "there is a level above"
    return forecast_words(result, records.tokens_per_second)


def expected_words(records: Records, tokens: float) -> str | None:
    """What a training over so many tokens may give, by the curve of a finished run like it;
    ``None`` where that has none."""
    curves, best = curves_of(records), best_point(records.held_out)
    if records.results is None or curves is None or not records.knows_tail or best is None:
        return None
    evaluation = records.results.evaluation
    score = evaluation.exported
    if None in (score.kl, score.agreement, best.kl, best.agreement):
        return None
    if evaluation.kl_over != WHOLE_VOCABULARY:
        return None
    measured = Closeness(score.kl, score.agreement)  # type: ignore[arg-type]
    validated = Closeness(best.kl, best.agreement)  # type: ignore[arg-type]
    wanted, low, high = expected(curves, measured, validated, tokens)
    return (
        f"{wanted.level.name} is expected: KL {number(wanted.kl)} (95 % interval {number(low)}–"
        f"{number(high)}), same top token {wanted.agreement:.1%} after {human_count(tokens)} tokens"
    )


def curves_of(records: Records) -> tuple[Curve, Curve] | None:
    """The curves of KL and of disagreement over tokens; ``None`` where points are too few."""
    seen = {step_of(line): line.get("tokens_seen") or 0.0 for line in records.train}
    known = [one for one in records.held_out if one.kl is not None and one.agreement is not None]
    tokens = [seen.get(one.step, 0.0) for one in known]
    kl = fit_curve(tokens, [one.kl or 0.0 for one in known])
    apart = fit_curve(tokens, [1.0 - (one.agreement or 0.0) for one in known])
    return None if kl is None or apart is None else (kl, apart)


def forecast_words(result: Forecast, rate: float | None) -> str:
    """One sentence on a forecast; ``rate``: tokens per second of training."""
    name, most = result.level.name.capitalize(), FARTHEST * result.trained
    value, low, high = result.floor
    end = (
        f"by the validation curve the KL tends to {number(value)} ({number(low)}–{number(high)}), "
    )
    end += f"the same top token to {result.ceiling:.1%}"
    if result.low == math.inf and result.points < TELLING_POINTS:
        return (
            f"{result.points} validation points are too few to tell whether more training reaches "
            f"“{result.level.name}” at this size ({TELLING_POINTS} are not; raise "
            f"train.evaluations, or train longer): {end}."
        )
    if result.low == math.inf:
        return f"{name} is not reachable by more training at this size: {end}."
    if result.low > most:
        return (
            f"{name} would take more than {FARTHEST:g} times the {human_count(result.trained)} "
            f"tokens trained on, if more training reaches it at all: {end}."
        )
    words = f"{name} would take about {human_count(result.tokens)} more tokens"
    if result.tokens > most:
        words = f"{name} may not be reachable by more training at this size: too many tokens"
    upper = "no upper end" if result.high > most else human_count(result.high)
    words += f" (95 % interval: {human_count(result.low)} to {upper})"
    if rate:
        times = [
            "no upper end" if tokens > most else human_time(tokens / rate)
            for tokens in (result.tokens, result.low, result.high)
        ]
        about = "" if result.tokens > most else f"about {times[0]}, "
        words += f", {about}{times[1]} to {times[2]}, of training on this machine"
    return f"{words}; {end}."
