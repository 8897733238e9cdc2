"""Divergences against float64 references in plain loops over the vocabulary."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.losses import (
    IGNORE_INDEX,
    bucket_log_probs,
    cross_entropy,
    dense_forward_kl,
    forward_kl,
    forward_kl_of_all,
    known_kl,
)
from teachers.records import Targets
from teachers.soft_targets import CompactTargets
from tests.conftest import exact_targets

Array = NDArray[np.float64]
NODES = (1.0, 2.0, 3.0)  # where the tail's mass is stored
BETWEEN = (1.1, 1.3, 2.5, 4.5, 20.0)  # where it is interpolated, or taken on towards T = ∞
TEMPERATURES = pytest.mark.parametrize("temperature", NODES + BETWEEN)
INTERPOLATED = 5e-5  # what interpolation may cost a KL between the nodes; measured: 3.4e-5
SHAPED = ("sketch", "hidden", "dense", "all kept")  # targets that know the shape of the tail


def probabilities(logits: Array, temperature: float) -> Array:
    """Softmax of one position's logits at temperature T."""
    weights = [math.exp((z - max(logits)) / temperature) for z in logits]
    return np.array([weight / math.fsum(weights) for weight in weights])


def reference_dense_kl(teacher: Array, student: Array, temperature: float) -> float:
    """Σ_v p_v log(p_v / q_v) of one position."""
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def reference_bucket_kl(teacher: Array, student: Array, count: int, temperature: float) -> float:
    """KL of one position after all but the teacher's ``count`` best tokens are thrown into one bucket."""
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    order = sorted(range(len(teacher)), key=lambda v: -teacher[v])
    kept, rest = order[:count], order[count:]
    pairs = [(p[v], q[v]) for v in kept]
    if rest:
        pairs.append((math.fsum(p[v] for v in rest), math.fsum(q[v] for v in rest)))
    return math.fsum(a * math.log(a / b) for a, b in pairs if a > 0)


