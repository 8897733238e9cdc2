"""The family of divergences against float64 references: direct probabilities, sums of a log(a / b)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.losses import Divergence, divergence, forward_kl, forward_kl_of_all
from teachers.soft_targets import CompactTargets
from tests.conftest import exact_targets
from tests.test_losses import Array, drawn, probabilities, rows, shaped

TEMPERATURES = pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0, 3.0, 5.0])  # all but 5 are stored
TARGETS = pytest.mark.parametrize("targets_kind", ["buckets", "sketch", "hidden", "dense", "all kept"])
FAMILY = (
    Divergence(),
    Divergence("reverse_kl"),
    Divergence("jensen_shannon"),
    Divergence("jensen_shannon", js_mixing=0.1),
    Divergence("jensen_shannon", js_mixing=0.8),
    Divergence("skewed_forward_kl"),
    Divergence("skewed_forward_kl", skew=0.6),
    Divergence("skewed_reverse_kl"),
    Divergence("skewed_reverse_kl", skew=0.6),
)
KINDS = pytest.mark.parametrize(
    "kind", FAMILY, ids=lambda kind: f"{kind.name}-{kind.js_mixing:g}-{kind.skew:g}"
)
KEPT = 4


def kl(p: Array, q: Array) -> float:
    """Σ p log(p / q)."""
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def reference(kind: Divergence, p: Array, q: Array) -> float:
    """The divergence of teacher ``p`` and student ``q``, word for word."""
    b, s = kind.js_mixing, kind.skew
    if kind.name == "forward_kl":
        return kl(p, q)
    if kind.name == "reverse_kl":
        return kl(q, p)
    if kind.name == "jensen_shannon":
        m = b * p + (1 - b) * q
        return b * kl(p, m) + (1 - b) * kl(q, m)
    if kind.name == "skewed_forward_kl":
        return kl(p, s * p + (1 - s) * q)
    return kl(q, (1 - s) * p + s * q)


def in_buckets(p: Array, teacher: Array, count: int) -> Array:
    """``p`` with all but the teacher's ``count`` best tokens thrown together."""
    order = sorted(range(len(teacher)), key=lambda v: -teacher[v])
    return np.array([*(p[v] for v in order[:count]), math.fsum(p[v] for v in order[count:])])


def reference_row(
    kind: Divergence, teacher: Array, student: Array, temperature: float, targets_kind: str
) -> float:
    """``reference`` of one position's logits, over what the targets know."""
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    if targets_kind == "buckets":
        p, q = in_buckets(p, teacher, KEPT), in_buckets(q, teacher, KEPT)
    return reference(kind, p, q)


