"""The closed-form loss and gradient against autograd through the pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from distill.losses import divergences
from distill.losses.divergences import Divergence
from distill.losses.fused import ChunkResult, Scratch, Weights, divergence_and_cross_entropy
from teachers.targets.distributions import CompactTargets
from teachers.targets.output_head import OutputHead
from teachers.targets.stored_arrays import Targets
from tests.support.references import FAMILY, case
from tests.support.references import drawn as draw
from tests.support.stores import exact_targets

V = 60
TEMPERATURES = (1.0, 1.3, 2.0, 3.0)
WEIGHTS = ((0.7, 0.3), (1.0, 0.0), (0.0, 1.0), (2.5, 4.0))
TARGETS = ("buckets", "sketch", "rounded sketch", "hidden", "dense", "all kept")
drawn = partial(draw, vocab_size=V)


def shaped(targets_kind: str, logits: Tensor, count: int = 8) -> Targets:
    """Targets of one of ``TARGETS``."""
    if targets_kind == "all kept":
        return CompactTargets.from_logits(logits, logits.shape[1])
    targets = exact_targets(targets_kind.removeprefix("rounded "), logits, count)
    if targets_kind == "rounded sketch":
        assert isinstance(targets, CompactTargets) and targets.coordinates is not None
        return replace(targets, coordinates=targets.coordinates.round())
    return targets


def computed(
    logits: Tensor,
    targets: Targets,
    labels: Tensor,
    weights: Weights,
    scratch: Scratch | None = None,
) -> ChunkResult:
    """The closed form of a copy of ``logits``, which it overwrites."""
    return divergence_and_cross_entropy(logits.clone(), targets, labels, weights, scratch)


def every_row(
    teacher: Tensor, temperatures: tuple[float, ...] = (1.0, 2.0)
) -> Iterator[tuple[Divergence, str, float, Targets]]:
    """Each divergence with each kind of targets at each temperature."""
    for targets_kind in TARGETS:
        targets = shaped(targets_kind, teacher)
        for kind, temperature in product(FAMILY, temperatures):
            yield kind, targets_kind, temperature, targets


def tensors(record: Targets | OutputHead) -> dict[str, Tensor]:
    """Copies of every tensor of some targets and of their head."""
    found = {
        name: value.clone() for name, value in vars(record).items() if isinstance(value, Tensor)
    }
    head = getattr(record, "head", None)
    return found | (tensors(head) if head is not None else {})


def assert_equals_autograd(
    student: Tensor,
    targets: Targets,
    labels: Tensor,
    asked: Sequence[Weights],
    parts: int = 1,
    atol: float = 1e-5,
) -> list[ChunkResult]:
    """The closed form of each of the equal ``parts``, after comparing it with autograd; ``asked``
    differ in their weights alone."""
    temperature, kind = asked[0].temperature, asked[0].divergence
    logits = student.double().requires_grad_()
    kds = divergences.divergence(logits, targets, temperature, kind)
    ignored = divergences.IGNORE_INDEX
    ces = torch.nn.functional.cross_entropy(logits, labels, ignore_index=ignored, reduction="none")
    kd_slopes, ce_slopes = (torch.autograd.grad(x.sum(), logits)[0] for x in (kds, ces))
    results = []
    for part, rows in enumerate(torch.arange(len(student)).chunk(parts)):
        kd, ce = kds[rows].sum().item(), ces[rows].sum().item()
        # Only the reverse KL's slopes are unbounded: they have the digits of log(q / p), up to 1e4.
        digits = 1e-7 * kd if kind.form == "reverse_kl" else 0.0
        known = targets.select(rows)
        for weights in asked:
            with case("part", part, weights):
                found = computed(student[rows], known, labels[rows], weights)
                results.append(found)
                assert found.kd.dtype == found.ce.dtype == found.gradient.dtype == torch.float32
                assert found.kd.isfinite() and found.ce.isfinite()
                assert found.kd.item() == pytest.approx(kd, rel=1e-5, abs=atol)
                assert found.ce.item() == pytest.approx(ce, rel=1e-5, abs=atol)
                gradient = weights.kd * kd_slopes[rows] + weights.ce * ce_slopes[rows]
                off = (found.gradient - gradient).abs() - 1e-4 * gradient.abs()
                assert off.max().item() <= 2e-6 + digits  # false of NaN
    return results


def test_equals_autograd() -> None:
    """Both sums and every gradient; labels inside and outside the top-k, some ignored."""
    teacher, student = drawn(24), drawn(24, seed=1)
    known = {f"{n} kept": CompactTargets.from_logits(teacher, n) for n in (1, 8, 59, 60)}
    known |= {targets_kind: shaped(targets_kind, teacher) for targets_kind in TARGETS[1:]}
    labels = torch.randint(0, V, (24,), generator=torch.Generator().manual_seed(2))
    labels[:4] = teacher[:4].argmax(dim=1)
    labels[::7] = divergences.IGNORE_INDEX
    for kind, (name, targets), temperature in product(FAMILY, known.items(), TEMPERATURES):
        with case(kind, name, temperature):
            asked = [Weights(kd, ce, temperature, kind) for kd, ce in WEIGHTS]
            assert_equals_autograd(student, targets, labels, asked)


def test_extreme_students() -> None:
    """A student that gives the tail, or the rest, almost nothing: finite, as autograd has it."""
    heights = torch.tensor([-1e4, -1000.0, -40.0, 12.0, 40.0, 1000.0, 1e4])
    student = drawn(6, scale=0.5, seed=1).repeat(7, 1)
    student[:, :8] += heights.repeat_interleave(6)[:, None]
    labels = torch.tensor([0, 1, 2, 50, 51, 52]).repeat(7)
    for kind, name, temperature, targets in every_row(drawn(6).repeat(7, 1), TEMPERATURES):
        with case(kind, name, temperature):
            asked = [Weights(0.7, 0.3, temperature, kind)]
            assert_equals_autograd(student, targets, labels, asked, parts=7, atol=1e-4)


def test_extreme_teachers() -> None:
    """A teacher that is all but certain, or excludes some tokens: finite, as autograd has it."""
    heights = torch.tensor([-1e4, 90.0, 1e4])
    teacher, student = drawn(6).repeat(3, 1), drawn(6, seed=1).repeat(3, 1)
    teacher[:, 3:5] += heights.repeat_interleave(6)[:, None]
    labels = torch.tensor([0, 3, 4, 50, 51, 52]).repeat(3)
    for kind, name, temperature, targets in every_row(teacher, TEMPERATURES):
        with case(kind, name, temperature):
            asked = [Weights(0.7, 0.3, temperature, kind)]
            assert_equals_autograd(student, targets, labels, asked, parts=3, atol=1e-4)


def test_targets_are_not_ours_to_change() -> None:
    """The logits are overwritten, the teacher's answer is not: a chunk may be asked for again."""
    student = drawn(6, seed=1)
    for kind, name, temperature, targets in every_row(drawn(6)):
        with case(kind, name, temperature):
            before, weights = tensors(targets), Weights(1.0, 1.0, temperature, kind)
            first, again = (computed(student, targets, torch.arange(6), weights) for _ in range(2))
            assert torch.equal(first.gradient, again.gradient) and torch.equal(first.kd, again.kd)
            after = tensors(targets)
            assert len(before) > 0 and before.keys() == after.keys()
            assert all(torch.equal(after[key], value) for key, value in before.items())


