"""The closed-form loss and gradient against autograd through the pure functions, which have references."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distill import losses
from distill.fused import ChunkResult, Scratch, Weights, divergence_and_cross_entropy
from distill.losses import Divergence
from teachers.records import Targets
from teachers.soft_targets import CompactTargets
from tests.conftest import exact_targets

TEMPERATURES = (1.0, 1.3, 2.0, 3.0)
KINDS = pytest.mark.parametrize(
    "kind",
    [
        Divergence(),
        Divergence("reverse_kl"),
        Divergence("jensen_shannon"),
        Divergence("jensen_shannon", js_mixing=0.1),
        Divergence("skewed_forward_kl"),
        Divergence("skewed_forward_kl", skew=0.0),
        Divergence("skewed_reverse_kl"),
        Divergence("skewed_reverse_kl", skew=0.7),
    ],
    ids=lambda kind: f"{kind.name}-{kind.js_mixing:g}-{kind.skew:g}",
)
SHAPED = ("sketch", "rounded sketch", "hidden", "dense", "all kept")  # targets that know the tail's shape


def drawn(positions: int, vocab_size: int = 60, scale: float = 2.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(positions, vocab_size, generator=generator)


def shaped(targets_kind: str, logits: Tensor, count: int = 8) -> Targets:
    """Targets of one of ``SHAPED``, or ``buckets``."""
    if targets_kind == "all kept":
        return CompactTargets.from_logits(logits, logits.shape[1])
    targets = exact_targets(targets_kind.removeprefix("rounded "), logits, count)
    if targets_kind == "rounded sketch":
        assert isinstance(targets, CompactTargets) and targets.coordinates is not None
        return replace(targets, coordinates=targets.coordinates.round())
    return targets


def expected(
    logits: Tensor, targets: Targets, labels: Tensor, weights: Weights
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of divergence and CE, and the gradient, by autograd in float64."""
    logits = logits.double().requires_grad_()
    kd = losses.divergence(logits, targets, weights.temperature, weights.divergence).sum()
    ce = torch.nn.functional.cross_entropy(logits, labels, ignore_index=losses.IGNORE_INDEX, reduction="sum")
    (weights.kd * kd + weights.ce * ce).backward()
    assert logits.grad is not None
    return kd.detach(), ce.detach(), logits.grad


def assert_equals_autograd(
    student: Tensor, targets: Targets, labels: Tensor, weights: Weights, atol: float = 1e-5
) -> ChunkResult:
    """The closed form, after comparing both sums and every gradient with autograd's."""
    kd, ce, gradient = expected(student, targets, labels, weights)
    found = divergence_and_cross_entropy(student.clone(), targets, labels, weights)
    assert found.kd.dtype == found.ce.dtype == found.gradient.dtype == torch.float32
    assert bool(torch.isfinite(found.kd)) and bool(torch.isfinite(found.gradient).all())
    torch.testing.assert_close(found.kd.double(), kd, rtol=1e-5, atol=atol)
    torch.testing.assert_close(found.ce.double(), ce, rtol=1e-5, atol=atol)
    # Only the reverse KL's slopes are unbounded: they have the digits of log(q / p), which may be 1e4.
    digits = 1e-7 * float(kd) if weights.divergence.form == "reverse_kl" else 0.0
    torch.testing.assert_close(found.gradient.double(), gradient, rtol=1e-4, atol=2e-6 + digits)
    return found


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 0.0), (0.0, 1.0), (2.5, 4.0)])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("count", [1, 8, 59, 60])
@KINDS
def test_equals_autograd(
    kind: Divergence, count: int, temperature: float, weights: tuple[float, float]
) -> None:
    """Both sums and every gradient; labels inside and outside the top-k, some ignored."""
    teacher, student = drawn(24), drawn(24, seed=1)
    targets = CompactTargets.from_logits(teacher, count)
    labels = torch.randint(0, 60, (24,), generator=torch.Generator().manual_seed(2))
    labels[:4] = targets.topk_ids[:4, 0]
    labels[::7] = losses.IGNORE_INDEX
    assert_equals_autograd(student, targets, labels, Weights(*weights, temperature, kind))


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 0.0), (0.0, 1.0), (2.5, 4.0)])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("targets_kind", SHAPED)
@KINDS
def test_over_all_equals_autograd(
    kind: Divergence, targets_kind: str, temperature: float, weights: tuple[float, float]
) -> None:
    """Where the shape of the tail is known, value and gradient run over every token."""
    teacher, student = drawn(24), drawn(24, seed=1)
    targets = shaped(targets_kind, teacher)
    labels = torch.randint(0, 60, (24,), generator=torch.Generator().manual_seed(2))
    labels[:4] = targets.best()[:4]
    labels[::7] = losses.IGNORE_INDEX
    assert_equals_autograd(student, targets, labels, Weights(*weights, temperature, kind))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("targets_kind", ["buckets", *SHAPED])
@KINDS
def test_targets_are_not_ours_to_change(kind: Divergence, targets_kind: str, temperature: float) -> None:
    """The logits are overwritten, the teacher's answer is not: a chunk may be asked for again."""
    teacher, student = drawn(6), drawn(6, seed=1)
    targets, untouched = shaped(targets_kind, teacher.clone()), shaped(targets_kind, teacher.clone())
    weights = Weights(1.0, 1.0, temperature, kind)
    first = divergence_and_cross_entropy(student.clone(), targets, torch.arange(6), weights)
    again = divergence_and_cross_entropy(student.clone(), targets, torch.arange(6), weights)
    assert torch.equal(first.gradient, again.gradient) and torch.equal(first.kd, again.kd)
    for name, value in targets._tensors().items():
        assert torch.equal(value, untouched._tensors()[name])
    head, unread = getattr(targets, "head", None), getattr(untouched, "head", None)
    assert head is None or (torch.equal(head.matrix, unread.matrix) and torch.equal(head.bias, unread.bias))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("targets_kind", ["buckets", *SHAPED])
