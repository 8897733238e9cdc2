"""The objective: label shift, weights, T², the one division; micro-batches change nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from distill.losses.batch import Batch
from distill.losses.objective import Objective
from students.model.decoder import SO8TForCausalLM
from tests.support.objectives import (
    LENGTHS,
    TOPK,
    VOCAB,
    WEIGHTS,
    evaluated,
    make_batch,
    make_rows,
    ready,
)
from tests.support.references import (
    Array,
    case,
    probabilities,
    reference_bend,
    reference_bucket_kl,
    reference_inertia,
    reference_shortfall,
)
from tests.support.stores import exact_targets
from tests.support.students import make_student

PARTS = ("kd", "ce", "pet", "inertia", "non_commutation", "second_difference")


@cache
@torch.no_grad()
def answers(student: SO8TForCausalLM) -> tuple[Array, float, float]:
    """Logits, summed cross-entropy and bend of each sequence on its own, without padding."""
    logits, ce, bend = [], 0.0, 0.0
    for row in make_rows()[0]:
        output = student(torch.tensor([row]))
        logits.append(output.logits[0, :-1].double().numpy())
        ce -= np.log(probabilities(logits[-1], 1.0)[np.arange(len(row) - 1), row[1:]]).sum()
        bend += reference_bend(output.last_hidden_state, [len(row)])
    return np.concatenate(logits), ce, bend


def reference_parts(
    student: SO8TForCausalLM, objective: Objective, fraction: float, kept: int = TOPK
) -> dict[str, float]:
    """Every part in float64, one sequence at a time; the KL over ``kept`` tokens."""
    config, (_, teacher) = objective.config, make_rows()
    temperature = config.temperature if fraction < 0.5 else config.final_temperature
    answered, ce, bend = answers(student)
    taught, total = torch.cat(teacher).double().numpy(), sum(LENGTHS) - len(LENGTHS)
    kl = reference_bucket_kl(taught, answered, kept, temperature).sum()
    rotations, average = student.rotations().detach(), objective.average
    assert average is not None
    phase = 0 if fraction < 0.3 else 1 if fraction < 0.7 else 2
    shortfall = reference_shortfall(rotations, config.commutator_margin)
    return {
        "kd": config.alpha * temperature**2 * kl / total,
        "ce": config.beta * ce / total,
        "pet": config.lambda_so8t * config.pet[phase] * bend / total,
        "inertia": config.lambda_so8t * config.inertia * reference_inertia(rotations, average),
        "non_commutation": config.lambda_so8t * shortfall,
    }


def contributions(parts: dict[str, torch.Tensor]) -> dict[str, float]:
    """What adds up to the loss: all that is reported but the unweighted second difference."""
    return {name: float(part) for name, part in parts.items() if name != "second_difference"}


def test_parts_against_the_reference() -> None:
    """α·T²·KL, β·CE and λ·(PET + inertia + non-commutation), with each label one token further on.

    Where the targets know the shape of the tail, the KL is that over the whole vocabulary.
    """
    student = make_student()
    grid = [("buckets", t, f) for t in (1.0, 2.0, 3.0) for f in (0.0, 0.3, 0.69, 0.7, 1.0)]
    grid += [(kind, t, 0.0) for kind in ("sketch", "hidden", "dense") for t in (1.0, 1.3, 2.0)]
    for kind, temperature, fraction in grid:
        objective = ready(student, WEIGHTS.model_copy(update={"temperature": temperature}))
        batch = make_batch(*make_rows(), kind=kind)
        assert batch.count() == sum(LENGTHS) - len(LENGTHS) == int(batch.valid.sum())
        loss, parts = evaluated(student, objective, batch, fraction)
        expected = reference_parts(student, objective, fraction)
        with case(kind, temperature, fraction):
            if kind != "buckets":
                over_buckets = expected["kd"]
                expected = reference_parts(student, objective, fraction, kept=VOCAB)
                assert expected["kd"] > 1.001 * over_buckets
            assert contributions(parts) == pytest.approx(expected, rel=2e-5)
            phase = 0 if fraction < 0.3 else 1 if fraction < 0.7 else 2
            bend = expected["pet"] / (WEIGHTS.lambda_so8t * WEIGHTS.pet[phase])
            assert float(parts["second_difference"]) == pytest.approx(bend, rel=2e-5)
            assert min(expected.values()) > 1e-3
            assert loss.item() == pytest.approx(sum(expected.values()), rel=2e-5)
            assert not any(part.requires_grad for part in parts.values())


def test_labels_are_the_following_tokens() -> None:
    """Position t is answered by token t + 1; the last token of a sequence answers nothing."""
    teacher = [torch.zeros(2, VOCAB), torch.zeros(1, VOCAB)]
    batch = make_batch([[5, 6, 7], [8, 9]], teacher, padding=2)
    assert batch.labels.tolist() == [6, 7, 9] and batch.count() == 3
    assert batch.valid.tolist() == [[True, True, *[False] * 3], [True, *[False] * 4]]


def test_masked_predictions_do_not_count() -> None:
    """KL, cross-entropy and PET over the kept positions alone, divided by their number."""
    student, config = make_student(), WEIGHTS.model_copy(update={"final_temperature": None})
    rows, teacher = make_rows()
    masks = [np.random.default_rng(n).random(n) < 0.4 for n in [length - 1 for length in LENGTHS]]
    for mask in masks:
        mask[len(mask) // 2] = True
    kept = np.concatenate(masks)
    whole = make_batch(rows, teacher, padding=1)
    keep = torch.from_numpy(kept)
    targets = whole.targets.select(keep)
    batch = replace(whole, targets=targets, keep=keep)
    assert 0 < batch.count() == kept.sum() < whole.count()
    _, parts = evaluated(student, ready(student, config), batch)
    kl, ce, bend = 0.0, 0.0, 0.0
    for row, logits, mask in zip(rows, teacher, masks, strict=True):
        with torch.no_grad():
            output = student(torch.tensor([row]))
        said, states = output.logits[0].double().numpy(), output.last_hidden_state[0].double()
        for place in np.flatnonzero(mask).tolist():
            here = logits[place : place + 1].double().numpy()
            kl += reference_bucket_kl(here, said[place : place + 1], TOPK, 2.0).sum()
            ce -= np.log(probabilities(said[place : place + 1], 1.0)[0, row[place + 1]])
            if place:
                step = states[place + 1] - 2 * states[place] + states[place - 1]
                bend += float(step.square().mean())
    total = kept.sum()
    expected = {"kd": 0.7 * 4.0 * kl / total, "ce": 0.4 * ce / total, "second_difference": bend}
    expected["second_difference"] /= total
    found = {name: float(parts[name]) for name in expected}
    assert found == pytest.approx(expected, rel=2e-5)


def test_the_average_is_a_moving_average() -> None:
    """First the rotations, then decay · average + (1 − decay) · rotations; it is restored."""
    first, second = make_student(seed=1), make_student(seed=2)
    objective, batch = Objective(WEIGHTS), make_batch(*make_rows())
    assert objective.state() == {}
    _, parts = evaluated(first, objective, batch)  # nothing to be held back by
    assert set(contributions(parts)) == {"kd", "ce", "pet", "non_commutation"}
    for student in (first, second):
        evaluated(student, objective, batch, 0.0)
        objective.after_step()
    expected = 0.75 * first.rotations() + 0.25 * second.rotations()
    torch.testing.assert_close(objective.state()["rotation_average"], expected.detach())
    again = Objective(WEIGHTS)
    again.load_state(objective.state())
    assert torch.equal(again.state()["rotation_average"], objective.state()["rotation_average"])


def test_a_weight_of_zero_removes_its_term() -> None:
    """The part is not reported (PET, which may return, as 0); the loss is the others' sum."""
    student, batch = make_student(), make_batch(*make_rows())
    whole = reference_parts(student, ready(student), 0.5)
    changes: tuple[tuple[dict[str, object], set[str]], ...] = (
        ({"alpha": 0.0}, {"kd"}),
        ({"beta": 0.0}, {"ce"}),
        ({"pet": (0.3, 0.0, 0.9)}, {"pet"}),
        ({"inertia": 0.0}, {"inertia"}),
        ({"commutator_margin": 0.0}, {"non_commutation"}),
        ({"lambda_so8t": 0.0}, {"pet", "inertia", "non_commutation"}),
        ({"alpha": 0.0, "beta": 0.0, "lambda_so8t": 0.0}, whole.keys()),
    )
    for change, gone in changes:
        objective = ready(student, WEIGHTS.model_copy(update=change))
        loss, parts = evaluated(student, objective, batch)
        kept = {name: part for name, part in whole.items() if name not in gone}
        found = contributions(parts)
        with case(change):
            if gone == {"pet"}:
                assert found.pop("pet") == 0.0
            assert found == pytest.approx(kept, rel=2e-5)
            assert ("second_difference" in parts) == ("lambda_so8t" not in change)
            assert loss.item() == pytest.approx(sum(kept.values()), rel=2e-5)
    loss.backward()  # of all weights 0: still a number with gradients of 0
    assert loss.item() == 0.0 and parts == {}
    assert all(not p.grad.any() for p in student.parameters() if p.grad is not None)


