"""The family of divergences against float64 references: sums of a log(a / b)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.config.schema import DivergenceName
from distill.losses.divergences import FORMS, Divergence, divergence
from teachers.targets.distributions import CompactTargets
from teachers.targets.stored_arrays import Targets
from tests.support.references import (
    DEFINITIONS,
    FAMILY,
    SHAPED,
    Array,
    case,
    drawn,
    gradient,
    in_buckets,
    probabilities,
    rows,
    shaped,
    slopes,
)
from tests.support.stores import exact_targets

TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 5.0)  # all but 5 are stored
TARGETS = ("buckets", *SHAPED)
KEPT = 4


def reference_rows(
    kind: Divergence, teacher: Array, student: Array, temperature: float, targets_kind: str
) -> Array:
    """The definition, of logits, over what the targets know."""
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    if targets_kind == "buckets":
        p, q = in_buckets(p, teacher, KEPT), in_buckets(q, teacher, KEPT)
    return DEFINITIONS[kind.name](p, q, kind)


def of(kind: Divergence, teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """The divergence over the whole vocabulary, ``[N, V]`` twice → ``[N]``."""
    return divergence(student, exact_targets("dense", teacher, KEPT), temperature, kind)


def every_row(
    teacher: Tensor, temperatures: tuple[float, ...] = TEMPERATURES
) -> Iterator[tuple[Divergence, str, float, Targets]]:
    """Each divergence with each kind of targets at each temperature."""
    for targets_kind in TARGETS:
        targets = shaped(targets_kind, teacher, KEPT)
        for kind, temperature in product(FAMILY, temperatures):
            yield kind, targets_kind, temperature, targets


def slack(temperature: float, targets_kind: str) -> float:
    """What the interpolation of the tail's mass may cost."""
    return 5e-5 if temperature == 5.0 and targets_kind in ("buckets", "sketch") else 0.0


def bound(kind: Divergence) -> float:
    """The most that a divergence can be."""
    if kind.name == "jensen_shannon":
        return -sum(share * math.log(share) for share in (kind.js_mixing, 1 - kind.js_mixing))
    return -math.log(kind.skew) if kind.form.startswith("skewed") else math.inf


def test_every_divergence_is_complete() -> None:
    """A name in the settings, a row of the table, a definition here."""
    assert FORMS.keys() == DEFINITIONS.keys() == set(get_args(DivergenceName))


def test_against_the_reference() -> None:
    """Every divergence of every kind of targets at every temperature; leading dimensions stay."""
    teacher, student = drawn(8), drawn(8, seed=1)
    p, q, squares = rows(teacher), rows(student), torch.arange(8).view(2, 1, 4)
    for kind, targets_kind, temperature, targets in every_row(teacher):
        with case(kind, targets_kind, temperature):
            got = divergence(student, targets, temperature, kind)
            assert got.shape == (8,) and got.dtype == torch.float32
            expected = reference_rows(kind, p, q, temperature, targets_kind)
            assert expected.min() > 1e-5
            atol = 1e-6 + slack(temperature, targets_kind)
            np.testing.assert_allclose(got.numpy(), expected, rtol=2e-5, atol=atol)
            shaped_so = divergence(student[squares], targets.select(squares), temperature, kind)
            assert shaped_so.shape == (2, 1, 4)
            torch.testing.assert_close(shaped_so.flatten(), got, rtol=0, atol=2e-6)


def test_gradient_by_finite_differences() -> None:
    """Autograd's gradient in float64 is that of the reference, for every token, in the tail too."""
    teacher, student = drawn(2).double(), drawn(2, seed=1).double().requires_grad_()
    for kind, targets_kind, temperature, targets in every_row(teacher):
        with case(kind, targets_kind, temperature):
            value = divergence(student, targets, temperature, kind)
            assert value.dtype == torch.float64
            fixed = partial(reference_rows, kind, rows(teacher))
            fixed = partial(fixed, temperature=temperature, targets_kind=targets_kind)
            expected = slopes(fixed, rows(student))
            assert np.abs(expected).max() > 1e-3
            atol = 2e-8 + slack(temperature, targets_kind)
            found = gradient(value, student)
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=atol)


def test_identical_models_have_none() -> None:
    """0 in value and gradient, at every temperature."""
    teacher = drawn(16, 200, seed=2)
    student = teacher.clone().requires_grad_()
    for kind, targets_kind, temperature, targets in every_row(teacher):
        with case(kind, targets_kind, temperature):
            value = divergence(student, targets, temperature, kind)
            assert float(value.detach().abs().max()) <= 1e-6
            most = 1e-5 if slack(temperature, targets_kind) else 1e-6
            assert float(gradient(value, student).abs().max()) <= most


