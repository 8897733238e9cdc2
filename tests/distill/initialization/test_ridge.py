"""Ridge regression: the optimum by its definition; nothing where nothing predicts."""

from __future__ import annotations

import torch

from distill.initialization.ridge import corrections, moments


def test_corrections_are_ridge_regression() -> None:
    """The optimum by its normal equations, with one of the strengths; without noise the map."""
    draw = torch.Generator().manual_seed(0)
    inputs, true = torch.randn(400, 12, generator=draw), torch.randn(5, 12, generator=draw)
    checked = torch.arange(400) % 8 == 0
    result = corrections(inputs, [inputs @ true.T], checked)[0]
    assert (result - true).abs().max() < 1e-3
    noisy = inputs @ true.T + 3.0 * torch.randn(400, 5, generator=draw)
    weights = torch.rand(400, generator=draw) + 0.1
    result = corrections(inputs, [noisy], checked, weights)[0].double()
    x, y = (weights[:, None].double() * part.double() for part in (inputs, noisy))
    gradient = x.T @ (y - x @ result.T)  # equals ρ · result at the optimum
    ridge = float((gradient * result.T).sum() / result.square().sum())
    assert ridge > 0 and (gradient - ridge * result.T).abs().max() < 1e-4 * x.square().sum()


def test_corrections_of_noise_are_none() -> None:
    """More inputs than the examples determine: what does not predict is not used."""
    draw = torch.Generator().manual_seed(0)
    inputs, noise = torch.randn(64, 60, generator=draw), torch.randn(64, 3, generator=draw)
    assert corrections(inputs, [noise], torch.arange(64) % 4 == 0)[0].abs().max() < 0.15
    assert not corrections(inputs, [noise], torch.zeros(64, dtype=torch.bool))[0].any()


def test_moments_are_the_product() -> None:
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(5000, width, generator=draw) for width in (3, 4))
    assert (moments(left, right) - left.double().T @ right.double()).abs().max() < 1e-3