@KINDS
def test_parts_equal_the_whole(kind: Divergence, targets_kind: str, temperature: float) -> None:
    """Chunks of any size, one after the other in the same scratch, add up to the whole."""
    teacher, student = drawn(23), drawn(23, seed=1)
    targets, labels = shaped(targets_kind, teacher), torch.arange(23)
    labels[::5] = losses.IGNORE_INDEX
    weights = Weights(0.7, 0.3, temperature, kind)
    whole = divergence_and_cross_entropy(student.clone(), targets, labels, weights)
    scratch, parts = Scratch(), []
    other = Weights(0.7, 0.3, 3.0, Divergence("jensen_shannon"))
    for start in range(0, 23, 5):
        span = slice(start, start + 5)
        divergence_and_cross_entropy(
            student[span].clone(), targets.select(span), labels[span], other, scratch
        )
        part = divergence_and_cross_entropy(
            student[span].clone(), targets.select(span), labels[span], weights, scratch
        )
        parts.append((part.kd, part.ce, part.gradient.clone()))
    kd, ce, gradients = zip(*parts, strict=True)
    torch.testing.assert_close(torch.stack(kd).sum(), whole.kd, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.stack(ce).sum(), whole.ce, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat(gradients), whole.gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("targets_kind", ["buckets", *SHAPED])
@KINDS
def test_no_positions_and_no_labels(kind: Divergence, targets_kind: str, temperature: float) -> None:
    """Nothing gives zeros and an empty gradient; ignored labels leave the divergence alone."""
    teacher, student = drawn(6), drawn(6, seed=1)
    targets, ignored = shaped(targets_kind, teacher), torch.full((6,), losses.IGNORE_INDEX)
    weights = Weights(0.7, 0.3, temperature, kind)
    none = divergence_and_cross_entropy(
        student[:0].clone(), targets.select(slice(0, 0)), ignored[:0], weights
    )
    assert float(none.kd) == 0.0 and float(none.ce) == 0.0 and none.gradient.shape == (0, 60)
    found = assert_equals_autograd(student, targets, ignored, weights)
    assert float(found.ce) == 0.0 and float(found.gradient.abs().max()) > 1e-3
    without = Weights(0.7, 0.0, temperature, kind)
    alone = divergence_and_cross_entropy(student.clone(), targets, torch.arange(6), without)
    torch.testing.assert_close(alone.gradient, found.gradient, rtol=0, atol=1e-7)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("height", [-1e4, -1000.0, -40.0, 12.0, 40.0, 1000.0, 1e4])
@pytest.mark.parametrize("targets_kind", ["buckets", *SHAPED])
@KINDS
def test_extreme_students(kind: Divergence, targets_kind: str, height: float, temperature: float) -> None:
    """A student that gives the tail, or what is not tail, almost nothing: finite, and as autograd has it."""
    teacher, student = drawn(6), drawn(6, scale=0.5, seed=1)
    student[:, :8] += height
    labels = torch.tensor([0, 1, 2, 50, 51, 52])
    assert_equals_autograd(
        student, shaped(targets_kind, teacher), labels, Weights(0.7, 0.3, temperature, kind), 1e-4
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("height", [-1e4, 90.0, 1e4])
@pytest.mark.parametrize("targets_kind", ["buckets", *SHAPED])
@KINDS
def test_extreme_teachers(kind: Divergence, targets_kind: str, height: float, temperature: float) -> None:
    """A teacher that is all but certain, or all but excludes some tokens: finite, and as autograd has it."""
    teacher, student = drawn(6), drawn(6, seed=1)
    teacher[:, 3:5] += height
    labels = torch.tensor([0, 3, 4, 50, 51, 52])
    assert_equals_autograd(
        student, shaped(targets_kind, teacher), labels, Weights(0.7, 0.3, temperature, kind), 1e-4
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("targets_kind", ["buckets", "sketch", "hidden", "dense", "all kept"])
@KINDS
def test_identical_models_have_no_gradient(kind: Divergence, targets_kind: str, temperature: float) -> None:
    """The divergence of a model from itself is 0 with gradient 0, whatever lies in the tail."""
    teacher = drawn(16, 500, seed=3)
    targets, labels = shaped(targets_kind, teacher), torch.zeros(16, dtype=torch.int64)
    weights = Weights(1.0, 0.0, temperature, kind)
    found = divergence_and_cross_entropy(teacher.clone(), targets, labels, weights)
    assert abs(float(found.kd)) < 1e-6 * 16
    assert float(found.gradient.abs().max()) < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("targets_kind", ["buckets", *SHAPED])
@KINDS
def test_a_damaged_student_is_seen(kind: Divergence, targets_kind: str, temperature: float) -> None:
    """NaN in the logits reaches the loss, where the engine stops it."""
    student = drawn(2)
    student[1, 30] = torch.nan
    labels, weights = torch.zeros(2, dtype=torch.int64), Weights(1.0, 1.0, temperature, kind)
    found = divergence_and_cross_entropy(student, shaped(targets_kind, drawn(2)), labels, weights)
    assert bool(torch.isnan(found.kd)) and bool(torch.isnan(found.ce))
