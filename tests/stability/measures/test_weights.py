"""Figures of a weight tensor against numpy, and of tensors that are broken in a known way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stability.measures.weights import EXACT, GRAM, PLOT_POINTS, plot_indices, weigh


def test_figures_against_numpy() -> None:
    """Norm, spread, largest magnitude, zeros, ranks and tail; sums are in float64 for any type."""
    assert weigh("w", torch.full((300, 300), 200.0).half()).norm == pytest.approx(200.0 * 300)
    values = np.random.default_rng(0).standard_normal((80, 50)) + 0.3
    values[values > 1.5] = 0.0
    found = weigh("w", torch.from_numpy(values))
    assert (found.name, found.shape, found.count, found.not_finite) == ("w", (80, 50), 4000, 0)
    assert found.norm == pytest.approx(np.linalg.norm(values))
    assert found.spread == pytest.approx(values.std())
    assert found.largest == np.abs(values).max()
    assert found.zero_share == pytest.approx((values == 0).mean())
    singular = np.linalg.svd(values, compute_uv=False)
    shares = singular / singular.sum()
    spectrum = found.spectrum
    assert spectrum is not None and (spectrum.route, spectrum.full_rank) == (EXACT, 50)
    assert spectrum.spectral_norm == pytest.approx(singular[0])
    assert spectrum.effective_rank == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    assert spectrum.stable_rank == pytest.approx((singular**2).sum() / singular[0] ** 2)
    assert spectrum.rank_share == pytest.approx(spectrum.effective_rank / 50)
    assert spectrum.tail is not None and spectrum.tail.tail_size <= 50
    assert spectrum.ranks == tuple(range(1, 51)) and spectrum.values == pytest.approx(singular)


def test_dead_rows_and_columns() -> None:
    """Rows and columns of nothing but zeros; a vector has neither."""
    matrix = torch.ones(6, 9)
    matrix[2] = 0.0
    matrix[:, [0, 5, 8]] = 0.0
    found = weigh("w", matrix)
    assert (found.dead_rows, found.dead_columns) == (1, 3)
    assert found.zero_share == pytest.approx((9 + 5 * 3) / 54)
    vector = weigh("v", torch.zeros(4))
    assert (vector.dead_rows, vector.dead_columns, vector.spectrum) == (None, None, None)
    assert vector.no_spectrum == "not a matrix" and vector.zero_share == 1.0


def test_values_that_are_not_finite_are_counted_and_passed_over() -> None:
    """No spectrum, and the other figures are those of what is left."""
    matrix = torch.full((20, 30), 2.0)
    matrix[3, 4], matrix[5, 6], matrix[7, 8] = math.nan, math.inf, -math.inf
    found = weigh("w", matrix)
    assert found.not_finite == 3 and found.spectrum is None and found.no_spectrum == "not finite"
    assert found.norm == pytest.approx(math.sqrt(597 * 4)) and found.largest == 2.0
    assert found.spread == pytest.approx(0.0, abs=1e-6) and found.zero_share == 0.0
    lost = weigh("w", torch.full((2, 2), math.nan))
    assert (lost.norm, lost.largest, lost.not_finite) == (0.0, 0.0, 4)
    # A matrix of zeros has ranks of 0 and no tail.
    spectrum = weigh("w", torch.zeros(30, 40)).spectrum
    assert spectrum is not None and spectrum.tail is None
    assert spectrum.spectral_norm == spectrum.effective_rank == spectrum.stable_rank == 0.0
    assert weigh("w", torch.zeros(0, 4)).no_spectrum == "empty"


def test_large_matrices_go_by_the_gram_matrix() -> None:
    """Said in the record, and the same figures as far as float32 goes."""
    matrix = torch.randn(60, 90, generator=torch.Generator().manual_seed(3))
    exact, fast = weigh("w", matrix).spectrum, weigh("w", matrix, exact_side=50).spectrum
    assert exact is not None and fast is not None and (exact.route, fast.route) == (EXACT, GRAM)
    for name in ("spectral_norm", "effective_rank", "stable_rank"):
        assert getattr(fast, name) == pytest.approx(getattr(exact, name), rel=1e-4)


FIGURES = (
    *("norm", "spread", "largest", "zero_share"),
    *("dead_rows", "dead_columns", "count", "shape"),
)


def test_blocks_give_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little of a tensor is looked at together."""
    draw = torch.Generator().manual_seed(4)
    tensors = [torch.randn(shape, generator=draw) for shape in ((13, 7), (101,), (3, 4, 5), ())]
    tensors[0][4], tensors[0][:, 2] = 0.0, 0.0
    whole = [weigh(str(place), tensor) for place, tensor in enumerate(tensors)]
    monkeypatch.setattr("stability.measures.weights.BLOCK_VALUES", 5)
    for before, tensor in zip(whole, tensors, strict=True):
        after = weigh(before.name, tensor)
        for name in FIGURES:
            assert getattr(after, name) == pytest.approx(getattr(before, name)), (before.name, name)


def test_places_of_a_plot() -> None:
    """Few, in order, with both ends."""
    for number in (1, 2, 63, 64, 65, 300, 4096):
        places = plot_indices(number)
        assert len(places) <= PLOT_POINTS and places == sorted(set(places)), number
        assert places[0] == 0 and places[-1] == number - 1, number
