"""Calibration figures and Platt scaling against their definitions in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.metrics.calibration import (
    BINS,
    auroc,
    expected_calibration_error,
    fit_platt,
    reliability,
)
from tests.support.references import Array, case


def drawn(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Probabilities with many ties, and outcomes that follow them loosely."""
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.randint(0, 41, (count,), generator=generator) / 40
    noise = torch.rand(count, generator=generator)
    return probabilities, 0.3 + 0.5 * probabilities > noise


def reference_auroc(scores: Tensor, outcomes: Tensor) -> float:
    """Every pair of a true and a false case."""
    true, false = scores[outcomes].double()[:, None], scores[~outcomes].double()[None]
    return float(((true > false).double() + 0.5 * (true == false).double()).mean())


def test_calibration_error_against_a_loop() -> None:
    """Bins, their means and shares, and the error that they add up to; empty bins are left out."""
    for count in (1, 2, 7, 400):
        probabilities, outcomes = drawn(count, count)
        bins: dict[int, list[tuple[float, bool]]] = {}
        for chance, true in zip(probabilities.double().tolist(), outcomes.tolist(), strict=True):
            place = next(n for n in range(BINS) if chance * BINS < n + 1 or n == BINS - 1)
            bins.setdefault(place, []).append((chance, true))
        wanted, error = [bins[place] for place in sorted(bins)], 0.0
        found = reliability(probabilities, outcomes)
        with case(count):
            assert [bin.count for bin in found] == [len(cases) for cases in wanted]
            for bin, cases in zip(found, wanted, strict=True):
                mean, share = (sum(column) / bin.count for column in zip(*cases, strict=True))
                means = (bin.mean_probability, bin.share_true)
                assert means == pytest.approx((mean, share), abs=1e-9)
                error += abs(mean - share) * bin.count / count
            found_error = expected_calibration_error(probabilities, outcomes)
            assert found_error == pytest.approx(error, abs=1e-9)


def test_calibration_error_of_known_cases() -> None:
    """0 where probabilities are right, 1 where certainty is always wrong; 0 and 1 have a bin."""
    certain = torch.tensor([0.0, 1.0, 1.0, 0.0])
    right = torch.tensor([False, True, True, False])
    assert expected_calibration_error(certain, right) == 0.0
    assert expected_calibration_error(certain, ~right) == 1.0
    half = torch.full((10,), 0.5)
    assert expected_calibration_error(half, torch.arange(10) < 5) == 0.0
    assert expected_calibration_error(half, torch.arange(10) < 8) == pytest.approx(0.3)
    assert [bin.count for bin in reliability(certain, right)] == [2, 2]


def test_auroc_against_all_pairs() -> None:
    """With ties counting half; of whatever scale the scores are."""
    for count in (2, 3, 50, 300):
        scores, outcomes = drawn(count, count)
        outcomes[0], outcomes[1] = True, False
        expected = reference_auroc(scores, outcomes)
        with case(count):
            for given in (scores, scores * 1e6 - 3e6):
                assert auroc(given, outcomes) == pytest.approx(expected, abs=1e-12)
            assert auroc(-scores, outcomes) == pytest.approx(1.0 - expected, abs=1e-12)
            assert auroc(scores, ~outcomes) == pytest.approx(1.0 - expected, abs=1e-12)


def test_auroc_of_known_cases() -> None:
    """1 for a perfect order, 0 for its reverse, ½ for equal scores, nothing without an order."""
    scores, outcomes = torch.tensor([0.1, 0.2, 0.3, 0.9]), torch.tensor([0, 0, 1, 1]).bool()
    assert auroc(scores, outcomes) == 1.0 and auroc(scores, ~outcomes) == 0.0
    assert auroc(torch.ones(4), outcomes) == 0.5
    for one_sided in (torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)):
        assert auroc(torch.rand(3), one_sided) is None
    assert auroc(torch.rand(1), torch.tensor([True])) is None
    assert auroc(torch.empty(0), torch.empty(0, dtype=torch.bool)) is None


def platt_loss(scale: Array, offset: Array, log_odds: Tensor, outcomes: Tensor) -> Array:
    """Binary cross-entropy summed over the cases, and ½ of the squared distance from (1, 0)."""
    signs = np.where(outcomes.numpy(), 1.0, -1.0)
    logits = scale[..., None] * log_odds.numpy() + offset[..., None]
    return 0.5 * ((scale - 1.0) ** 2 + offset**2) + np.log1p(np.exp(-signs * logits)).sum(axis=-1)


def spread_cases(count: int, scale: float, offset: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-odds, and outcomes of which scale · log_odds + offset are the true log-odds."""
    generator = torch.Generator().manual_seed(seed)
    values = 2.0 * torch.randn(count, generator=generator, dtype=torch.float64)
    chance = 1.0 / (1.0 + torch.exp(-(scale * values + offset)))
    return values, torch.rand(count, generator=generator, dtype=torch.float64) < chance


def test_platt_is_the_lowest_point() -> None:
    """The loss has no slope there, and is nowhere lower on a wide grid."""
    turns, shifts = np.meshgrid(np.arange(21) / 4, np.arange(-10, 11) / 4)
    step = 1e-4 * np.array([[1.0, 0.0], [0.0, 1.0]])
    for count, scale, offset in ((1, 1.0, 0.0), (9, 2.0, 1.0), (300, 0.4, -1.5)):
        cases = spread_cases(count, scale, offset)
        point = np.array(fit_platt(*cases))
        high, low = (platt_loss(*(point + move).T, *cases) for move in (step, -step))
        assert np.abs((high - low) / 2e-4).max() < 1e-4, count
        assert platt_loss(*point, *cases) <= platt_loss(turns, shifts, *cases).min() + 1e-9, count


def test_platt_finds_what_was_done_to_the_log_odds() -> None:
    """Outcomes drawn with a scale and an offset give both back, and the error falls."""
    values, outcomes = spread_cases(20_000, 0.5, 1.0)
    a, b = fit_platt(values, outcomes)
    assert (a, b) == pytest.approx((0.5, 1.0), abs=0.06)
    before = expected_calibration_error(values.sigmoid(), outcomes)
    after = expected_calibration_error((a * values + b).sigmoid(), outcomes)
    assert after < 0.02 < 0.1 < before
    assert fit_platt(values.float(), outcomes) == pytest.approx((a, b), abs=1e-5)


def test_platt_of_one_sided_and_extreme_cases() -> None:
    """Always finite: all alike, perfectly separated, enormous log-odds, none at all."""
    values = torch.linspace(-3.0, 3.0, 40)
    for outcomes in (values > -9, values > 9, values > 0):
        for factor in (1.0, 1e-6, 1e3):
            a, b = fit_platt(values * factor, outcomes)
            assert math.isfinite(a) and math.isfinite(b) and a >= 0.0
    a, b = fit_platt(torch.full((50,), 2.0), torch.ones(50, dtype=torch.bool))
    assert 2.0 * a + b > 2.0
    assert fit_platt(torch.empty(0), torch.empty(0, dtype=torch.bool)) == (1.0, 0.0)


def test_platt_never_turns_the_order_round() -> None:
    """Log-odds that are wrong the more certain they are count nothing: the true share remains."""
    turned, outcomes = spread_cases(5000, 1.0, 0.0)
    values = 6.0 - turned
    a, b = fit_platt(values, outcomes)
    assert a == 0.0
    assert 1.0 / (1.0 + math.exp(-b)) == pytest.approx(float(outcomes.double().mean()), abs=0.01)