def gradients_after(
    size: int, kind: str
) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """Loss, parts and gradients of one optimizer step over LENGTHS in micro-batches of ``size``."""
    student = make_student()
    objective, (rows, teacher), total = ready(student), make_rows(), sum(LENGTHS) - len(LENGTHS)
    value, seen = 0.0, dict.fromkeys(PARTS, 0.0)
    for at in range(0, len(rows), size):
        batch = make_batch(rows[at : at + size], teacher[at : at + size], kind=kind)
        share = batch.count() / total
        loss, parts = objective(student, batch, total=total, share=share, fraction=0.5)
        loss.backward()
        value += loss.item()
        for name, part in parts.items():
            seen[name] += float(part)
    grads = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    return value, seen, grads


def test_micro_batches_equal_the_whole_batch() -> None:
    """Micro-batches give the loss, parts and gradients of one batch of 8, ragged as they are."""
    for kind, sizes in (
        ("buckets", (1, 3, 4)),
        ("sketch", (3,)),
        ("hidden", (3,)),
        ("dense", (3,)),
    ):
        value, parts, gradients = gradients_after(8, kind)
        assert len(gradients) == len(list(make_student().parameters()))
        for size in sizes:
            found_value, found_parts, found = gradients_after(size, kind)
            with case(kind, size):
                assert found_value == pytest.approx(value, rel=1e-5)
                assert found_parts == pytest.approx(parts, rel=1e-5)
                for name, slope in gradients.items():
                    torch.testing.assert_close(found[name], slope, rtol=1e-4, atol=1e-5, msg=name)