def drawn(positions: int, vocab_size: int = 20, scale: float = 2.0, seed: int = 0) -> Tensor:
    """Seeded float32 logits ``[N, V]``."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(positions, vocab_size, generator=generator)


def rows(logits: Tensor) -> Array:
    """Logits as float64 numpy."""
    return logits.detach().double().numpy()


def reference_rows(teacher: Tensor, student: Tensor, count: int, temperature: float) -> Array:
    """``reference_bucket_kl`` of every position."""
    pairs = zip(rows(teacher), rows(student), strict=True)
    return np.array([reference_bucket_kl(p, q, count, temperature) for p, q in pairs])


def slack(temperature: float) -> float:
    """How far a KL from compact targets may be off besides float32 rounding."""
    return 0.0 if temperature in NODES else INTERPOLATED


def shaped(kind: str, logits: Tensor, count: int = 4) -> Targets:
    """Targets of one of ``SHAPED``."""
    return (
        CompactTargets.from_logits(logits, 500) if kind == "all kept" else exact_targets(kind, logits, count)
    )


@TEMPERATURES
@pytest.mark.parametrize("count", [1, 4, 19, 20])
def test_bucket_kl_against_the_reference(count: int, temperature: float) -> None:
    """Top-k plus one bucket, at every temperature, for one kept token up to all of them."""
    teacher, student = drawn(8), drawn(8, seed=1)
    got = forward_kl(student, CompactTargets.from_logits(teacher, count), temperature)
    assert got.shape == (8,) and got.dtype == torch.float32
    expected = reference_rows(teacher, student, count, temperature)
    assert expected.min() > (1e-3 if temperature < 4.0 else 1e-5)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=2e-6 + slack(temperature))


@TEMPERATURES
@pytest.mark.parametrize("kind", SHAPED)
def test_kl_of_all_against_the_reference(kind: str, temperature: float) -> None:
    """Over the whole vocabulary, whatever kind of targets knows the shape of the tail."""
    teacher, student = drawn(8), drawn(8, seed=1)
    targets = shaped(kind, teacher)
    got = forward_kl_of_all(student, targets, temperature)
    assert got.shape == (8,) and got.dtype == torch.float32
    pairs = zip(rows(teacher), rows(student), strict=True)
    expected = np.array([reference_dense_kl(p, q, temperature) for p, q in pairs])
    assert expected.min() > (1e-3 if temperature < 4.0 else 1e-4)
    interpolated = slack(temperature) if kind == "sketch" else 0.0
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=2e-6 + interpolated)
    whole = forward_kl_of_all(student[None], targets.select(torch.arange(8)[None]), temperature)
    assert whole.shape == (1, 8)
    torch.testing.assert_close(whole[0], got, rtol=0, atol=1e-6)


@TEMPERATURES
@pytest.mark.parametrize("kind", ["buckets", *SHAPED])
def test_known_kl_against_the_reference(kind: str, temperature: float) -> None:
    """Over k + 1 buckets for compact targets, with a sketch too; over everything for others."""
    teacher, student = drawn(8), drawn(8, seed=1)
    got = known_kl(student, shaped(kind, teacher), temperature)
    count, interpolated = (4, slack(temperature)) if kind in ("buckets", "sketch") else (20, 0.0)
    expected = reference_rows(teacher, student, count, temperature)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=2e-6 + interpolated)


def test_kl_of_all_needs_the_shape_of_the_tail() -> None:
    """Compact targets without a sketch do not say how the tail is spread, so it is not guessed."""
    targets = CompactTargets.from_logits(drawn(2), 4)
    with pytest.raises(ValueError, match=r"no tail sketch.*targets\.sketch_bytes"):
        forward_kl_of_all(drawn(2, seed=1), targets, 2.0)
    assert known_kl(drawn(2, seed=1), targets, 2.0).shape == (2,)


@TEMPERATURES
@pytest.mark.parametrize("kind", SHAPED)
def test_identical_models_have_no_kl_over_all(kind: str, temperature: float) -> None:
    """0 to float32 rounding, in value and gradient, where the targets lose nothing."""
    teacher = drawn(16, 200, seed=2)
    student = teacher.clone().requires_grad_()
    value = forward_kl_of_all(student, shaped(kind, teacher, 8), temperature)
    value.sum().backward()
    assert student.grad is not None
    assert float(value.detach().abs().max()) <= 1e-5 and float(student.grad.abs().max()) <= 1e-5


@TEMPERATURES
@pytest.mark.parametrize("kind", SHAPED)
def test_gradient_of_all_by_finite_differences(kind: str, temperature: float) -> None:
    """The gradient in the student's logits is that of the float64 reference, for every token."""
    teacher, student = drawn(2), drawn(2, seed=1).requires_grad_()
    forward_kl_of_all(student, shaped(kind, teacher), temperature).sum().backward()
    assert student.grad is not None
    step, expected = 1e-5, np.zeros((2, 20))
    for position in range(2):
        p, q = rows(teacher)[position], rows(student)[position]
        for token in range(20):
            high, low = q.copy(), q.copy()
            high[token] += step
            low[token] -= step
            rise = reference_dense_kl(p, high, temperature) - reference_dense_kl(p, low, temperature)
            expected[position, token] = rise / (2 * step)
    interpolated = 0.1 * slack(temperature) if kind == "sketch" else 0.0
    np.testing.assert_allclose(student.grad.numpy(), expected, atol=2e-6 + interpolated)


