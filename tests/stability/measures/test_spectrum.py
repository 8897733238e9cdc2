"""Spectra against known ones, a fit by plain loops, and samples of a known power law."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from stability.measures.spectrum import (
    MIN_EIGENVALUES,
    MIN_TAIL,
    effective_rank,
    fast_singular_values,
    heavy_tail_exponent,
    singular_values,
    stable_rank,
)


def matrix_with(values: list[float], rows: int, columns: int, seed: int = 0) -> Tensor:
    """``[rows, columns]`` in float64 with these singular values, in random directions."""
    draw = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), generator=draw, dtype=torch.float64))[0]
        for size in (rows, columns)
    )
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T


def pareto(alpha: float, number: int, seed: int) -> Tensor:
    """Singular values whose squares are drawn from p(λ) ~ λ^-alpha, λ ≥ 1."""
    uniform = np.random.default_rng(seed).random(number)
    return torch.from_numpy((1.0 - uniform) ** (-0.5 / (alpha - 1.0)))


def test_singular_values_that_are_known() -> None:
    """Both ways give the values that the matrix was made with, largest first, in float64."""
    known = [9.0, 4.0, 4.0, 1.0, 0.5]
    for shape in ((30, 12), (12, 30), (12, 12)):
        matrix = matrix_with(known, *shape)
        for found in (singular_values(matrix), fast_singular_values(matrix)):
            assert found.shape == (12,) and found.dtype == torch.float64, shape
            assert found[:5].tolist() == pytest.approx(known, rel=1e-9), shape
            assert float(found[5:].max()) < 1e-6, shape


def test_fast_way_against_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As near as documented in each precision, where squares would overflow or vanish too."""
    draw = np.random.default_rng(1)
    plain = draw.standard_normal((90, 40)) @ np.diag(np.geomspace(1.0, 1e-2, 40))
    exact = np.linalg.svd(plain, compute_uv=False)
    for scale in (1.0, 1e-30, 1e30):
        for kind, epsilon in ((torch.float64, 2.2e-16), (torch.float32, 1.2e-7)):
            found = fast_singular_values(torch.from_numpy(plain * scale).to(kind)).numpy() / scale
            allowed = 10 * epsilon * (exact[0] ** 2 / exact + exact)
            assert (np.abs(found - exact) <= allowed).all(), (scale, kind)
    for kind in (torch.float16, torch.bfloat16):
        rounded = torch.from_numpy(plain).to(kind)
        largest = float(singular_values(rounded)[0])
        assert fast_singular_values(rounded)[0] == pytest.approx(largest, rel=1e-5), kind

    # A Gram matrix that is summed over blocks of rows is the whole one.
    matrix = torch.randn(50, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = fast_singular_values(matrix)
    monkeypatch.setattr("stability.measures.spectrum.LONG_SIDE_ROWS", 8)
    assert fast_singular_values(matrix).tolist() == pytest.approx(whole.tolist(), rel=1e-12)


def test_what_is_not_finite_or_empty_or_no_matrix() -> None:
    """NaN from the fast way, which runs while training; a refusal from the exact one."""
    for bad in (math.nan, math.inf, -math.inf):
        matrix = torch.ones(3, 5)
        matrix[1, 2] = bad
        found = fast_singular_values(matrix)
        assert found.shape == (3,) and bool(found.isnan().all()), bad
        assert math.isnan(float(effective_rank(found))) and math.isnan(float(stable_rank(found)))
        with pytest.raises(ValueError, match="not finite"):
            singular_values(matrix)
    for way in (singular_values, fast_singular_values):
        assert way(torch.zeros(0, 4)).shape == (0,)
        with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
            way(torch.zeros(2, 3, 4))


def test_ranks_of_known_spectra() -> None:
    """n equal directions, one direction, none; and two of known shares, from the definition."""
    column = torch.outer(torch.arange(1.0, 6.0), torch.arange(1.0, 4.0))
    for values, rank in (
        (singular_values(torch.eye(9)), 9),
        (singular_values(column), 1),
        (torch.zeros(4), 0),
        (torch.zeros(0), 0),
    ):
        found = [float(effective_rank(values)), float(stable_rank(values))]
        assert found == (pytest.approx([rank, rank]) if rank else [0, 0]), values
    two = torch.tensor([3.0, 1.0], dtype=torch.float64)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(effective_rank(two)) == pytest.approx(math.exp(entropy))
    assert float(stable_rank(two)) == pytest.approx(10 / 9)
    assert float(effective_rank(two * 1e9)) == pytest.approx(math.exp(entropy))


def test_exponent_of_a_known_power_law() -> None:
    """Within four standard errors, (alpha - 1) / √tail, of the law that values are drawn from."""
    for alpha in (2.0, 3.5, 6.0):
        for seed in range(3):
            fit = heavy_tail_exponent(pareto(alpha, 2000, seed))
            assert fit is not None, (alpha, seed)
            root = math.sqrt(fit.tail_size)
            assert abs(fit.alpha - alpha) < 4 * (alpha - 1) / root, (alpha, seed)
            # Kolmogorov's 1 % point, for a law that is known.
            assert fit.distance < 1.63 / root, (alpha, seed)
    # A body that follows no power law is left out of the tail.
    tail = pareto(3.0, 1000, 0)
    body = torch.linspace(0.02, 0.9, 1000, dtype=torch.float64).sqrt()
    fit = heavy_tail_exponent(torch.cat([tail, body]))
    assert fit is not None and 0.8 < fit.x_min < 2.0
    assert abs(fit.alpha - 3.0) < 4 * 2.0 / math.sqrt(fit.tail_size)


def fit_by_loops(values: list[float]) -> tuple[float, float, int, float]:
    """The fit from its definition, one candidate and one eigenvalue after the other."""
    squares = sorted(value * value for value in values)
    best: tuple[float, float, int, float] | None = None
    for smallest in dict.fromkeys(squares):
        tail = [value for value in squares if value >= smallest]
        total = sum(math.log(value / smallest) for value in tail)
        if len(tail) < MIN_TAIL or total == 0:
            continue
        alpha = 1 + len(tail) / total
        distance = 0.0
        for value in tail:
            law = 1 - (value / smallest) ** (1 - alpha)
            under = sum(other < value for other in tail) / len(tail)
            upto = sum(other <= value for other in tail) / len(tail)
            distance = max(distance, abs(law - under), abs(law - upto))
        if best is None or distance < best[3]:
            best = (alpha, smallest, len(tail), distance)
    assert best is not None
    return best


def test_fit_against_plain_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with equal values, and with the candidates looked at a few at a time."""
    for seed in range(4):
        draw = np.random.default_rng(seed)
        values = np.round(draw.lognormal(0.0, 0.7, size=70), 2 if seed % 2 else 12) + 0.01
        if seed > 1:
            monkeypatch.setattr("stability.measures.spectrum.CANDIDATE_CELLS", 200)
        fit = heavy_tail_exponent(torch.from_numpy(draw.permutation(values)))
        assert fit is not None, seed
        alpha, smallest, size, distance = fit_by_loops(values.tolist())
        expected = pytest.approx((alpha, smallest, distance), rel=1e-9)
        assert (fit.alpha, fit.x_min, fit.distance) == expected, seed
        assert fit.tail_size == size, seed


def test_fit_does_not_depend_on_the_scale() -> None:
    """A matrix times a number has the same exponent, and x_min times its square."""
    values = pareto(2.5, 300, 5)
    fit, scaled = heavy_tail_exponent(values), heavy_tail_exponent(values * 1e-4)
    assert fit is not None and scaled is not None and fit.tail_size == scaled.tail_size
    found = (scaled.alpha, scaled.distance, scaled.x_min)
    assert found == pytest.approx((fit.alpha, fit.distance, fit.x_min * 1e-8), rel=1e-6, abs=0.0)


def test_no_fit_where_there_is_no_tail() -> None:
    """Too few values, all equal, rounding only, or not finite."""
    enough = pareto(3.0, MIN_EIGENVALUES, 0)
    noise = 1e-9 * pareto(3.0, 100, 1)
    assert heavy_tail_exponent(enough) is not None
    for name, values in {
        "too few": enough[1:],
        "equal": torch.ones(50),
        "zeros": torch.zeros(50),
        "not finite": torch.cat([enough, torch.tensor([math.nan])]),
        "rounding": torch.cat([torch.ones(1, dtype=torch.float64), noise]),
    }.items():
        assert heavy_tail_exponent(values) is None, name
