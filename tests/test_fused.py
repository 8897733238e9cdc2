"""The closed-form loss and gradient against autograd through the pure functions, which have references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill import losses
from distill.fused import Weights, kl_and_cross_entropy
from teachers.soft_targets import CompactTargets

NODES = (1.0, 2.0, 3.0)


def drawn(positions: int, vocab_size: int = 60, scale: float = 2.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(positions, vocab_size, generator=generator)


def expected(
    logits: Tensor, targets: CompactTargets, labels: Tensor, weights: Weights
) -> tuple[Tensor, Tensor, Tensor]:
    """KL sum, CE sum and gradient by autograd."""
    logits = logits.clone().requires_grad_()
    kl = losses.forward_kl(logits, targets, weights.temperature).sum()
    ce = losses.cross_entropy(logits, labels).sum()
    (weights.kl * kl + weights.ce * ce).backward()
    assert logits.grad is not None
    return kl.detach(), ce.detach(), logits.grad


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 0.0), (0.0, 1.0), (2.5, 4.0)])
@pytest.mark.parametrize("temperature", NODES)
@pytest.mark.parametrize("count", [1, 8, 59, 60])
def test_equals_autograd(count: int, temperature: float, weights: tuple[float, float]) -> None:
    """Both sums and every gradient; labels inside and outside the top-k, some ignored."""
    teacher, student = drawn(24), drawn(24, seed=1)
    targets = CompactTargets.from_logits(teacher, count, NODES)
    labels = torch.randint(0, 60, (24,), generator=torch.Generator().manual_seed(2))
    labels[:4] = targets.topk_ids[:4, 0]
    labels[::7] = losses.IGNORE_INDEX
    share = Weights(weights[0], weights[1], temperature)
    kl, ce, gradient = expected(student, targets, labels, share)
    found = kl_and_cross_entropy(student.clone(), targets, labels, share)
    torch.testing.assert_close(found.kl, kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.ce, ce, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("temperature", NODES)
@pytest.mark.parametrize("height", [-1000.0, -40.0, 12.0, 40.0, 1000.0])
def test_extreme_students(height: float, temperature: float) -> None:
    """A student whose tail is almost nothing or almost everything: finite, and as autograd has it."""
    teacher, student = drawn(6), drawn(6, scale=0.5, seed=1)
    student[:, :8] += height
    targets = CompactTargets.from_logits(teacher, 8, NODES)
    labels = torch.tensor([0, 1, 2, 50, 51, 52])
    share = Weights(0.7, 0.3, temperature)
    kl, ce, gradient = expected(student, targets, labels, share)
    found = kl_and_cross_entropy(student.clone(), targets, labels, share)
    torch.testing.assert_close(found.kl, kl, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.ce, ce, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("temperature", NODES)
def test_identical_models_have_no_gradient(temperature: float) -> None:
    """The KL of a model with itself is 0 with gradient 0, whatever lies in the tail."""
    teacher = drawn(16, 500, seed=3)
    targets = CompactTargets.from_logits(teacher, 8, NODES)
    labels = torch.zeros(16, dtype=torch.int64)
    found = kl_and_cross_entropy(teacher.clone(), targets, labels, Weights(1.0, 0.0, temperature))
    assert abs(float(found.kl)) < 1e-4 * 16
    assert float(found.gradient.abs().max()) < 1e-6


def test_a_damaged_student_is_seen() -> None:
    """NaN in the logits reaches the loss, where the engine stops it."""
    student = drawn(2)
    student[1, 30] = torch.nan
    targets = CompactTargets.from_logits(drawn(2), 8, NODES)
    found = kl_and_cross_entropy(student, targets, torch.zeros(2, dtype=torch.int64), Weights(1.0, 1.0, 1.0))
    assert bool(torch.isnan(found.kl)) and bool(torch.isnan(found.ce))
