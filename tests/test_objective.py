"""The objective: label shift, weights, T², the one division, and that micro-batches change nothing."""

from __future__ import annotations

import math

import pytest
import torch

from distill.config import LossConfig
from distill.objective import Batch, Objective
from students.model import SO8TForCausalLM
from tests.conftest import exact_targets, make_student
from tests.test_losses import probabilities, reference_bucket_kl
from tests.test_regularisers import reference_bend, reference_inertia, reference_shortfall

VOCAB = 96
TOPK = 6
PARTS = ("kd", "ce", "pet", "inertia", "non_commutation", "second_difference")
LENGTHS = (2, 9, 5, 3, 7, 2, 4, 6)
WEIGHTS = LossConfig(
    temperature=2.0,
    final_temperature=3.0,
    final_from=0.5,
    alpha=0.7,
    beta=0.4,
    lambda_so8t=0.5,
    pet=(0.3, 0.6, 0.9),
    inertia=0.2,
    inertia_decay=0.75,
    commutator_margin=9.0,
)


def make_rows(lengths: tuple[int, ...] = LENGTHS) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Seeded sequences and the teacher's dense logits ``[n − 1, V]`` of each."""
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return rows, [2.0 * torch.randn(n - 1, VOCAB, generator=generator) for n in lengths]


def make_batch(
    rows: list[list[int]],
    teacher: list[torch.Tensor],
    padding: int = 0,
    fill: int = 0,
    kind: str = "buckets",
) -> Batch:
    """Pad ``rows`` on the right, by ``padding`` more than needed."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max()) + padding), fill)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = torch.tensor(row)
    return Batch(tokens, lengths, exact_targets(kind, torch.cat(teacher), TOPK))


def ready(student: SO8TForCausalLM, config: LossConfig = WEIGHTS) -> Objective:
    """An objective whose rotation average is some way off the student's rotations."""
    objective = Objective(config)
    objective.load_state({"rotation_average": make_student(seed=9).rotations().detach()})
    return objective


def reference_parts(
    student: SO8TForCausalLM, objective: Objective, fraction: float, kept: int = TOPK
) -> dict[str, float]:
    """Every part in float64 loops, one sequence at a time, without any padding; the KL over ``kept`` tokens."""
    config, (rows, teacher) = objective.config, make_rows()
    temperature = config.temperature if fraction < 0.5 else config.final_temperature
    kl, ce, bend, total = 0.0, 0.0, 0.0, 0
    for row, logits in zip(rows, teacher, strict=True):
        with torch.no_grad():
            output = student(torch.tensor([row]))
        answered, taught = output.logits[0].double().numpy(), logits.double().numpy()
        for t in range(len(row) - 1):
            kl += reference_bucket_kl(taught[t], answered[t], kept, temperature)
            ce -= math.log(probabilities(answered[t], 1.0)[row[t + 1]])
            total += 1
        bend += reference_bend(output.last_hidden_state, [len(row)])
    rotations, average = student.rotations().detach(), objective.average
    assert average is not None
    phase = 0 if fraction < 0.3 else 1 if fraction < 0.7 else 2
    return {
        "kd": config.alpha * temperature**2 * kl / total,
        "ce": config.beta * ce / total,
        "pet": config.lambda_so8t * config.pet[phase] * bend / total,
        "inertia": config.lambda_so8t * config.inertia * reference_inertia(rotations, average),
        "non_commutation": config.lambda_so8t * reference_shortfall(rotations, config.commutator_margin),
    }


def contributions(parts: dict[str, torch.Tensor]) -> dict[str, float]:
    """What adds up to the loss: all that is reported but the unweighted second difference."""
    return {name: float(part) for name, part in parts.items() if name != "second_difference"}


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.69, 0.7, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_parts_against_the_reference(fraction: float, temperature: float) -> None:
    """α·T²·KL, β·CE and λ·(PET + inertia + non-commutation), with each label one token further on."""
    student = make_student()
    objective = ready(student, WEIGHTS.model_copy(update={"temperature": temperature}))
    batch = make_batch(*make_rows())
    assert batch.count() == sum(LENGTHS) - len(LENGTHS) == int(batch.valid.sum())
    loss, parts = objective(student, batch, total=batch.count(), share=1.0, fraction=fraction)
    expected = reference_parts(student, objective, fraction)
    assert contributions(parts) == pytest.approx(expected, rel=2e-5)
    weight = WEIGHTS.lambda_so8t * WEIGHTS.pet[0 if fraction < 0.3 else 1 if fraction < 0.7 else 2]
    assert float(parts["second_difference"]) == pytest.approx(expected["pet"] / weight, rel=2e-5)
    assert min(expected.values()) > 1e-3
    assert loss.item() == pytest.approx(sum(expected.values()), rel=2e-5)
    assert not any(part.requires_grad for part in parts.values())