def of(kind: Divergence, teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """The divergence over the whole vocabulary, ``[N, V]`` twice → ``[N]``."""
    return divergence(student, exact_targets("dense", teacher, KEPT), temperature, kind)


@KINDS
@TARGETS
@TEMPERATURES
def test_against_the_reference(temperature: float, targets_kind: str, kind: Divergence) -> None:
    """Every divergence of every kind of targets at every temperature, for any leading dimensions."""
    teacher, student = drawn(8), drawn(8, seed=1)
    targets = shaped(targets_kind, teacher, KEPT)
    got = divergence(student, targets, temperature, kind)
    pairs = zip(rows(teacher), rows(student), strict=True)
    expected = np.array([reference_row(kind, p, q, temperature, targets_kind) for p, q in pairs])
    assert got.shape == (8,) and got.dtype == torch.float32
    assert expected.min() > 1e-5
    interpolated = 5e-5 if temperature == 5.0 and targets_kind in ("buckets", "sketch") else 0.0
    np.testing.assert_allclose(got.numpy(), expected, rtol=2e-5, atol=1e-6 + interpolated)
    squares = torch.arange(8).view(2, 1, 4)
    shaped_so = divergence(student[squares], targets.select(squares), temperature, kind)
    assert shaped_so.shape == (2, 1, 4)
    torch.testing.assert_close(shaped_so.flatten(), got, rtol=0, atol=2e-6)


@KINDS
@TARGETS
@TEMPERATURES
def test_gradient_by_finite_differences(temperature: float, targets_kind: str, kind: Divergence) -> None:
    """Autograd's gradient in float64 is that of the reference, for every token, in the tail too."""
    teacher, student = drawn(2).double(), drawn(2, seed=1).double().requires_grad_()
    value = divergence(student, shaped(targets_kind, teacher, KEPT), temperature, kind)
    assert value.dtype == torch.float64
    value.sum().backward()
    assert student.grad is not None
    step, expected = 1e-5, np.zeros((2, 20))
    for position in range(2):
        p, q = rows(teacher)[position], rows(student)[position]
        for token in range(20):
            high, low = q.copy(), q.copy()
            high[token] += step
            low[token] -= step
            above = reference_row(kind, p, high, temperature, targets_kind)
            below = reference_row(kind, p, low, temperature, targets_kind)
            expected[position, token] = (above - below) / (2 * step)
    interpolated = 5e-5 if temperature == 5.0 and targets_kind in ("buckets", "sketch") else 0.0
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(student.grad.numpy(), expected, rtol=1e-6, atol=2e-8 + interpolated)


@KINDS
@TARGETS
@TEMPERATURES
def test_identical_models_have_none(temperature: float, targets_kind: str, kind: Divergence) -> None:
    """0 in value and gradient, at every temperature."""
    teacher = drawn(16, 200, seed=2)
    student = teacher.clone().requires_grad_()
    value = divergence(student, shaped(targets_kind, teacher, KEPT), temperature, kind)
    value.sum().backward()
    assert student.grad is not None
    interpolated = temperature == 5.0 and targets_kind in ("buckets", "sketch")
    assert float(value.detach().abs().max()) <= 1e-6
    assert float(student.grad.abs().max()) <= (1e-5 if interpolated else 1e-6)


@TEMPERATURES
def test_direction(temperature: float) -> None:
    """Teacher and student are not exchangeable, but for the reverse form, and for b = 1/2."""
    one, two = drawn(8).double(), drawn(8, seed=1).double()
    for forward, reverse in (
        (Divergence("forward_kl"), Divergence("reverse_kl")),
        (Divergence("skewed_forward_kl", skew=0.3), Divergence("skewed_reverse_kl", skew=0.3)),
        (Divergence("jensen_shannon", js_mixing=0.2), Divergence("jensen_shannon", js_mixing=0.8)),
    ):
        ahead, back = of(forward, one, two, temperature), of(forward, two, one, temperature)
        assert float((ahead - back).abs().max()) > 1e-3
        torch.testing.assert_close(of(reverse, two, one, temperature), ahead, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(of(reverse, one, two, temperature), back, rtol=1e-12, atol=1e-12)
    half = Divergence("jensen_shannon")
    torch.testing.assert_close(of(half, one, two), of(half, two, one), rtol=1e-12, atol=1e-12)


def test_direction_by_closed_forms() -> None:
    """A sharp teacher before a flat student: worked out by hand, over all tokens and over two buckets."""
    sharp, flat = torch.zeros(1, 4), torch.zeros(1, 4)
    sharp[0, 2] = math.log(27.0)  # probabilities 0.9 and three times 1/30
    forward = 0.9 * math.log(0.9 / 0.25) + 0.1 * math.log(0.1 / 0.75)
    backward = 0.25 * math.log(0.25 / 0.9) + 0.75 * math.log(0.75 / 0.1)
    skewed = 0.9 * math.log(0.9 / (0.25 * 0.9 + 0.75 * 0.25)) + 0.1 * math.log(0.1 / (0.025 + 0.75 * 0.75))
    skewed_back = 0.25 * math.log(0.25 / (0.75 * 0.9 + 0.0625)) + 0.75 * math.log(0.75 / (0.075 + 0.1875))
    for targets in (exact_targets("dense", sharp, 1), exact_targets("buckets", sharp, 1)):
        for name, expected in (
            ("forward_kl", forward),
            ("reverse_kl", backward),
            ("skewed_forward_kl", skewed),
            ("skewed_reverse_kl", skewed_back),
        ):
            got = divergence(flat, targets, 1.0, Divergence(name, skew=0.25))  # type: ignore[arg-type]
            assert float(got) == pytest.approx(expected, rel=1e-5)


@TARGETS
@TEMPERATURES
def test_no_skew_is_the_plain_kl(temperature: float, targets_kind: str) -> None:
    """s = 0 exactly, and s → 0 in the limit."""
    teacher, student = drawn(8).double(), drawn(8, seed=1).double()
    targets = shaped(targets_kind, teacher, KEPT)
    for plain, skewed in (("forward_kl", "skewed_forward_kl"), ("reverse_kl", "skewed_reverse_kl")):
        expected = divergence(student, targets, temperature, Divergence(plain))  # type: ignore[arg-type]
        none, little = (
            divergence(student, targets, temperature, Divergence(skewed, skew=skew))  # type: ignore[arg-type]
            for skew in (0.0, 1e-9)
        )
        assert torch.equal(none, expected)
        torch.testing.assert_close(little, expected, rtol=1e-5, atol=1e-8)


@TARGETS
@TEMPERATURES
def test_jensen_shannon_lies_between_the_two_kls(temperature: float, targets_kind: str) -> None:
    """JS(b) / b → KL(p ‖ q) as b → 0, JS(b) / (1 − b) → KL(q ‖ p) as b → 1."""
    teacher, student = drawn(8).double(), drawn(8, scale=1.0, seed=1).double()
    targets = shaped(targets_kind, teacher, KEPT)
    for end, name in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        expected = divergence(student, targets, temperature, Divergence(name))  # type: ignore[arg-type]
        errors = []
        for distance in (1e-3, 1e-5):
            kind = Divergence("jensen_shannon", js_mixing=abs(end - distance))
            ratio = divergence(student, targets, temperature, kind) / distance
            errors.append(float((ratio / expected - 1.0).abs().max()))
        assert errors[0] < 0.05 and errors[1] < 0.01 * max(errors[0], 0.05)


@KINDS
@TARGETS
@TEMPERATURES
def test_never_negative_and_bounded(temperature: float, targets_kind: str, kind: Divergence) -> None:
    """0 ≤ D for near and far students; JS ≤ the entropy of (b, 1 − b), a skewed KL ≤ −log s."""
    teacher = drawn(64, 50, 3.0, seed=3)
    targets = shaped(targets_kind, teacher, KEPT)
    for distance in (0.0, 1e-4, 1e-2, 1.0, 10.0, 1000.0):
        value = divergence(teacher + distance * drawn(64, 50, 1.0, seed=4), targets, temperature, kind)
        assert float(value.min()) >= -1e-6
        assert float(value.max()) <= bound(kind) + 1e-6
    assert float(value.max()) > 0.2 * min(1.0, bound(kind))


def bound(kind: Divergence) -> float:
    """The most that a divergence can be."""
    if kind.name == "jensen_shannon":
        return -sum(share * math.log(share) for share in (kind.js_mixing, 1 - kind.js_mixing))
    return -math.log(kind.skew) if kind.name.startswith("skewed") else math.inf


@KINDS
@TEMPERATURES
def test_buckets_are_a_lower_bound(temperature: float, kind: Divergence) -> None:
    """Data processing: throwing tokens together never adds divergence."""
    teacher, student = drawn(32, 50), drawn(32, 50, seed=1)
    whole = of(kind, teacher, student, temperature)
    below = torch.zeros(32)
    most = 1e-5 + (5e-3 * whole if temperature == 5.0 else 0.0)
    for count in (2, 8, 30, 50):
        bucket = divergence(student, CompactTargets.from_logits(teacher, count), temperature, kind)
        assert bool((bucket >= below - most).all()) and bool((bucket <= whole + most).all())
        below = bucket
    torch.testing.assert_close(below, whole, rtol=1e-5, atol=1e-6)


@KINDS
@TEMPERATURES
def test_opposite_certainties(temperature: float, kind: Divergence) -> None:
    """Gaps of 1e4 either way, where every product of probabilities underflows: known values, no NaN."""
    teacher, student = torch.tensor([[0.0, -1e4, -1e4]]), torch.tensor([[-1e4, 0.0, -2e4]])
    limit = bound(kind)
    expected = 1e4 / temperature if math.isinf(limit) else limit
    for targets in (
        exact_targets("dense", teacher, 1),
        exact_targets("hidden", teacher, 1),
        CompactTargets.from_logits(teacher, 1),
        CompactTargets.from_logits(teacher, 3),
    ):
        leaf = student.clone().requires_grad_()
        value = divergence(leaf, targets, temperature, kind)
        value.sum().backward()
        assert float(value.detach()) == pytest.approx(expected, rel=1e-3 if math.isinf(limit) else 1e-5)
        assert leaf.grad is not None and bool(torch.isfinite(leaf.grad).all())


@KINDS
@TARGETS
@TEMPERATURES
@pytest.mark.parametrize("teacher_height", [-1e4, -40.0, 40.0, 1e4])
def test_extreme_logits_stay_finite(
    teacher_height: float, temperature: float, targets_kind: str, kind: Divergence
) -> None:
    """A tail that is almost nothing or almost everything, on either side: finite value and gradient."""
    teacher = drawn(3, 30, 0.5, seed=5)
    teacher[:, :KEPT] += teacher_height
    targets = shaped(targets_kind, teacher, KEPT)
    for student_height in (-1e4, -40.0, 40.0, 1e4):
        student = drawn(3, 30, 0.5, seed=6)
        student[:, :KEPT] += student_height
        student.requires_grad_()
        value = divergence(student, targets, temperature, kind)
        value.sum().backward()
        assert student.grad is not None
        value = value.detach()
        assert bool(torch.isfinite(value).all()) and bool(torch.isfinite(student.grad).all())
        assert float(value.min()) >= -1e-5 and float(value.max()) <= bound(kind) + 1e-5


@KINDS
@TARGETS
def test_thin_tails_are_exact(targets_kind: str, kind: Divergence) -> None:
    """Tails of 1e-3 and 1e-4 keep their value to float32 rounding."""
    teacher, student = drawn(4, 20, 0.5, seed=5), drawn(4, 20, 0.5, seed=6)
    teacher[:, :KEPT] += 8.0
    student[:, :KEPT] += 10.0
    got = divergence(student, shaped(targets_kind, teacher, KEPT), 1.0, kind)
    pairs = zip(rows(teacher), rows(student), strict=True)
    expected = [reference_row(kind, p, q, 1.0, targets_kind) for p, q in pairs]
    np.testing.assert_allclose(got.numpy(), expected, rtol=2e-5, atol=1e-6)


@KINDS
@TARGETS
def test_parts_equal_the_whole(targets_kind: str, kind: Divergence) -> None:
    """Positions are independent; no positions give none, with no gradient."""
    teacher, student = drawn(7), drawn(7, seed=1)
    targets = shaped(targets_kind, teacher, KEPT)
    whole = divergence(student, targets, 2.0, kind)
    parts = [divergence(student[i], targets.select(i), 2.0, kind) for i in torch.arange(7).split(3)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)
    none = student[:0].clone().requires_grad_()
    value = divergence(none, targets.select(slice(0, 0)), 2.0, kind)
    value.sum().backward()
    assert value.shape == (0,) and none.grad is not None and none.grad.shape == (0, 20)


@KINDS
def test_dtypes(kind: Divergence) -> None:
    """bfloat16 logits are computed in float32; float64 stays."""
    teacher, student = drawn(8), drawn(8, seed=1).bfloat16()
    for targets_kind in ("buckets", "dense"):
        targets = shaped(targets_kind, teacher, KEPT)
        got = divergence(student, targets, 3.0, kind)
        assert got.dtype == torch.float32
        assert torch.equal(got, divergence(student.float(), targets, 3.0, kind))
        assert divergence(student.double(), targets, 3.0, kind).dtype == torch.float64


@KINDS
def test_the_tail_is_as_the_targets_know_it(kind: Divergence) -> None:
    """A sketch is used where there is one; without it, over buckets, its absence changes nothing else."""
    teacher, student = drawn(8), drawn(8, seed=1)
    sketch = exact_targets("sketch", teacher, KEPT)
    assert isinstance(sketch, CompactTargets)
    bare = replace(sketch, head=None, coordinates=None)
    whole, buckets = (divergence(student, targets, 2.0, kind) for targets in (sketch, bare))
    assert bool((whole > buckets + 1e-3).any())
    if kind.name == "forward_kl":
        assert torch.equal(whole, forward_kl_of_all(student, sketch, 2.0))
        assert torch.equal(buckets, forward_kl(student, bare, 2.0))


@KINDS
def test_targets_are_not_changed(kind: Divergence) -> None:
    """The same question gets the same answer again."""
    teacher, student = drawn(8), drawn(8, seed=1)
    for targets_kind in ("buckets", "sketch", "hidden", "dense", "all kept"):
        targets = shaped(targets_kind, teacher, KEPT)
        first = divergence(student, targets, 2.0, kind)
        assert torch.equal(divergence(student, targets, 2.0, kind), first)


@KINDS
def test_temperatures_below_one_raise(kind: Divergence) -> None:
    """The tail's mass there is not known, so it is not guessed."""
    for targets_kind in ("buckets", "sketch", "all kept"):
        with pytest.raises(ValueError, match=r"temperatures from 1 on, not at 0\.5"):
            divergence(drawn(2, seed=1), shaped(targets_kind, drawn(2), KEPT), 0.5, kind)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"name": "backward_kl"}, "'backward_kl' does not exist; choose one of forward_kl, reverse_kl"),
        ({"js_mixing": 0.0}, "js_mixing 0 is not between 0 and 1"),
        ({"js_mixing": 1.0}, "js_mixing 1 is not"),
        ({"js_mixing": math.nan}, "js_mixing nan is not"),
        ({"skew": 1.0}, "skew 1 is not in"),
        ({"skew": -0.1}, "skew -0.1 is not in"),
        ({"skew": math.nan}, "skew nan is not in"),
    ],
)
def test_settings_out_of_range_raise(setting: dict[str, object], message: str) -> None:
    """A name that does not exist, a mixture without one of the two."""
    with pytest.raises(ValueError, match=message):
        Divergence(**setting)  # type: ignore[arg-type]