def test_a_rounded_sketch_keeps_topk_and_mass() -> None:
    """A sketch that says nothing of the tail still gives the right KL over k + 1 buckets, and more over all."""
    teacher, student = drawn(8), drawn(8, seed=1)
    exact = exact_targets("sketch", teacher, 4)
    assert isinstance(exact, CompactTargets) and exact.coordinates is not None
    poor = replace(exact, coordinates=torch.zeros_like(exact.coordinates))
    assert torch.equal(known_kl(student, poor, 3.0), forward_kl(student, exact, 3.0))
    buckets = poor.log_probs(3.0).exp()
    inside = buckets.gather(-1, poor.topk_ids)
    torch.testing.assert_close(inside, poor.topk_log_probs(3.0).exp(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        buckets.sum(dim=-1) - inside.sum(dim=-1), poor.tail_mass(3.0), rtol=1e-4, atol=1e-6
    )
    assert bool((forward_kl_of_all(student, poor, 3.0) >= forward_kl(student, poor, 3.0) - 1e-6).all())


@TEMPERATURES
def test_dense_kl_against_the_reference(temperature: float) -> None:
    """Over the whole vocabulary; leading dimensions are kept."""
    teacher, student = drawn(6), drawn(6, seed=1)
    got = dense_forward_kl(teacher.view(2, 3, 20), student.view(2, 3, 20), temperature)
    pairs = zip(rows(teacher), rows(student), strict=True)
    expected = [reference_dense_kl(p, q, temperature) for p, q in pairs]
    assert got.shape == (2, 3)
    np.testing.assert_allclose(got.reshape(-1).numpy(), expected, rtol=1e-5, atol=1e-6)


@TEMPERATURES
def test_bucket_log_probs_against_the_reference(temperature: float) -> None:
    """Log-probability of given tokens and of everything else."""
    logits, ids = drawn(3), torch.tensor([[0, 5], [19, 2], [7, 8]])
    buckets = bucket_log_probs(logits, ids, temperature)
    topk, tail = buckets[:, :2], buckets[:, 2]
    for position in range(3):
        q = probabilities(rows(logits)[position], temperature)
        inside = [q[token] for token in ids[position].tolist()]
        np.testing.assert_allclose(topk[position].numpy(), np.log(inside), atol=1e-5)
        assert float(tail[position]) == pytest.approx(math.log(math.fsum(q) - math.fsum(inside)), abs=1e-5)


@TEMPERATURES
@pytest.mark.parametrize("scale", [0.1, 2.0, 10.0])
@pytest.mark.parametrize("count", [1, 8, 64, 200])
def test_identical_models_have_no_divergence(temperature: float, scale: float, count: int) -> None:
    """0 ± 1e-4 at every temperature, whatever lies in the tail."""
    logits = drawn(16, 200, scale, seed=2)
    got = forward_kl(logits, CompactTargets.from_logits(logits, count), temperature)
    assert float(got.abs().max()) <= 1e-4
    assert float(dense_forward_kl(logits, logits, temperature).abs().max()) <= 1e-6


@TEMPERATURES
@pytest.mark.parametrize("shift", [-30.0, 17.0])
def test_a_common_shift_of_logits_changes_nothing(temperature: float, shift: float) -> None:
    """Only differences of logits count, on either side."""
    teacher, student = drawn(8), drawn(8, seed=1)
    targets = CompactTargets.from_logits(teacher, 4)
    moved = CompactTargets.from_logits(teacher + shift, 4)
    expected = forward_kl(student, targets, temperature)
    torch.testing.assert_close(forward_kl(student, moved, temperature), expected, rtol=0, atol=5e-5)
    torch.testing.assert_close(forward_kl(student + shift, targets, temperature), expected, rtol=0, atol=5e-5)


@TEMPERATURES
def test_never_negative_and_below_the_dense_kl(temperature: float) -> None:
    """0 ≤ bucket KL ≤ dense KL, rising with k, for near and for far students."""
    teacher = drawn(64, 50, 3.0, seed=3)
    for distance in (0.0, 1e-3, 0.1, 3.0):
        student = teacher + distance * drawn(64, 50, 1.0, seed=4)
        dense = dense_forward_kl(teacher, student, temperature)
        most = 1e-5 + (0.0 if temperature in NODES else 5e-3) * dense  # interpolated for one token kept, too
        below = torch.zeros(64)
        for count in (1, 2, 8, 30, 49):
            bucket = forward_kl(student, CompactTargets.from_logits(teacher, count), temperature)
            assert float(bucket.min()) >= -1e-5
            assert bool((bucket >= below - most).all()) and bool((bucket <= dense + most).all())
            below = bucket
    assert float((dense - below).max()) > 1e-3 or float(dense.max()) > 1e-3


@TEMPERATURES
def test_all_tokens_kept_is_the_dense_kl(temperature: float) -> None:
    """k = V (and k asked beyond V) leaves no tail."""
    teacher, student = drawn(8), drawn(8, seed=1)
    dense = dense_forward_kl(teacher, student, temperature)
    for count in (20, 500):
        got = forward_kl(student, CompactTargets.from_logits(teacher, count), temperature)
        torch.testing.assert_close(got, dense, rtol=1e-5, atol=1e-6)


def test_direction_is_teacher_to_student() -> None:
    """A sharp teacher before a flat student differs from the reverse, by known closed forms."""
    sharp, flat = torch.zeros(1, 4), torch.zeros(1, 4)
    sharp[0, 2] = math.log(27.0)  # probabilities 0.9 and three times 1/30
    forward = 0.9 * math.log(0.9 / 0.25) + 0.1 * math.log((1 / 30) / 0.25)
    backward = 0.25 * math.log(0.25 / 0.9) + 0.75 * math.log(0.25 / (1 / 30))
    for count in (1, 4):
        got = forward_kl(flat, CompactTargets.from_logits(sharp, count), 1.0)
        assert float(got) == pytest.approx(forward, rel=1e-5)
    assert float(dense_forward_kl(sharp, flat)) == pytest.approx(forward, rel=1e-5)
    assert float(dense_forward_kl(flat, sharp)) == pytest.approx(backward, rel=1e-5)
    assert abs(forward - backward) > 0.2


@TEMPERATURES
@pytest.mark.parametrize("count", [1, 4, 20])
def test_gradient_by_finite_differences(count: int, temperature: float) -> None:
    """The gradient in the student's logits is that of the float64 reference, inside and in the tail."""
    teacher, student = drawn(2), drawn(2, seed=1).requires_grad_()
    forward_kl(student, CompactTargets.from_logits(teacher, count), temperature).sum().backward()
    assert student.grad is not None
    step, expected = 1e-5, np.zeros((2, 20))
    for position in range(2):
        p, q = rows(teacher)[position], rows(student)[position]
        for token in range(20):
            high, low = q.copy(), q.copy()
            high[token] += step
            low[token] -= step
            above = reference_bucket_kl(p, high, count, temperature)
            expected[position, token] = (above - reference_bucket_kl(p, low, count, temperature)) / (2 * step)
    np.testing.assert_allclose(student.grad.numpy(), expected, atol=2e-6 + 0.1 * slack(temperature))


def peaked(height: float, vocab_size: int = 30) -> Tensor:
    """One position whose first four tokens stand ``height`` above the others."""
    logits = drawn(1, vocab_size, 0.5, seed=5)
    logits[:, :4] += height
    return logits


@TEMPERATURES
@pytest.mark.parametrize("teacher_height", [-40.0, 4.0, 15.0, 40.0, 1000.0])
@pytest.mark.parametrize("student_height", [-1000.0, -40.0, 15.0, 40.0, 1000.0])
def test_extreme_logits_stay_finite(teacher_height: float, student_height: float, temperature: float) -> None:
    """A tail that is almost empty or almost everything, on either side: finite value and gradient."""
    student = peaked(student_height).requires_grad_()
    targets = CompactTargets.from_logits(peaked(teacher_height), 4)
    value = forward_kl(student, targets, temperature)
    value.sum().backward()
    assert student.grad is not None
    assert bool(torch.isfinite(value).all()) and bool(torch.isfinite(student.grad).all())
    assert value.item() >= -1e-5 and float(student.grad.abs().max()) <= 1.0001


@pytest.mark.parametrize(
    "student_height",
    [
        10.0,
        20.0,
        40.0,
    ],
)
def test_a_collapsed_tail_is_pulled_back(student_height: float) -> None:
    """A student (almost) without a tail before a teacher with one: the tail's gradient is q_tail − p_tail."""
    student = peaked(student_height).requires_grad_()
    targets = CompactTargets.from_logits(peaked(4.0), 4)
    assert sorted(targets.topk_ids[0].tolist()) == [0, 1, 2, 3] and float(targets.tail_mass(1.0)) > 0.05
    forward_kl(student, targets, 1.0).sum().backward()
    assert student.grad is not None
    student_tail = probabilities(rows(student)[0], 1.0)[4:].sum()
    expected = student_tail - float(targets.tail_mass(1.0))
    assert float(student.grad[:, 4:].sum()) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("height", [8.0, 11.0])
def test_a_thin_tail_is_still_exact(height: float) -> None:
    """Tails of 1e-2 to 1e-4 keep their value to float32 rounding."""
    teacher, student = peaked(height), peaked(height - 2.0)
    got = forward_kl(student, CompactTargets.from_logits(teacher, 4), 1.0)
    np.testing.assert_allclose(got.numpy(), reference_rows(teacher, student, 4, 1.0), atol=5e-6)


@pytest.mark.parametrize("temperature", [0.99, 0.5, 1e-6])
def test_temperatures_below_one_raise(temperature: float) -> None:
    """The tail's mass there is not known, so it is not guessed."""
    for kind in ("buckets", "sketch"):
        with pytest.raises(ValueError, match=f"temperatures from 1 on, not at {temperature:g}"):
            known_kl(drawn(2, seed=1), exact_targets(kind, drawn(2), 4), temperature)


def test_cross_entropy_against_the_reference() -> None:
    """−log p(label) for each position, 0 where ignored, nothing for no positions."""
    logits, labels = drawn(4), torch.tensor([3, IGNORE_INDEX, 19, 0])
    got = cross_entropy(logits, labels)
    for position in (0, 2, 3):
        q = probabilities(rows(logits)[position], 1.0)
        assert float(got[position]) == pytest.approx(-math.log(q[labels[position]]), rel=1e-5)
    assert float(got[1]) == 0.0
    assert cross_entropy(logits[:0], labels[:0]).shape == (0,)


def test_ignored_labels_have_no_gradient() -> None:
    """q − 1[label] at each position, 0 at ignored ones."""
    logits = drawn(2).requires_grad_()
    cross_entropy(logits, torch.tensor([5, IGNORE_INDEX])).sum().backward()
    expected = probabilities(rows(logits)[0], 1.0)
    expected[5] -= 1.0
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad[0].numpy(), expected, atol=1e-6)
    assert float(logits.grad[1].abs().max()) == 0.0


@TEMPERATURES
def test_parts_equal_the_whole(temperature: float) -> None:
    """Positions are independent: any division gives the same values; no positions give none."""
    teacher, student = drawn(7), drawn(7, seed=1)
    targets = CompactTargets.from_logits(teacher, 4)
    whole = forward_kl(student, targets, temperature)
    parts = [forward_kl(student[i], targets.select(i), temperature) for i in torch.arange(7).split(3)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-7 if temperature in NODES else 1e-6)
    none = torch.arange(0)
    assert forward_kl(student[none], targets.select(none), temperature).shape == (0,)


def test_bfloat16_logits_are_computed_in_float32() -> None:
    """Under autocast the student's logits arrive in bfloat16; the divergence is made in float32."""
    teacher, student = drawn(8), drawn(8, seed=1).bfloat16()
    targets = CompactTargets.from_logits(teacher, 4)
    got = forward_kl(student, targets, 3.0)
    assert got.dtype == torch.float32 and cross_entropy(student, torch.zeros(8).long()).dtype == torch.float32
    assert dense_forward_kl(student, student).dtype == torch.float32
    assert torch.equal(got, forward_kl(student.float(), targets, 3.0))