@pytest.mark.parametrize("temperature", [1.0, 1.3, 2.0])
@pytest.mark.parametrize("kind", ["sketch", "hidden", "dense"])
def test_the_kl_runs_over_everything_that_is_known(kind: str, temperature: float) -> None:
    """Where the targets know the shape of the tail, the KL is that over the whole vocabulary."""
    student = make_student()
    objective = ready(student, WEIGHTS.model_copy(update={"temperature": temperature}))
    batch = make_batch(*make_rows(), kind=kind)
    loss, parts = objective(student, batch, total=batch.count(), share=1.0, fraction=0.0)
    expected = reference_parts(student, objective, 0.0, kept=VOCAB)
    assert contributions(parts) == pytest.approx(expected, rel=2e-5)
    assert expected["kd"] > 1.001 * reference_parts(student, objective, 0.0)["kd"]
    assert loss.item() == pytest.approx(sum(expected.values()), rel=2e-5)


def test_labels_are_the_following_tokens() -> None:
    """Position t of a sequence is answered by token t + 1; the last token of a sequence answers nothing."""
    batch = make_batch([[5, 6, 7], [8, 9]], [torch.zeros(2, VOCAB), torch.zeros(1, VOCAB)], padding=2)
    assert batch.labels.tolist() == [6, 7, 9]
    assert batch.valid.tolist() == [[True, True, False, False, False], [True, False, False, False, False]]
    assert batch.count() == 3


def test_the_average_is_a_moving_average() -> None:
    """First the rotations themselves, then decay · average + (1 − decay) · rotations; saved and restored."""
    first, second = make_student(seed=1), make_student(seed=2)
    objective = Objective(WEIGHTS)
    assert objective.state() == {}
    batch = make_batch(*make_rows())
    for student in (first, second):
        objective(student, batch, total=batch.count(), share=1.0, fraction=0.0)
        objective.after_step()
    expected = 0.75 * first.rotations() + 0.25 * second.rotations()
    torch.testing.assert_close(objective.state()["rotation_average"], expected.detach())
    again = Objective(WEIGHTS)
    again.load_state(objective.state())
    assert torch.equal(again.state()["rotation_average"], objective.state()["rotation_average"])


def test_no_inertia_before_the_first_step() -> None:
    """Without an average there is nothing to be held back by; the other parts are there."""
    student, batch = make_student(), make_batch(*make_rows())
    _, parts = Objective(WEIGHTS)(student, batch, total=batch.count(), share=1.0, fraction=0.5)
    assert set(contributions(parts)) == {"kd", "ce", "pet", "non_commutation"}


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        ({"alpha": 0.0}, {"kd"}),
        ({"beta": 0.0}, {"ce"}),
        ({"pet": (0.3, 0.0, 0.9)}, {"pet"}),
        ({"inertia": 0.0}, {"inertia"}),
        ({"commutator_margin": 0.0}, {"non_commutation"}),
        ({"lambda_so8t": 0.0}, {"pet", "inertia", "non_commutation"}),
    ],
)
def test_a_weight_of_zero_removes_its_term(change: dict[str, object], gone: set[str]) -> None:
    """The part is not reported (PET, whose weight may rise later, as 0), and the loss is the sum of the others."""
    student, batch = make_student(), make_batch(*make_rows())
    objective = ready(student, WEIGHTS.model_copy(update=change))
    loss, parts = objective(student, batch, total=batch.count(), share=1.0, fraction=0.5)
    kept = {
        name: part for name, part in reference_parts(student, ready(student), 0.5).items() if name not in gone
    }
    found = contributions(parts)
    if gone == {"pet"}:
        assert found.pop("pet") == 0.0
    assert found == pytest.approx(kept, rel=2e-5)
    assert ("second_difference" in parts) == ("lambda_so8t" not in change)
    assert loss.item() == pytest.approx(sum(kept.values()), rel=2e-5)