def test_direction_by_closed_forms() -> None:
    """A sharp teacher before a flat student: by hand, over all tokens and over two buckets."""
    sharp, flat = torch.zeros(1, 4), torch.zeros(1, 4)
    sharp[0, 2] = math.log(27.0)  # probabilities 0.9 and three times 1/30
    expected = {
        "forward_kl": 0.9 * math.log(0.9 / 0.25) + 0.1 * math.log(0.1 / 0.75),
        "reverse_kl": 0.25 * math.log(0.25 / 0.9) + 0.75 * math.log(0.75 / 0.1),
        "skewed_forward_kl": 0.9 * math.log(0.9 / (0.25 * 0.9 + 0.75 * 0.25))
        + 0.1 * math.log(0.1 / (0.025 + 0.75 * 0.75)),
        "skewed_reverse_kl": 0.25 * math.log(0.25 / (0.75 * 0.9 + 0.0625))
        + 0.75 * math.log(0.75 / (0.075 + 0.1875)),
    }
    for targets_kind, (name, value) in product(("dense", "buckets"), expected.items()):
        with case(targets_kind, name):
            kind = Divergence(name, skew=0.25)  # type: ignore[arg-type]
            got = divergence(flat, exact_targets(targets_kind, sharp, 1), 1.0, kind)
            assert float(got) == pytest.approx(value, rel=1e-5)


def test_limits_of_skewed_and_mixed_forms() -> None:
    """No skew is the plain KL; JS(b) / b → KL(p ‖ q) as b → 0, and the reverse as b → 1."""
    teacher, student = drawn(8).double(), drawn(8, seed=1).double()
    near = drawn(8, scale=1.0, seed=1).double()
    plain_kls = ((Divergence("forward_kl"), 0.0), (Divergence("reverse_kl"), 1.0))
    for targets_kind, temperature in product(TARGETS, TEMPERATURES):
        targets = shaped(targets_kind, teacher, KEPT)
        for plain, end in plain_kls:
            with case(targets_kind, temperature, plain):
                expected = divergence(student, targets, temperature, plain)
                skewed = Divergence(f"skewed_{plain.name}", skew=0.0)  # type: ignore[arg-type]
                assert torch.equal(divergence(student, targets, temperature, skewed), expected)
                little = divergence(student, targets, temperature, replace(skewed, skew=1e-9))
                torch.testing.assert_close(little, expected, rtol=1e-5, atol=1e-8)
                expected = divergence(near, targets, temperature, plain)
                errors = []
                for distance in (1e-3, 1e-5):
                    kind = Divergence("jensen_shannon", js_mixing=abs(end - distance))
                    ratio = divergence(near, targets, temperature, kind) / distance
                    errors.append(float((ratio / expected - 1.0).abs().max()))
                assert errors[0] < 0.05 and errors[1] < 0.01 * max(errors[0], 0.05)


def test_never_negative_and_bounded() -> None:
    """0 ≤ D for near and far students; JS ≤ the entropy of (b, 1 − b), a skewed KL ≤ −log s."""
    teacher = drawn(64, 50, 3.0, seed=3)
    distances = torch.tensor([0.0, 1e-4, 1e-2, 1.0, 10.0, 1000.0])[:, None, None]
    students = teacher + distances * drawn(64, 50, 1.0, seed=4)
    for kind, targets_kind, temperature, targets in every_row(teacher):
        repeated = targets.select(torch.arange(64).repeat(6, 1))
        with case(kind, targets_kind, temperature):
            value = divergence(students, repeated, temperature, kind)
            assert float(value.min()) >= -1e-6
            assert float(value.max()) <= bound(kind) + 1e-6
            assert float(value[-1].max()) > 0.2 * min(1.0, bound(kind))


def test_buckets_are_a_lower_bound() -> None:
    """Data processing: throwing tokens together never adds divergence."""
    teacher, student = drawn(32, 50), drawn(32, 50, seed=1)
    kept = [CompactTargets.from_logits(teacher, count) for count in (2, 8, 30, 50)]
    for kind, temperature in product(FAMILY, TEMPERATURES):
        whole, below = of(kind, teacher, student, temperature), torch.zeros(32)
        most = 1e-5 + (5e-3 * whole if temperature == 5.0 else 0.0)
        with case(kind, temperature):
            for targets in kept:
                bucket = divergence(student, targets, temperature, kind)
                assert bool((bucket >= below - most).all())
                assert bool((bucket <= whole + most).all())
                below = bucket
            torch.testing.assert_close(below, whole, rtol=1e-5, atol=1e-6)


def test_opposite_certainties() -> None:
    """Gaps of 1e4 either way, where products of probabilities underflow: known values, no NaN."""
    teacher, student = torch.tensor([[0.0, -1e4, -1e4]]), torch.tensor([[-1e4, 0.0, -2e4]])
    student.requires_grad_()
    known = (
        exact_targets("dense", teacher, 1),
        exact_targets("hidden", teacher, 1),
        CompactTargets.from_logits(teacher, 1),
        CompactTargets.from_logits(teacher, 3),
    )
    for kind, temperature, targets in product(FAMILY, TEMPERATURES, known):
        with case(kind, temperature, targets):
            endless = math.isinf(bound(kind))
            expected = 1e4 / temperature if endless else bound(kind)
            value = divergence(student, targets, temperature, kind)
            assert value.item() == pytest.approx(expected, rel=1e-3 if endless else 1e-5)
            assert bool(torch.isfinite(gradient(value, student)).all())


