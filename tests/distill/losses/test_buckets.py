"""Divergences against float64 references over the vocabulary."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.losses.divergences import (
    IGNORE_INDEX,
    bucket_log_probs,
    cross_entropy,
    dense_forward_kl,
    forward_kl,
    forward_kl_of_all,
    known_kl,
)
from teachers.targets.distributions import CompactTargets
from tests.support.references import (
    SHAPED,
    Array,
    case,
    drawn,
    gradient,
    kl,
    probabilities,
    reference_bucket_kl,
    rows,
    shaped,
    slopes,
)
from tests.support.stores import exact_targets

NODES = (1.0, 2.0, 3.0)  # where the tail's mass is stored
BETWEEN = (1.1, 1.3, 2.5, 4.5, 20.0)  # where it is interpolated, or taken on towards T = ∞
TEMPERATURES = NODES + BETWEEN
INTERPOLATED = 5e-5  # what interpolation may cost a KL between the nodes; measured: 3.4e-5


def reference_dense_kl(teacher: Array, student: Array, temperature: float) -> Array:
    """The KL over the whole vocabulary."""
    return kl(probabilities(teacher, temperature), probabilities(student, temperature))


def slack(temperature: float) -> float:
    """How far a KL from compact targets may be off besides float32 rounding."""
    return 0.0 if temperature in NODES else INTERPOLATED


def test_bucket_kl_against_the_reference() -> None:
    """Top-k plus one bucket, in value and gradient, for one kept token up to all of them."""
    teacher, student = drawn(8), drawn(8, seed=1).requires_grad_()
    p, q = rows(teacher), rows(student)
    for count, temperature in product((1, 4, 19, 20), TEMPERATURES):
        with case(count, temperature):
            got = forward_kl(student, CompactTargets.from_logits(teacher, count), temperature)
            assert got.shape == (8,) and got.dtype == torch.float32
            expected = reference_bucket_kl(p, q, count, temperature)
            assert expected.min() > (1e-3 if temperature < 4.0 else 1e-5)
            atol = slack(temperature)
            np.testing.assert_allclose(rows(got), expected, rtol=1e-4, atol=2e-6 + atol)
            of_student = slopes(lambda q: reference_bucket_kl(p, q, count, temperature), q)  # noqa: B023
            found = gradient(got, student)
            np.testing.assert_allclose(found, of_student, atol=2e-6 + 0.1 * atol)


def test_kl_of_all_against_the_reference() -> None:
    """Over the whole vocabulary, in value and gradient, whatever knows the shape of the tail."""
    teacher, student = drawn(8), drawn(8, seed=1).requires_grad_()
    p, q = rows(teacher), rows(student)
    for temperature in TEMPERATURES:
        expected = reference_dense_kl(p, q, temperature)
        of_student = slopes(lambda q: reference_dense_kl(p, q, temperature), q)  # noqa: B023
        assert expected.min() > (1e-3 if temperature < 4.0 else 1e-4), temperature
        dense = dense_forward_kl(teacher.view(2, 4, 20), student.view(2, 4, 20), temperature)
        assert dense.shape == (2, 4)
        np.testing.assert_allclose(rows(dense).flatten(), expected, rtol=1e-5, atol=1e-6)
        for count in (20, 500):  # no tail is left
            got = forward_kl(student, CompactTargets.from_logits(teacher, count), temperature)
            torch.testing.assert_close(got, dense.flatten(), rtol=1e-5, atol=1e-6)
        for kind in SHAPED:
            with case(kind, temperature):
                targets = shaped(kind, teacher)
                got = forward_kl_of_all(student, targets, temperature)
                assert got.shape == (8,) and got.dtype == torch.float32
                atol = slack(temperature) if kind == "sketch" else 0.0
                np.testing.assert_allclose(rows(got), expected, rtol=1e-5, atol=2e-6 + atol)
                found = gradient(got, student)
                np.testing.assert_allclose(found, of_student, atol=2e-6 + 0.1 * atol)
                select = targets.select(torch.arange(8)[None])
                whole = forward_kl_of_all(student[None], select, temperature)
                assert whole.shape == (1, 8)
                torch.testing.assert_close(whole[0], got, rtol=0, atol=1e-6)


def test_known_kl_against_the_reference() -> None:
    """Over k + 1 buckets for compact targets, with a sketch too; over everything for others."""
    teacher, student = drawn(8), drawn(8, seed=1)
    for kind, temperature in product(("buckets", *SHAPED), TEMPERATURES):
        with case(kind, temperature):
            got = known_kl(student, shaped(kind, teacher), temperature)
            few = kind in ("buckets", "sketch")
            count, atol = (4, 2e-6 + slack(temperature)) if few else (20, 2e-6)
            expected = reference_bucket_kl(rows(teacher), rows(student), count, temperature)
            np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=atol)


def test_kl_of_all_needs_the_shape_of_the_tail() -> None:
    """Compact targets without a sketch do not say how the tail is spread, so it is not guessed."""
    targets = CompactTargets.from_logits(drawn(2), 4)
    with pytest.raises(ValueError, match=r"no tail sketch.*targets\.sketch_bytes"):
        forward_kl_of_all(drawn(2, seed=1), targets, 2.0)
    assert known_kl(drawn(2, seed=1), targets, 2.0).shape == (2,)


def test_identical_models_have_no_kl() -> None:
    """0 to float32 rounding at every temperature; over all in the gradient, too."""
    teacher = drawn(16, 200, seed=2)
    student = teacher.clone().requires_grad_()
    for kind, temperature in product(SHAPED, TEMPERATURES):
        with case(kind, temperature):
            value = forward_kl_of_all(student, shaped(kind, teacher, 8), temperature)
            assert float(value.detach().abs().max()) <= 1e-5
            assert float(gradient(value, student).abs().max()) <= 1e-5
    for scale, count in product((0.1, 2.0, 10.0), (1, 8, 64, 200)):
        logits = drawn(16, 200, scale, seed=2)
        targets = CompactTargets.from_logits(logits, count)
        for temperature in TEMPERATURES:
            with case(scale, count, temperature):
                assert float(forward_kl(logits, targets, temperature).abs().max()) <= 1e-4
                assert float(dense_forward_kl(logits, logits, temperature).abs().max()) <= 1e-6


def test_a_rounded_sketch_keeps_topk_and_mass() -> None:
    """A sketch that says nothing of the tail gives the right KL over buckets, and more over all."""
    teacher, student = drawn(8), drawn(8, seed=1)
    exact = exact_targets("sketch", teacher, 4)
    assert isinstance(exact, CompactTargets) and exact.coordinates is not None
    poor = replace(exact, coordinates=torch.zeros_like(exact.coordinates))
    assert torch.equal(known_kl(student, poor, 3.0), forward_kl(student, exact, 3.0))
    buckets = poor.log_probs(3.0).exp()
    inside = buckets.gather(-1, poor.topk_ids)
    torch.testing.assert_close(inside, poor.topk_log_probs(3.0).exp(), rtol=1e-5, atol=1e-7)
    outside = buckets.sum(dim=-1) - inside.sum(dim=-1)
    torch.testing.assert_close(outside, poor.tail_mass(3.0), rtol=1e-4, atol=1e-6)
    over_all, over_buckets = forward_kl_of_all(student, poor, 3.0), forward_kl(student, poor, 3.0)
    assert bool((over_all >= over_buckets - 1e-6).all())


def test_bucket_log_probs_against_the_reference() -> None:
    """Log-probability of given tokens and of everything else."""
    logits, ids = drawn(3), torch.tensor([[0, 5], [19, 2], [7, 8]])
    for temperature in TEMPERATURES:
        q = probabilities(rows(logits), temperature)
        inside = np.take_along_axis(q, ids.numpy(), axis=1)
        others = 1.0 - inside.sum(axis=1, keepdims=True)
        expected = np.log(np.concatenate((inside, others), axis=1))
        got = bucket_log_probs(logits, ids, temperature).numpy()
        np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=str(temperature))


def test_a_common_shift_of_logits_changes_nothing() -> None:
    """Only differences of logits count, on either side."""
    teacher, student = drawn(8), drawn(8, seed=1)
    targets = CompactTargets.from_logits(teacher, 4)
    for temperature, shift in product(TEMPERATURES, (-30.0, 17.0)):
        moved = CompactTargets.from_logits(teacher + shift, 4)
        expected = forward_kl(student, targets, temperature)
        for mine, theirs in ((student, moved), (student + shift, targets)):
            with case(temperature, shift):
                got = forward_kl(mine, theirs, temperature)
                torch.testing.assert_close(got, expected, rtol=0, atol=5e-5)


def test_never_negative_and_below_the_dense_kl() -> None:
    """0 ≤ bucket KL ≤ dense KL, rising with k, for near and for far students."""
    teacher = drawn(64, 50, 3.0, seed=3)
    kept = [CompactTargets.from_logits(teacher, count) for count in (1, 2, 8, 30, 49)]
    for temperature, distance in product(TEMPERATURES, (0.0, 1e-3, 0.1, 3.0)):
        student = teacher + distance * drawn(64, 50, 1.0, seed=4)
        dense = dense_forward_kl(teacher, student, temperature)
        most = 1e-5 + (0.0 if temperature in NODES else 5e-3) * dense  # interpolated for one kept
        below = torch.zeros(64)
        for targets in kept:
            with case(temperature, distance, targets.topk_ids.shape[1]):
                bucket = forward_kl(student, targets, temperature)
                assert float(bucket.min()) >= -1e-5
                assert bool((bucket >= below - most).all())
                assert bool((bucket <= dense + most).all())
                below = bucket
        if distance == 3.0:
            assert float(dense.max()) > 1e-3, temperature


def test_direction_is_teacher_to_student() -> None:
    """A sharp teacher before a flat student differs from the reverse, by known closed forms."""
    sharp, flat = torch.zeros(1, 4), torch.zeros(1, 4)
    sharp[0, 2] = math.log(27.0)  # probabilities 0.9 and three times 1/30
    forward = 0.9 * math.log(0.9 / 0.25) + 0.1 * math.log((1 / 30) / 0.25)
    backward = 0.25 * math.log(0.25 / 0.9) + 0.75 * math.log(0.25 / (1 / 30))
    for count in (1, 4):
        got = forward_kl(flat, CompactTargets.from_logits(sharp, count), 1.0)
        assert float(got) == pytest.approx(forward, rel=1e-5), count
    assert float(dense_forward_kl(sharp, flat)) == pytest.approx(forward, rel=1e-5)
    assert float(dense_forward_kl(flat, sharp)) == pytest.approx(backward, rel=1e-5)
    assert abs(forward - backward) > 0.2


def peaked(*heights: float) -> Tensor:
    """Positions whose first four tokens stand ``heights`` above the others."""
    logits = drawn(1, 30, 0.5, seed=5).repeat(len(heights), 1)
    logits[:, :4] += torch.tensor(heights)[:, None]
    return logits


def test_extreme_logits_stay_finite() -> None:
    """A tail that is almost empty or almost everything: finite value and gradient."""
    heights = list(product((-40.0, 4.0, 15.0, 40.0, 1000.0), (-1000.0, -40.0, 15.0, 40.0, 1000.0)))
    ours, theirs = zip(*heights, strict=True)
    targets = CompactTargets.from_logits(peaked(*ours), 4)
    student = peaked(*theirs).requires_grad_()
    for temperature in TEMPERATURES:
        value = forward_kl(student, targets, temperature)
        slope = gradient(value, student)
        # A comparison with NaN is false.
        good = (value >= -1e-5) & value.isfinite() & (slope.abs().amax(dim=1) <= 1.0001)
        wrong = [pair for pair, fine in zip(heights, good.tolist(), strict=True) if not fine]
        assert not wrong, f"T = {temperature}, heights of teacher and student: {wrong}"


def test_a_collapsed_tail_is_pulled_back() -> None:
    """A student (almost) without the teacher's tail: the tail's gradient is q_tail − p_tail."""
    student = peaked(10.0, 20.0, 40.0).requires_grad_()
    targets = CompactTargets.from_logits(peaked(4.0, 4.0, 4.0), 4)
    assert sorted(targets.topk_ids[0].tolist()) == [0, 1, 2, 3]
    mass = targets.tail_mass(1.0)
    assert float(mass.min()) > 0.05
    found = gradient(forward_kl(student, targets, 1.0), student)[:, 4:].sum(dim=1)
    expected = probabilities(rows(student), 1.0)[:, 4:].sum(axis=1) - mass.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_a_thin_tail_is_still_exact() -> None:
    """Tails of 1e-2 to 1e-4 keep their value to float32 rounding."""
    teacher, student = peaked(8.0, 11.0), peaked(6.0, 9.0)
    got = forward_kl(student, CompactTargets.from_logits(teacher, 4), 1.0)
    expected = reference_bucket_kl(rows(teacher), rows(student), 4, 1.0)
    np.testing.assert_allclose(got.numpy(), expected, atol=5e-6)


def test_temperatures_below_one_raise() -> None:
    """The tail's mass there is not known, so it is not guessed."""
    for kind, temperature in product(("buckets", "sketch"), (0.99, 0.5, 1e-6)):
        message = f"temperatures from 1 on, not at {temperature:g}"
        with case(kind, temperature), pytest.raises(ValueError, match=message):
            known_kl(drawn(2, seed=1), exact_targets(kind, drawn(2), 4), temperature)


