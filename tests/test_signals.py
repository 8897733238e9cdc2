"""Measures of a training step against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stability.signals import gradient_norm, non_finite


def parameters_with(gradients: list[torch.Tensor | None]) -> list[torch.nn.Parameter]:
    """Parameters that hold the given gradients."""
    found = []
    for gradient in gradients:
        parameter = torch.nn.Parameter(torch.zeros(1) if gradient is None else torch.zeros_like(gradient))
        parameter.grad = gradient
        found.append(parameter)
    return found


def test_gradient_norm_against_numpy() -> None:
    """√(Σ g²) over all entries of all gradients; parameters without one are passed over."""
    random = np.random.default_rng(0)
    values = [random.normal(size=shape).astype(np.float32) for shape in ((3, 4), (7,), (2, 2, 2))]
    gradients: list[torch.Tensor | None] = [torch.from_numpy(value) for value in values]
    expected = np.sqrt(sum((value.astype(np.float64) ** 2).sum() for value in values))
    norm = gradient_norm(parameters_with([*gradients, None]))
    assert norm.shape == () and float(norm) == pytest.approx(float(expected), rel=1e-6)
    assert float(gradient_norm(iter(parameters_with(gradients)))) == pytest.approx(float(expected), rel=1e-6)


def test_gradient_norm_of_known_triangle() -> None:
    """3 and 4 give 5, wherever they lie; the gradients stay as they are."""
    parameters = parameters_with([torch.tensor([0.0, -3.0]), torch.tensor([[4.0]])])
    assert float(gradient_norm(parameters)) == 5.0
    assert parameters[0].grad is not None and parameters[0].grad.tolist() == [0.0, -3.0]


def test_gradient_norm_of_nothing() -> None:
    """No gradient anywhere, or only zeros, is a norm of 0."""
    assert float(gradient_norm(parameters_with([None, None]))) == 0.0
    assert float(gradient_norm([])) == 0.0
    assert float(gradient_norm(parameters_with([torch.zeros(3)]))) == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_gradient_norm_shows_what_is_not_finite(value: float) -> None:
    """One bad entry among many makes the norm itself not finite."""
    gradient = torch.ones(100)
    gradient[57] = value
    assert not np.isfinite(float(gradient_norm(parameters_with([torch.ones(5), gradient]))))


def test_non_finite_names_every_bad_value() -> None:
    """NaN and both infinities, in scalars and inside tensors, in the order given; nothing else."""
    spoilt = torch.zeros(2, 3)
    spoilt[1, 2] = float("nan")
    values = {
        "loss": torch.tensor(float("inf")),
        "good": torch.tensor(1e38),
        "weights": spoilt,
        "counts": torch.tensor([1, 2]),
        "below": torch.tensor([0.0, -float("inf")]),
        "nothing": torch.zeros(0),
    }
    assert non_finite(values) == ["loss", "weights", "below"]
    assert non_finite({"good": torch.tensor(0.0)}) == []
