"""How close a student is to its teacher, in three levels, and how far the next one is.

The bounds and their reasons: docs/verdict.md. What stands for KL has one of two names: "KL" is
over the whole vocabulary, "bucket KL" over the top tokens and the rest as one bucket, which is at
most the KL. Levels are bounds of the KL.

The curve of a training is a power law a + b·t^−c of the tokens t trained on, fitted to KL and to
disagreement (1 − same top token) at the validation points by least squares of relative errors,
with a, b ≥ 0 and c out of a grid. Its uncertainty: a bootstrap of the residuals. Letters: P points,
C exponents, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WHOLE_VOCABULARY = "whole vocabulary"
TEACHER, STORED_TARGETS = "teacher", "stored soft targets"  # what a student is compared with
LEAST_POINTS = 6  # of a curve with three parameters, below which nothing is said
TELLING_POINTS = 10  # below which nothing is said of what cannot be reached (docs/verdict.md)
FARTHEST = 10.0  # times the tokens trained on: what lies beyond is not a number to rely on
EXPONENTS = np.geomspace(0.05, 3.0, 400)
RESAMPLES, SEED = 1000, 20_200_123  # fixed: the same curve always has the same forecast

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Level:
    """``kl``: at most so many nats per token; ``agreement``: at least that share of positions has
    the teacher's most probable token."""

    name: str
    kl: float
    agreement: float


NOT_YET = Level("not usable yet", math.inf, 0.0)
CLOSE, VERY_CLOSE = Level("close", 0.25, 0.75), Level("very close", 0.05, 0.90)
LEVELS = (NOT_YET, CLOSE, VERY_CLOSE)
BOUNDS = (
    "; ".join(
        f"{one.name}: KL ≤ {one.kl:g} nats per token and same top token ≥ {one.agreement:.0%}"
        for one in (VERY_CLOSE, CLOSE)
    )
    + f"; else {NOT_YET.name}"
)


def level_of(kl: float, agreement: float) -> Level:
    """The highest level whose bounds both figures keep; a NaN keeps none."""
    kept = [one for one in LEVELS[1:] if kl <= one.kl and agreement >= one.agreement]
    return kept[-1] if kept else NOT_YET


def next_level(level: Level) -> Level | None:
    """The level above; ``None`` above the highest."""
    return next(iter(LEVELS[LEVELS.index(level) + 1 :]), None)


def kl_over(kind: str | None, num_topk: int | None) -> str:
    """Over what soft targets of a kind give the KL."""
    return f"{num_topk} top tokens and the rest" if kind == "compact" else WHOLE_VOCABULARY


def kl_name(over: str) -> str:
    """The name of a KL over that."""
    return "KL" if over == WHOLE_VOCABULARY else "bucket KL"


@dataclass(frozen=True)
class Curve:
    """Fitted power laws a + b·t^−c, ``[R]`` each, the first to the ``points`` themselves, the
    others to resampled ones; t is a share of the ``tokens`` trained on."""

    points: int
    tokens: float
    a: Floats
    b: Floats
    c: Floats

    def reaches(self, bound: float) -> Floats:
        """Tokens at which each law gives ``bound``; infinite where its asymptote lies above."""
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            share = (self.b / (bound - self.a)) ** (1 / self.c)
        return self.tokens * np.where(bound > self.a, share, np.inf)

    def after(self, tokens: float) -> Floats:
        """What each law gives after so many tokens."""
        return self.a + self.b * (tokens / self.tokens) ** -self.c


def fit_curve(tokens: Sequence[float], values: Sequence[float]) -> Curve | None:
    """Fit a curve to validation points in order of tokens, those before training (0 tokens) left
    out; ``None`` where fewer than ``LEAST_POINTS`` of them are positive and finite."""
    known = [(t, v) for t, v in zip(tokens, values, strict=True) if t > 0 and 0 < v < math.inf]
    if len(known) < LEAST_POINTS:
        return None
    end = float(known[-1][0])
    t, y = np.array(known).T
    powers: Floats = (t / end) ** -EXPONENTS[:, None]
    fitted = _laws(powers, y[None])
    expected = fitted[0][0] + fitted[1][0] * (t / end) ** -fitted[2][0]
    # Of residuals that three parameters have made smaller.
    residuals = (y / expected - 1.0) * math.sqrt(len(y) / (len(y) - 3))
    random = np.random.default_rng(SEED)
    drawn = random.choice(np.concatenate((residuals, -residuals)), (RESAMPLES, len(y)))
    again = _laws(powers, expected * np.maximum(1.0 + drawn, 0.05))
    return Curve(len(y), end, *(np.concatenate(pair) for pair in zip(fitted, again, strict=True)))