def test_cross_entropy_against_the_reference() -> None:
    """−log p(label) with gradient q − 1[label], 0 where ignored, nothing for no positions."""
    logits, labels = drawn(4).requires_grad_(), torch.tensor([3, IGNORE_INDEX, 19, 0])
    got = cross_entropy(logits, labels)
    found, q = gradient(got, logits), probabilities(rows(logits), 1.0)
    for position in (0, 2, 3):
        label = labels[position]
        assert got[position].item() == pytest.approx(-math.log(q[position, label]), rel=1e-5)
        q[position, label] -= 1.0
        np.testing.assert_allclose(found[position], q[position], atol=1e-6)
    assert got[1].item() == 0.0 and not found[1].any()
    assert cross_entropy(logits[:0], labels[:0]).shape == (0,)


def test_parts_equal_the_whole() -> None:
    """Positions are independent: any division gives the same values; no positions give none."""
    teacher, student, none = drawn(7), drawn(7, seed=1), torch.arange(0)
    targets = CompactTargets.from_logits(teacher, 4)
    for temperature in TEMPERATURES:
        with case(temperature):
            whole = forward_kl(student, targets, temperature)
            thirds = torch.arange(7).split(3)
            parts = [forward_kl(student[i], targets.select(i), temperature) for i in thirds]
            atol = 1e-7 if temperature in NODES else 1e-6
            torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=atol)
            assert forward_kl(student[none], targets.select(none), temperature).shape == (0,)


def test_bfloat16_logits_are_computed_in_float32() -> None:
    """Under autocast the student's logits arrive in bfloat16; the divergence is float32."""
    teacher, student = drawn(8), drawn(8, seed=1).bfloat16()
    targets = CompactTargets.from_logits(teacher, 4)
    got = forward_kl(student, targets, 3.0)
    assert got.dtype == cross_entropy(student, torch.zeros(8).long()).dtype == torch.float32
    assert dense_forward_kl(student, student).dtype == torch.float32
    assert torch.equal(got, forward_kl(student.float(), targets, 3.0))
