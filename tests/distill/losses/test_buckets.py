"""The KL over k + 1 buckets, the dense KL and the cross-entropy against float64 references."""

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
    divergence,
    known_kl,
    known_scores,
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
            got = known_kl(student, CompactTargets.from_logits(teacher, count), temperature)
            assert got.shape == (8,) and got.dtype == torch.float32
            expected = reference_bucket_kl(p, q, count, temperature)
            assert expected.min() > (1e-3 if temperature < 4.0 else 1e-5)
            atol = slack(temperature)
            np.testing.assert_allclose(rows(got), expected, rtol=1e-4, atol=2e-6 + atol)
            of_student = slopes(lambda q: reference_bucket_kl(p, q, count, temperature), q)  # noqa: B023
            found = gradient(got, student)
            np.testing.assert_allclose(found, of_student, atol=2e-6 + 0.1 * atol)


def test_dense_kl_against_the_reference() -> None:
    """Of two models' logits, and of compact targets without a tail."""
    teacher, student = drawn(8), drawn(8, seed=1)
    assert dense_forward_kl(teacher.bfloat16(), student.bfloat16()).dtype == torch.float32
    for temperature in TEMPERATURES:
        expected = reference_dense_kl(rows(teacher), rows(student), temperature)
        assert expected.min() > (1e-3 if temperature < 4.0 else 1e-4), temperature
        dense = dense_forward_kl(teacher.view(2, 4, 20), student.view(2, 4, 20), temperature)
        assert dense.shape == (2, 4)
        np.testing.assert_allclose(rows(dense).flatten(), expected, rtol=1e-5, atol=1e-6)
        for count in (20, 500):
            got = known_kl(student, CompactTargets.from_logits(teacher, count), temperature)
            torch.testing.assert_close(got, dense.flatten(), rtol=1e-5, atol=1e-6)


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


def test_what_is_quoted_of_a_validation_point() -> None:
    """KL, same top token and cross-entropy, together as apart; 0 for labels that do not count."""
    teacher, student = drawn(8), drawn(8, seed=1)
    teacher[:3] += 2 * student[:3]  # some with the same top token
    labels = torch.arange(8) % 20
    labels[5] = IGNORE_INDEX
    same = rows(teacher).argmax(-1) == rows(student).argmax(-1)
    assert 0 < same.sum() < 8
    for kind in ("buckets", *SHAPED):
        targets = shaped(kind, teacher)
        got, agreement, entropy = known_scores(student, targets, labels)
        torch.testing.assert_close(got, known_kl(student, targets, 1.0), rtol=0, atol=0)
        assert agreement.tolist() == same.tolist(), kind
        expected = -np.log(probabilities(rows(student), 1.0)[np.arange(8), labels.clamp(min=0)])
        expected[5] = 0.0
        np.testing.assert_allclose(entropy.numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=kind)


def test_kl_of_all_needs_the_shape_of_the_tail() -> None:
    """Compact targets without a sketch do not say how the tail is spread, so it is not guessed."""
    targets = CompactTargets.from_logits(drawn(2), 4)
    with pytest.raises(ValueError, match=r"no tail sketch.*targets\.sketch_bytes"):
        targets.log_probs(2.0)
    assert known_kl(drawn(2, seed=1), targets, 2.0).shape == (2,)


def test_identical_models_have_no_kl() -> None:
    """0 to float32 rounding at every temperature, however sharp the models are."""
    for scale, count in product((0.1, 2.0, 10.0), (1, 8, 64, 200)):
        logits = drawn(16, 200, scale, seed=2)
        targets = CompactTargets.from_logits(logits, count)
        for temperature in TEMPERATURES:
            with case(scale, count, temperature):
                assert float(known_kl(logits, targets, temperature).abs().max()) <= 1e-4
                assert float(dense_forward_kl(logits, logits, temperature).abs().max()) <= 1e-6


def test_a_rounded_sketch_keeps_topk_and_mass() -> None:
    """A sketch that says nothing of the tail gives the right KL over buckets, and more over all."""
    teacher, student = drawn(8), drawn(8, seed=1)
    exact = exact_targets("sketch", teacher, 4)
    assert isinstance(exact, CompactTargets) and exact.coordinates is not None
    poor = replace(exact, coordinates=torch.zeros_like(exact.coordinates))
    assert torch.equal(known_kl(student, poor, 3.0), known_kl(student, exact, 3.0))
    buckets = poor.log_probs(3.0).exp()
    inside = buckets.gather(-1, poor.topk_ids)
    torch.testing.assert_close(inside, poor.topk_log_probs(3.0).exp(), rtol=1e-5, atol=1e-7)
    outside = buckets.sum(dim=-1) - inside.sum(dim=-1)
    torch.testing.assert_close(outside, poor.tail_mass(3.0), rtol=1e-4, atol=1e-6)
    over_all, over_buckets = divergence(student, poor, 3.0), known_kl(student, poor, 3.0)
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
        expected = known_kl(student, targets, temperature)
        for mine, theirs in ((student, moved), (student + shift, targets)):
            with case(temperature, shift):
                got = known_kl(mine, theirs, temperature)
                torch.testing.assert_close(got, expected, rtol=0, atol=5e-5)


def peaked(*heights: float) -> Tensor:
    """Positions whose first four tokens stand ``heights`` above the others."""
    logits = drawn(1, 30, 0.5, seed=5).repeat(len(heights), 1)
    logits[:, :4] += torch.tensor(heights)[:, None]
    return logits


def test_a_collapsed_tail_is_pulled_back() -> None:
    """A student (almost) without the teacher's tail: the tail's gradient is q_tail − p_tail."""
    student = peaked(10.0, 20.0, 40.0).requires_grad_()
    targets = CompactTargets.from_logits(peaked(4.0, 4.0, 4.0), 4)
    assert sorted(targets.topk_ids[0].tolist()) == [0, 1, 2, 3]
    mass = targets.tail_mass(1.0)
    assert float(mass.min()) > 0.05
    found = gradient(known_kl(student, targets, 1.0), student)[:, 4:].sum(dim=1)
    expected = probabilities(rows(student), 1.0)[:, 4:].sum(axis=1) - mass.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


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
    assert cross_entropy(logits.bfloat16(), labels).dtype == torch.float32