def _laws(powers: Floats, values: Floats) -> tuple[Floats, Floats, Floats]:
    """Best a, b, c ``[R]`` for ``values [R, P]``: Σ ((a + b·power)/value − 1)² is quadratic in
    a and b for each of the ``powers [C, P]``, and its least value with a, b ≥ 0 is known."""
    weights = 1.0 / values
    ones, squares = weights.sum(axis=1)[:, None], (weights**2).sum(axis=1)[:, None]
    first, mixed = weights @ powers.T, weights**2 @ powers.T
    second = weights**2 @ (powers**2).T
    determinant = np.maximum(squares * second - mixed**2, 1e-12 * squares * second)
    a = (ones * second - first * mixed) / determinant
    b = (first * squares - ones * mixed) / determinant
    a, b = (
        np.where(b < 0, ones / squares, np.maximum(a, 0.0)),
        np.where(a < 0, first / second, np.maximum(b, 0.0)),
    )
    best = np.argmax(a * ones + b * first, axis=1)  # of the least sum P − a Σw − b Σw·power
    rows = np.arange(len(values))
    return a[rows, best], b[rows, best], EXPONENTS[best]


@dataclass(frozen=True)
class Closeness:
    """``kl`` over the whole vocabulary in nats per token, and ``agreement``, the share of positions
    with the same top token."""

    kl: float
    agreement: float

    @property
    def level(self) -> Level:
        """The level whose bounds both keep."""
        return level_of(self.kl, self.agreement)


@dataclass(frozen=True)
class Forecast:
    """Tokens beyond those trained on until ``level`` is reached, with a 95 % interval: infinite
    where an asymptote lies above its bounds. ``floor``: the KL's asymptote, with its interval;
    ``ceiling``: the agreement's; ``points``: of the curve."""

    level: Level
    trained: float
    tokens: float
    low: float
    high: float
    floor: tuple[float, float, float]
    ceiling: float
    points: int


def _scales(measured: Closeness, validated: Closeness) -> tuple[float, float]:
    """What is measured as a multiple of its validation point: KL, and disagreement."""
    same = validated.agreement >= 1
    apart = 1.0 if same else (1 - measured.agreement) / (1 - validated.agreement)
    return measured.kl / validated.kl, apart


def expected(
    curves: tuple[Curve, Curve], measured: Closeness, validated: Closeness, tokens: float
) -> tuple[Closeness, float, float]:
    """What a like training over so many tokens gives, and the 95 % interval of its KL; see
    ``forecast``."""
    scale, apart = _scales(measured, validated)
    kl = scale * curves[0].after(tokens)
    low, high = np.quantile(kl[1:], [0.025, 0.975]).tolist()
    disagreement = min(1.0, apart * float(curves[1].after(tokens)[0]))
    return Closeness(float(kl[0]), 1.0 - disagreement), low, high


def forecast(
    curves: tuple[Curve, Curve], measured: Closeness, validated: Closeness
) -> Forecast | None:
    """When the level above the ``measured`` one is reached; ``None`` at the highest.

    ``curves``: of KL and of disagreement at the validation points. ``validated``: the validation
    point of the weights that were measured. What is measured afterwards (over the whole vocabulary,
    of the exported file) is taken to be in proportion to it.
    """
    level = next_level(measured.level)
    if level is None:
        return None
    scale, apart = _scales(measured, validated)
    bounds = level.kl / scale, (1 - level.agreement) / max(apart, 1e-9)
    reached = np.maximum(*(one.reaches(bound) for one, bound in zip(curves, bounds, strict=True)))
    more = np.maximum(0.0, reached - curves[0].tokens)
    low, high = np.quantile(more[1:], [0.025, 0.975], method="nearest").tolist()
    floors = scale * curves[0].a
    edges = np.quantile(floors[1:], [0.025, 0.975]).tolist()
    now = float(more[0])
    return Forecast(
        level=level,
        trained=curves[0].tokens,
        tokens=now,
        low=min(low, now),
        high=max(high, now),
        floor=(float(floors[0]), *edges),
        ceiling=1.0 - apart * float(curves[1].a[0]),
        points=min(one.points for one in curves),
    )
