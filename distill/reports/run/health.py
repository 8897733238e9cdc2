"""How training went, by a run's records: whether it was healthy, not whether the student is usable
(``distill.reports.verdict``). Each fact is computed from them, and none is said without them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median, stdev

from distill.metrics.closeness import kl_name
from distill.metrics.safety import (
    ALLOW_RECALL,
    FALSE_REFUSAL,
    FALSE_REFUSALS,
    REFUSE_RECALL,
    first_ratios,
)
from distill.metrics.verification import CASCADE_GOAL, VerificationPart, cascade_goal
from distill.reports.document import Fact
from distill.runs.metrics_log import ROTATION_ERROR, best_point, step_of
from distill.runs.records import Records, Results, SafetyPart, max_grad_norm
from distill.runtime.format import human_count, number

FEWEST = 20  # steps below which nothing is said about the end of training
STANDARD_ERRORS = 3.0  # by so many the loss must rise to count as risen
GROWN = 2.0  # times as large a gradient at the end as in the middle counts as grown

SHOWN_STEPS = 5  # steps named of those with a value that is not finite
GUESSING = 0.6  # an AUROC below that is hardly better than guessing (0.5)


def health(records: Records) -> list[Fact]:
    """The facts, most important first; the first one says how the run ended."""
    facts = [_end(records), *_validation(records), *_not_finite(records)]
    facts += [*_loss_at_the_end(records), *_gradient(records), *_rotations(records)]
    if records.results is not None:
        heads = records.results.heads
        if heads.safety is not None:
            facts.append(_safety(heads.safety))
        if heads.verification is not None:
            facts.append(_verification(heads.verification))
        facts.append(_exported(records.results))
    return facts


def _end(records: Records) -> Fact:
    """Finished, or where the run stands or stopped."""
    results, step = records.results, records.last_step
    if results is not None:
        training = results.training
        words = (
            f"Finished: {training.steps:,} steps over {human_count(training.tokens_seen)} tokens"
        )
        if training.steps < training.planned_steps:
            words += f", stopped early of {training.planned_steps:,} planned (no better validation)"
        if training.continued_from_step:
            words += (
                f"; it was interrupted and continued from step {training.continued_from_step:,}"
            )
        return Fact("good", words + ".")
    if records.held:
        return Fact(
            "plain",
            f"Still running: {step:,} steps are logged so far. There are no final results yet.",
        )
    words = f"Not finished: the last thing it logged is step {step:,}, and no process works on it"
    if records.metrics.cut_off:
        words += " (the last line was cut off while it was written)"
    if records.checkpoint is None:
        return Fact(
            "warning", words + ". It has no checkpoint: the same command starts training again."
        )
    return Fact(
        "warning",
        f"{words}. The same command continues from the checkpoint of step "
        f"{records.checkpoint_step:,}.",
    )


def _validation(records: Records) -> list[Fact]:
    """How the KL moved in validation, and which step was the best."""
    name = f"validation {kl_name(records.validation_over)}"
    points = [point for point in records.held_out if point.kl is not None]
    best = best_point(points)
    if best is None or len(points) < 2:
        return [
            Fact(
                "plain",
                f"The {name} was measured fewer than two times: nothing can be said about it.",
            )
        ]
    first, last = points[0], points[-1]
    assert first.kl is not None and best.kl is not None and last.kl is not None
    if best.step == first.step:
        words = f"The {name} never got better than it was at step {first.step:,}: {first.kl:.3f}"
        return [Fact("warning", f"{words}, and {last.kl:.3f} at step {last.step:,}.")]
    facts = [
        Fact(
            "good",
            f"The {name} fell from {first.kl:.3f} to {best.kl:.3f} nats per token "
            f"(steps {first.step:,} to {best.step:,})"
            f"{_agreement(first.agreement, best.agreement)}.",
        )
    ]
    if best.step < last.step:
        kept = (
            "; the student has the weights of the best step" if records.results is not None else ""
        )
        facts.append(
            Fact(
                "warning",
                f"The best step, {best.step:,}, is earlier than the last one measured, "
                f"{last.step:,}, where that was "
                f"{last.kl:.3f}: training after it did not help on validation text{kept}.",
            )
        )
    return facts


def _agreement(first: float | None, best: float | None) -> str:
    if first is None or best is None:
        return ""
    return f"; the same top token went from {first:.1%} to {best:.1%}"


def _not_finite(records: Records) -> list[Fact]:
    """Values that were logged as null, by name."""
    broken: dict[str, list[int]] = {}
    for line in records.train:
        for name, value in line.items():
            if value is None:
                broken.setdefault(name, []).append(step_of(line))
    for point in records.held_out:
        for name in ("kl", "agreement", "cross_entropy"):
            if getattr(point, name) is None:
                broken.setdefault(f"validation {name}", []).append(point.step)
    if not broken:
        return [Fact("good", "Every value logged is finite.")]
    words = []
    for name, steps in broken.items():
        shown = ", ".join(f"{step:,}" for step in steps[:SHOWN_STEPS])
        more = f" and {len(steps) - SHOWN_STEPS:,} more" if len(steps) > SHOWN_STEPS else ""
        words.append(f"{name} at step{'s' if len(steps) > 1 else ''} {shown}{more}")
    return [Fact("warning", f"Values that are not finite were logged: {'; '.join(words)}.")]


def _loss_at_the_end(records: Records) -> list[Fact]:
    """Whether the loss rose between the last two tenths of the steps that are logged."""
    _, values = records.column("loss")
    window = len(values) // 10
    before, after = _known(values[-2 * window : -window]), _known(values[-window:])
    if len(values) < FEWEST or len(before) < 2 or len(after) < 2:
        return [
            Fact("plain", f"{len(values)} steps are too few to say how the loss moved at the end.")
        ]
    rise = fmean(after) - fmean(before)
    doubt = math.sqrt(stdev(before) ** 2 / len(before) + stdev(after) ** 2 / len(after))
    means = f"mean {number(fmean(before))}, then {number(fmean(after))}"
    if rise > STANDARD_ERRORS * doubt:
        return [
            Fact(
                "warning",
                "The training loss rose at the end: over the last two tenths of the steps, "
                f"{means}.",
            )
        ]
    return [
        Fact(
            "good",
            "The training loss did not rise at the end: over the last two tenths of the steps, "
            f"{means}.",
        )
    ]


def _gradient(records: Records) -> list[Fact]:
    """Whether the gradient norm grew from the middle to the end, and how often it was clipped."""
    _, values = records.column("grad_norm")
    window = max(1, len(values) // 10)
    middle = (len(values) - window) // 2
    before, after = _known(values[middle : middle + window]), _known(values[-window:])
    if len(values) < FEWEST or not before or not after:
        return []
    first, last = median(before), median(after)
    words = f"median {number(first)} in the middle tenth of the steps, {number(last)} in the last"
    words += _clipped(records)
    if last > GROWN * first:
        return [Fact("warning", f"The gradient norm before clipping more than doubled: {words}.")]
    return [Fact("good", f"The gradient norm before clipping did not double: {words}.")]


def _clipped(records: Records) -> str:
    """How many steps were scaled down; a line's own limit counts before the one of all steps."""
    fixed = max_grad_norm(records)
    lines = [
        (norm, line.get("clip_limit") or fixed)
        for line in records.train
        if (norm := line.get("grad_norm")) is not None
    ]
    cut = [norm > limit for norm, limit in lines if limit is not None]
    if not cut:
        return ""
    adaptive = any(line.get("clip_limit") is not None for line in records.train)
    above = "" if fixed is None else f"above {fixed:g}"
    if adaptive:
        above += f"{', or' if above else 'above'} a lower limit that follows the norms before"
    return f"; {sum(cut) / len(cut):.0%} of the steps were clipped ({above})"


