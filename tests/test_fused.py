"""The closed-form loss and gradient against autograd through the pure functions, which have references."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distill import losses
from distill.fused import Weights, kl_and_cross_entropy
from teachers.records import Targets
from teachers.soft_targets import CompactTargets
from tests.conftest import exact_targets

TEMPERATURES = (1.0, 1.3, 2.0, 3.0)
SHAPED = ("sketch", "rounded sketch", "hidden", "dense", "all kept")  # targets that know the tail's shape


def drawn(positions: int, vocab_size: int = 60, scale: float = 2.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(positions, vocab_size, generator=generator)


def shaped(kind: str, logits: Tensor, count: int = 8) -> Targets:
    """Targets of one of ``SHAPED``."""
    if kind == "all kept":
        return CompactTargets.from_logits(logits, logits.shape[1])
    targets = exact_targets(kind.removeprefix("rounded "), logits, count)
    if kind == "rounded sketch":
        assert isinstance(targets, CompactTargets) and targets.coordinates is not None
        return replace(targets, coordinates=targets.coordinates.round())
    return targets


def expected(
    logits: Tensor, targets: Targets, labels: Tensor, weights: Weights
) -> tuple[Tensor, Tensor, Tensor]:
    """KL sum, CE sum and gradient by autograd."""
    logits = logits.clone().requires_grad_()
    if isinstance(targets, CompactTargets) and not targets.has_tail_shape:
        kl = losses.forward_kl(logits, targets, weights.temperature).sum()
    else:
        kl = losses.forward_kl_of_all(logits, targets, weights.temperature).sum()
    ce = losses.cross_entropy(logits, labels).sum()
    (weights.kl * kl + weights.ce * ce).backward()
    assert logits.grad is not None
    return kl.detach(), ce.detach(), logits.grad


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 0.0), (0.0, 1.0), (2.5, 4.0)])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("count", [1, 8, 59, 60])
def test_equals_autograd(count: int, temperature: float, weights: tuple[float, float]) -> None:
    """Both sums and every gradient; labels inside and outside the top-k, some ignored."""
    teacher, student = drawn(24), drawn(24, seed=1)
    targets = CompactTargets.from_logits(teacher, count)
    labels = torch.randint(0, 60, (24,), generator=torch.Generator().manual_seed(2))
    labels[:4] = targets.topk_ids[:4, 0]
    labels[::7] = losses.IGNORE_INDEX
    share = Weights(weights[0], weights[1], temperature)
    kl, ce, gradient = expected(student, targets, labels, share)
    found = kl_and_cross_entropy(student.clone(), targets, labels, share)
    torch.testing.assert_close(found.kl, kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.ce, ce, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 0.0), (0.0, 1.0), (2.5, 4.0)])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", SHAPED)
def test_over_all_equals_autograd(kind: str, temperature: float, weights: tuple[float, float]) -> None:
    """Where the shape of the tail is known, value and gradient run over every token."""
    teacher, student = drawn(24), drawn(24, seed=1)
    targets = shaped(kind, teacher)
    labels = torch.randint(0, 60, (24,), generator=torch.Generator().manual_seed(2))
    labels[:4] = targets.best()[:4]
    labels[::7] = losses.IGNORE_INDEX
    share = Weights(weights[0], weights[1], temperature)
    kl, ce, gradient = expected(student, targets, labels, share)
    found = kl_and_cross_entropy(student.clone(), targets, labels, share)
    torch.testing.assert_close(found.kl, kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.ce, ce, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("kind", SHAPED)
def test_targets_are_not_ours_to_change(kind: str) -> None:
    """The logits are overwritten, the teacher's answer is not: a chunk may be asked for again."""
    teacher, student = drawn(6), drawn(6, seed=1)
    targets, untouched = shaped(kind, teacher.clone()), shaped(kind, teacher.clone())
    labels = torch.arange(6)
    first = kl_and_cross_entropy(student.clone(), targets, labels, Weights(1.0, 1.0, 2.0))
    again = kl_and_cross_entropy(student.clone(), targets, labels, Weights(1.0, 1.0, 2.0))
    assert torch.equal(first.gradient, again.gradient) and torch.equal(first.kl, again.kl)
    torch.testing.assert_close(targets.log_probs(2.0), untouched.log_probs(2.0), rtol=0, atol=0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("height", [-1000.0, -40.0, 12.0, 40.0, 1000.0])
@pytest.mark.parametrize("kind", SHAPED)
def test_extreme_students_over_all(kind: str, height: float, temperature: float) -> None:
    """A student that gives the tail, or what is not tail, almost nothing: finite, and as autograd has it."""
    teacher, student = drawn(6), drawn(6, scale=0.5, seed=1)
    student[:, :8] += height
    targets = shaped(kind, teacher)
    labels = torch.tensor([0, 1, 2, 50, 51, 52])
    share = Weights(0.7, 0.3, temperature)
    kl, ce, gradient = expected(student, targets, labels, share)
    found = kl_and_cross_entropy(student.clone(), targets, labels, share)
    assert bool(torch.isfinite(found.gradient).all())
    torch.testing.assert_close(found.kl, kl, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.ce, ce, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("height", [-1e4, 90.0, 1e4])
@pytest.mark.parametrize("kind", ["buckets", *SHAPED])
def test_extreme_teachers(kind: str, height: float, temperature: float) -> None:
    """A teacher that is all but certain, or all but excludes some tokens: finite, and as autograd has it."""
    teacher, student = drawn(6), drawn(6, seed=1)
    teacher[:, 3:5] += height
    targets = CompactTargets.from_logits(teacher, 8) if kind == "buckets" else shaped(kind, teacher)
    labels = torch.tensor([0, 3, 4, 50, 51, 52])
    share = Weights(0.7, 0.3, temperature)
    kl, ce, gradient = expected(student, targets, labels, share)
    found = kl_and_cross_entropy(student.clone(), targets, labels, share)
    assert bool(torch.isfinite(found.kl)) and bool(torch.isfinite(found.gradient).all())
    torch.testing.assert_close(found.kl, kl, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.ce, ce, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("height", [-1000.0, -40.0, 12.0, 40.0, 1000.0])
def test_extreme_students(height: float, temperature: float) -> None:
    """A student whose tail is almost nothing or almost everything: finite, and as autograd has it."""
    teacher, student = drawn(6), drawn(6, scale=0.5, seed=1)
    student[:, :8] += height
    targets = CompactTargets.from_logits(teacher, 8)
    labels = torch.tensor([0, 1, 2, 50, 51, 52])
    share = Weights(0.7, 0.3, temperature)
    kl, ce, gradient = expected(student, targets, labels, share)
    found = kl_and_cross_entropy(student.clone(), targets, labels, share)
    torch.testing.assert_close(found.kl, kl, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.ce, ce, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", ["buckets", "sketch", "hidden", "dense", "all kept"])
def test_identical_models_have_no_gradient(kind: str, temperature: float) -> None:
    """The KL of a model with itself is 0 with gradient 0, whatever lies in the tail."""
    teacher = drawn(16, 500, seed=3)
    targets = CompactTargets.from_logits(teacher, 8) if kind == "buckets" else shaped(kind, teacher)
    labels = torch.zeros(16, dtype=torch.int64)
    found = kl_and_cross_entropy(teacher.clone(), targets, labels, Weights(1.0, 0.0, temperature))
    assert abs(float(found.kl)) < 1e-4 * 16
    assert float(found.gradient.abs().max()) < 1e-6


@pytest.mark.parametrize("kind", ["buckets", *SHAPED])
def test_a_damaged_student_is_seen(kind: str) -> None:
    """NaN in the logits reaches the loss, where the engine stops it."""
    student = drawn(2)
    student[1, 30] = torch.nan
    targets = CompactTargets.from_logits(drawn(2), 8) if kind == "buckets" else shaped(kind, drawn(2))
    found = kl_and_cross_entropy(student, targets, torch.zeros(2, dtype=torch.int64), Weights(1.0, 1.0, 1.0))
    assert bool(torch.isnan(found.kl)) and bool(torch.isnan(found.ce))
