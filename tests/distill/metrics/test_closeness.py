"""Levels by their bounds, the names of KLs, and forecasts on curves whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from distill.metrics.closeness import (
    Closeness,
    fit_curve,
    forecast,
    kl_name,
    kl_over,
    level_of,
)
from distill.reports.verdict import forecast_words

TOKENS = np.linspace(0.0, 1.1e6, 12)  # as twelve evaluations lie, the first before training


def curve(a: float, b: float, c: float, noise: float = 0.0, seed: int = 0) -> list[float]:
    """a + b·(t/t_end)^−c at ``TOKENS``, with relative noise; some number before training."""
    random = np.random.default_rng(seed)
    exact = a + b * (TOKENS[1:] / TOKENS[-1]) ** -c
    return [9.0, *(exact * (1 + noise * random.standard_normal(11))).tolist()]


def test_levels() -> None:
    """Both bounds count, and they themselves belong to the better level."""
    for kl, agreement, name in (
        (0.05, 0.90, "very close"),
        (0.0501, 0.99, "close"),
        (0.01, 0.899, "close"),
        (0.25, 0.75, "close"),
        (0.2501, 0.99, "not usable yet"),
        (0.01, 0.749, "not usable yet"),
        (3.0, 0.024, "not usable yet"),
        (math.nan, 0.99, "not usable yet"),
    ):
        assert level_of(kl, agreement).name == name, (kl, agreement)


def test_one_name_for_one_kl() -> None:
    for kind, name in (("compact", "bucket KL"), ("hidden", "KL"), ("dense", "KL")):
        assert kl_name(kl_over(kind, 16)) == name, kind


def test_a_forecast_is_where_the_curve_is() -> None:
    """Without noise the tokens at which a + b·t^−c meets the bound, solved for by hand."""
    apart = fit_curve(TOKENS, curve(0.0, 0.05, 1.0))
    assert apart is not None
    for a, b, c in ((0.0, 0.5, 0.5), (0.1, 0.3, 0.7), (0.02, 0.4, 1.1)):
        fitted, now = fit_curve(TOKENS, curve(a, b, c)), Closeness(a + b, 0.95)
        assert fitted is not None
        found = forecast((fitted, apart), now, now)
        wanted = TOKENS[-1] * ((b / (0.25 - a)) ** (1 / c) - 1)
        assert found is not None and found.level.name == "close"
        assert found.tokens == pytest.approx(wanted, rel=0.05), (a, b, c)
        assert found.low <= found.tokens <= found.high
        assert found.floor[0] == pytest.approx(a, abs=0.01), (a, b, c)
        # The exported file is farther than its validation point: so is its whole curve.
        farther = forecast((fitted, apart), Closeness(1.2 * (a + b), 0.95), now)
        wanted = TOKENS[-1] * ((1.2 * b / (0.25 - 1.2 * a)) ** (1 / c) - 1)
        assert farther is not None and farther.tokens == pytest.approx(wanted, rel=0.1), (a, b, c)


def test_what_is_not_known_is_not_said() -> None:
    """An asymptote above the bound, of either figure; too few points; nothing above very close."""
    low, high = fit_curve(TOKENS, curve(0.0, 0.4, 1.0)), fit_curve(TOKENS, curve(0.3, 0.2, 1.0))
    assert low is not None and high is not None
    for curves, now in (((high, low), Closeness(0.5, 0.6)), ((low, high), Closeness(0.4, 0.5))):
        found = forecast(curves, now, now)
        assert found is not None and found.low == found.tokens == math.inf, now
    assert forecast((low, low), Closeness(0.04, 0.95), Closeness(0.04, 0.95)) is None
    rising = fit_curve(TOKENS, [9.0, *np.linspace(0.3, 0.5, 11)])
    assert rising is not None and rising.reaches(0.25)[0] == math.inf
    assert fit_curve(TOKENS[:6], curve(0.1, 0.3, 0.7)[:6]) is None
    assert fit_curve(TOKENS, [9.0, *[math.nan] * 6, *[0.5] * 5]) is None


def test_few_points_do_not_tell_what_cannot_be_reached() -> None:
    """The same curve, whose asymptote is above the bound: from ten points on it is said."""
    for points, said in ((9, "9 validation points are too few to tell"), (10, "not reachable")):
        tokens = np.linspace(1e5, 1e6, points)
        curves = [fit_curve(tokens, a + 0.2 * (tokens / 1e6) ** -1.0) for a in (0.6, 0.01)]
        assert curves[0] is not None and curves[1] is not None
        found = forecast((curves[0], curves[1]), Closeness(0.8, 0.79), Closeness(0.8, 0.79))
        assert found is not None and said in forecast_words(found, None), points


def test_intervals_hold_the_truth() -> None:
    """Of 60 noisy curves each, about 95 of 100 intervals do; at least 80 of 100 are asked for."""
    for a, b, c in ((0.02, 0.5, 0.7), (0.2, 0.3, 1.0)):
        truth = TOKENS[-1] * (b / (0.25 - a)) ** (1 / c)
        held = 0
        for seed in range(60):
            fitted = fit_curve(TOKENS, curve(a, b, c, noise=0.02, seed=seed))
            assert fitted is not None
            low, high = np.quantile(fitted.reaches(0.25)[1:], [0.025, 0.975], method="nearest")
            held += low <= truth <= high
        assert held >= 48, (a, b, c, held)