def test_all_weights_zero_is_a_loss_of_zero() -> None:
    """Still a number one can call backward on, with gradients of 0."""
    student, batch = make_student(), make_batch(*make_rows())
    nothing = WEIGHTS.model_copy(update={"alpha": 0.0, "beta": 0.0, "lambda_so8t": 0.0})
    loss, parts = ready(student, nothing)(student, batch, total=batch.count(), share=1.0, fraction=0.5)
    loss.backward()
    assert loss.item() == 0.0 and parts == {}
    assert all(not p.grad.any() for p in student.parameters() if p.grad is not None)


def gradients_after(size: int, kind: str) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
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


@pytest.mark.parametrize(
    ("size", "kind"),
    [(1, "buckets"), (3, "buckets"), (4, "buckets"), (3, "sketch"), (3, "hidden"), (3, "dense")],
)
def test_micro_batches_equal_the_whole_batch(size: int, kind: str) -> None:
    """One batch of 8 and its micro-batches give the same loss, parts and gradients, ragged as they are."""
    value, parts, gradients = gradients_after(8, kind)
    small_value, small_parts, small_gradients = gradients_after(size, kind)
    assert small_value == pytest.approx(value, rel=1e-5)
    assert small_parts == pytest.approx(parts, rel=1e-5)
    assert len(gradients) == len(list(make_student().parameters()))
    for name, gradient in gradients.items():
        torch.testing.assert_close(small_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("fill", [0, 5])
def test_padding_does_not_matter(fill: int) -> None:
    """More padding, of any token, changes neither loss nor parts."""
    student = make_student()
    narrow, wide = make_batch(*make_rows()), make_batch(*make_rows(), padding=4, fill=fill)
    results = [
        ready(student)(student, batch, total=36, share=1.0, fraction=0.5)[1] for batch in (narrow, wide)
    ]
    for name, part in results[0].items():
        assert float(results[1][name]) == pytest.approx(float(part), rel=1e-5)


@pytest.mark.parametrize("kind", ["buckets", "sketch", "hidden", "dense"])
def test_a_micro_batch_without_valid_positions(kind: str) -> None:
    """Sequences of one token predict nothing: every part is 0 and every gradient 0 or absent."""
    student, targets = make_student(), exact_targets(kind, torch.zeros(0, VOCAB), TOPK)
    batch = Batch(torch.tensor([[3], [4]]), torch.tensor([1, 1]), targets)
    assert batch.count() == 0 and batch.labels.shape == (0,)
    loss, parts = ready(student)(student, batch, total=10, share=0.0, fraction=0.5)
    loss.backward()
    assert loss.item() == 0.0 and all(float(part) == 0.0 for part in parts.values())
    assert all(not p.grad.any() for p in student.parameters() if p.grad is not None)


def test_rotation_figures_are_those_of_the_newest_forward_pass() -> None:
    """How far from the group, from commuting and from their average: from the definitions, one block at a time."""
    student, batch = make_student(), make_batch(*make_rows())
    objective = Objective(WEIGHTS)
    objective(student, batch, total=batch.count(), share=1.0, fraction=0.0)
    assert objective.rotation_figures()["rotation_drift"] == 0.0
    objective = ready(student)
    objective(student, batch, total=batch.count(), share=1.0, fraction=0.0)
    errors, commutators = [], []
    average = objective.average
    assert average is not None
    for pairs in student.rotations().detach().double():
        for block in range(pairs.shape[1]):
            safe, command = pairs[0, block], pairs[1, block]
            for matrix in (safe, command):
                errors.append(float((matrix.T @ matrix - torch.eye(8)).norm()))
            commutators.append(float((command @ safe - safe @ command).norm()))
    figures = objective.rotation_figures()
    assert figures["rotation_error"] == pytest.approx(max(errors), abs=1e-6)
    assert figures["min_commutator"] == pytest.approx(min(commutators), rel=1e-5)
    assert figures["mean_commutator"] == pytest.approx(sum(commutators) / len(commutators), rel=1e-5)
    assert min(commutators) < 0.99 * sum(commutators) / len(commutators)
    assert figures["rotation_drift"] == pytest.approx(
        reference_inertia(student.rotations().detach(), average), rel=1e-5
    )