def test_extreme_logits_stay_finite() -> None:
    """A tail that is almost nothing or almost everything: finite value and gradient."""
    heights = list(product((-1e4, -40.0, 40.0, 1e4), repeat=2))
    ours, theirs = torch.tensor(heights).repeat_interleave(3, dim=0).T[:, :, None]
    teacher = drawn(3, 30, 0.5, seed=5).repeat(len(heights), 1)
    student = drawn(3, 30, 0.5, seed=6).repeat(len(heights), 1)
    teacher[:, :KEPT] += ours
    student[:, :KEPT] += theirs
    student.requires_grad_()
    for kind, targets_kind, temperature, targets in every_row(teacher):
        value = divergence(student, targets, temperature, kind)
        good = gradient(value, student).isfinite().all(dim=1) & value.isfinite()
        good &= (value >= -1e-5) & (value <= bound(kind) + 1e-5)
        wrong = [heights[row // 3] for row, fine in enumerate(good.tolist()) if not fine]
        assert not wrong, (kind, targets_kind, temperature, "heights", wrong)


def test_thin_tails_are_exact() -> None:
    """Tails of 1e-3 and 1e-4 keep their value to float32 rounding."""
    teacher, student = drawn(4, 20, 0.5, seed=5), drawn(4, 20, 0.5, seed=6)
    teacher[:, :KEPT] += 8.0
    student[:, :KEPT] += 10.0
    p, q = rows(teacher), rows(student)
    for kind, targets_kind, temperature, targets in every_row(teacher, (1.0,)):
        with case(kind, targets_kind):
            got = divergence(student, targets, temperature, kind)
            expected = reference_rows(kind, p, q, temperature, targets_kind)
            np.testing.assert_allclose(got.numpy(), expected, rtol=2e-5, atol=1e-6)


def test_positions_are_independent() -> None:
    """Parts equal the whole; no positions give none; the same question, the same answer."""
    teacher, student = drawn(7), drawn(7, seed=1)
    none = student[:0].clone().requires_grad_()
    for kind, targets_kind, t, targets in every_row(teacher, (2.0,)):
        with case(kind, targets_kind):
            whole = divergence(student, targets, t, kind)
            thirds = torch.arange(7).split(3)
            parts = [divergence(student[i], targets.select(i), t, kind) for i in thirds]
            torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)
            assert torch.equal(divergence(student, targets, t, kind), whole)
            value = divergence(none, targets.select(slice(0, 0)), t, kind)
            assert value.shape == (0,) and gradient(value, none).shape == (0, 20)


def test_dtypes() -> None:
    """bfloat16 logits are computed in float32; float64 stays."""
    student = drawn(8, seed=1).bfloat16()
    for kind, targets_kind in product(FAMILY, ("buckets", "dense")):
        with case(kind, targets_kind):
            targets = shaped(targets_kind, drawn(8), KEPT)
            got = divergence(student, targets, 3.0, kind)
            assert got.dtype == torch.float32
            assert torch.equal(got, divergence(student.float(), targets, 3.0, kind))
            assert divergence(student.double(), targets, 3.0, kind).dtype == torch.float64


def test_temperatures_below_one_raise() -> None:
    """The tail's mass there is not known, so it is not guessed."""
    kinds = ("buckets", "sketch", "all kept")
    for kind, targets_kind, temperature in product(FAMILY, kinds, (0.99, 0.5, 1e-6)):
        message = f"temperatures from 1 on, not at {temperature:g}"
        targets = shaped(targets_kind, drawn(2), KEPT)
        with case(kind, targets_kind, temperature), pytest.raises(ValueError, match=message):
            divergence(drawn(2, seed=1), targets, temperature, kind)


def test_settings_out_of_range_raise() -> None:
    """A name that does not exist, a mixture without one of the two."""
    for setting, message in (
        ({"name": "backward_kl"}, "'backward_kl' .*; choose one of forward_kl, reverse_kl"),
        ({"js_mixing": 0.0}, "js_mixing 0 is not between 0 and 1"),
        ({"js_mixing": 1.0}, "js_mixing 1 is not"),
        ({"js_mixing": math.nan}, "js_mixing nan is not"),
        ({"skew": 1.0}, "skew 1 is not in"),
        ({"skew": -0.1}, "skew -0.1 is not in"),
        ({"skew": math.nan}, "skew nan is not in"),
    ):
        with case(setting), pytest.raises(ValueError, match=message):
            Divergence(**setting)  # type: ignore[arg-type]