def test_parts_equal_the_whole() -> None:
    """Chunks of any size, one after the other in the same scratch, add up to the whole."""
    student, labels = drawn(23, seed=1), torch.arange(23)
    labels[::5] = divergences.IGNORE_INDEX
    other = Weights(0.7, 0.3, 3.0, Divergence("jensen_shannon"))
    for kind, name, temperature, targets in every_row(drawn(23)):
        weights = Weights(0.7, 0.3, temperature, kind)
        whole = computed(student, targets, labels, weights)
        scratch, parts = Scratch(), []
        for i in torch.arange(23).split(5):
            for asked in (other, weights):
                part = computed(student[i], targets.select(i), labels[i], asked, scratch)
            parts.append((part.kd, part.ce, part.gradient.clone()))
        kd, ce, gradients = zip(*parts, strict=True)
        with case(kind, name, temperature):
            torch.testing.assert_close(torch.stack(kd).sum(), whole.kd, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(torch.stack(ce).sum(), whole.ce, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(torch.cat(gradients), whole.gradient, rtol=1e-6, atol=1e-7)


def test_no_positions_and_no_labels() -> None:
    """Nothing gives zeros and an empty gradient; ignored labels leave the divergence alone."""
    student, ignored = drawn(6, seed=1), torch.full((6,), divergences.IGNORE_INDEX)
    for kind, name, temperature, targets in every_row(drawn(6)):
        with case(kind, name, temperature):
            weights = Weights(0.7, 0.3, temperature, kind)
            none = computed(student[:0], targets.select(slice(0, 0)), ignored[:0], weights)
            assert float(none.kd) == 0.0 and float(none.ce) == 0.0
            assert none.gradient.shape == (0, V)
            (found,) = assert_equals_autograd(student, targets, ignored, [weights])
            assert float(found.ce) == 0.0 and float(found.gradient.abs().max()) > 1e-3
            alone = computed(student, targets, torch.arange(6), replace(weights, ce=0.0))
            torch.testing.assert_close(alone.gradient, found.gradient, rtol=0, atol=1e-7)


def test_identical_models_have_no_gradient() -> None:
    """The divergence of a model from itself is 0 with gradient 0, whatever lies in the tail."""
    teacher, labels = draw(16, 500, seed=3), torch.zeros(16, dtype=torch.int64)
    for kind, name, temperature, targets in every_row(teacher, TEMPERATURES):
        if name == "rounded sketch":
            continue
        with case(kind, name, temperature):
            weights = Weights(1.0, 0.0, temperature, kind)
            found = computed(teacher, targets, labels, weights)
            assert abs(float(found.kd)) < 1e-6 * 16
            assert float(found.gradient.abs().max()) < 1e-6


def test_a_damaged_student_is_seen() -> None:
    """NaN in the logits reaches the loss, where the engine stops it."""
    damaged, labels = drawn(2), torch.zeros(2, dtype=torch.int64)
    damaged[1, 30] = torch.nan
    for kind, name, temperature, targets in every_row(drawn(2)):
        weights = Weights(1.0, 1.0, temperature, kind)
        found = computed(damaged, targets, labels, weights)
        assert found.kd.isnan() and found.ce.isnan(), (kind, name, temperature)