def _rotations(records: Records) -> list[Fact]:
    """Whether the rotations stayed rotations and kept from commuting."""
    errors, norms = (
        _known(records.column(name)[1]) for name in ("rotation_error", "min_commutator")
    )
    if not errors or not norms:
        return []
    words = f"largest error {max(errors):.1e}; smallest commutator {number(min(norms))}"
    if max(errors) > ROTATION_ERROR:
        return [
            Fact(
                "warning", f"The rotations did not stay orthogonal to {ROTATION_ERROR:g}: {words}."
            )
        ]
    if min(norms) <= ROTATION_ERROR:
        return [Fact("warning", f"Some pair of rotations came to commute: {words}.")]
    return [Fact("good", f"The rotations stayed rotations and none came to commute: {words}.")]


def _safety(result: SafetyPart) -> Fact:
    """The figures that matter most, against what a head should reach."""
    test = result.test
    first = first_ratios(test)
    told = [f"{one.name.lower()} {_share(one.value, one.right, one.cases)}" for one in first]
    words = f"Safety head on {test.prompts} held-out prompts: {', '.join(told)}"
    missed = []
    for one, aim in zip(first, (REFUSE_RECALL, ALLOW_RECALL, FALSE_REFUSALS), strict=True):
        at_most = one.name == FALSE_REFUSAL
        if one.value is None or (one.value > aim if at_most else one.value < aim):
            missed.append(f"{one.name.lower()} {'at most' if at_most else 'at least'} {aim:.0%}")
    if missed:
        return Fact("warning", f"{words}. Not reached: {', '.join(missed)}.")
    return Fact("good", f"{words}: all as they should be.")


def _verification(result: VerificationPart) -> Fact:
    """Whether the verification head knows anything, and what that saves."""
    if result.auroc is None:
        return Fact(
            "plain",
            "Verification head: all validation tokens are alike, so nothing can be said about it.",
        )
    words = (
        f"Verification head: AUROC {result.auroc:.3f}, calibration error "
        f"{result.calibration_error:.3f}"
    )
    if (goal := cascade_goal(result)) is not None:
        words += (
            f"; {CASCADE_GOAL:.0%} agreement with the teacher answering {goal.escalated:.0%} "
            "of the tokens"
        )
    if result.auroc < GUESSING:
        return Fact(
            "warning", f"{words}. It hardly knows where the student agrees with the teacher."
        )
    return Fact("good", words + ".")


def _exported(results: Results) -> Fact:
    """What the proof compared."""
    proof = results.proof
    return Fact(
        "good",
        f"The exported file is the trained model: in llama.cpp ({proof.quant}) its KL from "
        f"{proof.against} is "
        f"{proof.mean_kl:.1e} over {proof.positions:,} positions, with the same top token in "
        f"{proof.agreement:.1%}.",
    )


def _share(value: float | None, right: int, cases: int) -> str:
    return "not known (no case)" if value is None else f"{value:.1%} ({right} of {cases})"


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def health_sentence(facts: Sequence[Fact]) -> str:
    """One sentence on all of them."""
    result = sum(fact.level == "warning" for fact in facts)
    if not result:
        return "Training was healthy; that says nothing about use."
    things = "thing is" if result == 1 else "things are"
    return f"Training: {result} {things} worth a look in the report; that says nothing about use."