def test_padding_does_not_matter() -> None:
    """More padding, of any token, changes neither loss nor parts."""
    student = make_student()
    loss, parts = evaluated(student, ready(student), make_batch(*make_rows()))
    for fill in (0, 5):
        wide = make_batch(*make_rows(), padding=4, fill=fill)
        found_loss, found = evaluated(student, ready(student), wide)
        assert found_loss.item() == pytest.approx(loss.item(), rel=1e-5), fill
        assert contributions(found) == pytest.approx(contributions(parts), rel=1e-5), fill
        bend = float(parts["second_difference"])
        assert float(found["second_difference"]) == pytest.approx(bend, rel=1e-5), fill


def test_a_micro_batch_without_valid_positions() -> None:
    """Sequences of one token predict nothing: every part is 0 and every gradient 0 or absent."""
    for kind in ("buckets", "sketch", "hidden", "dense"):
        student, targets = make_student(), exact_targets(kind, torch.zeros(0, VOCAB), TOPK)
        batch = Batch(torch.tensor([[3], [4]]), torch.tensor([1, 1]), targets)
        assert batch.count() == 0 and batch.labels.shape == (0,)
        loss, parts = ready(student)(student, batch, total=10, share=0.0, fraction=0.5)
        loss.backward()
        with case(kind):
            assert loss.item() == 0.0 and all(float(part) == 0.0 for part in parts.values())
            assert all(not p.grad.any() for p in student.parameters() if p.grad is not None)


def test_rotation_figures_are_those_of_the_newest_forward_pass() -> None:
    """How far from the group, from commuting and from their average: from the definitions."""
    student, batch = make_student(), make_batch(*make_rows())
    objective = Objective(WEIGHTS)
    evaluated(student, objective, batch)
    assert objective.rotation_stats()["rotation_drift"] == 0.0
    objective = ready(student)
    evaluated(student, objective, batch)
    rotations, average = student.rotations().detach(), objective.average
    assert average is not None
    r = rotations.double().numpy()
    errors = np.linalg.norm(r.swapaxes(-1, -2) @ r - np.eye(8), axis=(-2, -1))
    safe, command = r[:, 0], r[:, 1]
    commutators = np.linalg.norm(command @ safe - safe @ command, axis=(-2, -1))
    figures = objective.rotation_stats()
    assert figures["rotation_error"] == pytest.approx(errors.max(), abs=1e-6)
    assert figures["min_commutator"] == pytest.approx(commutators.min(), rel=1e-5)
    assert figures["mean_commutator"] == pytest.approx(commutators.mean(), rel=1e-5)
    assert commutators.min() < 0.99 * commutators.mean()
    drift = reference_inertia(rotations, average)
    assert figures["rotation_drift"] == pytest.approx(drift, rel=1e-5)
