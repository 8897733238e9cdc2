"""Measures of a training step against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stability.measures.tensors import gradient_norm, non_finite


def parameters_with(gradients: list[torch.Tensor | None]) -> list[torch.nn.Parameter]:
    """Parameters that hold the given gradients."""
    found = []
    for gradient in gradients:
        values = torch.zeros(1) if gradient is None else torch.zeros_like(gradient)
        parameter = torch.nn.Parameter(values)
        parameter.grad = gradient
        found.append(parameter)
    return found


def norm_of(*gradients: torch.Tensor | None) -> float:
    return float(gradient_norm(parameters_with(list(gradients))))


def test_gradient_norm_against_numpy() -> None:
    """√(Σ g²) over all entries of all gradients; parameters without one are passed over."""
    random = np.random.default_rng(0)
    values = [random.normal(size=shape).astype(np.float32) for shape in ((3, 4), (7,), (2, 2, 2))]
    gradients: list[torch.Tensor | None] = [torch.from_numpy(value) for value in values]
    expected = float(np.sqrt(sum((value.astype(np.float64) ** 2).sum() for value in values)))
    norm = gradient_norm(iter(parameters_with([*gradients, None])))
    assert norm.shape == () and float(norm) == pytest.approx(expected, rel=1e-6)
    assert norm_of(*gradients) == pytest.approx(expected, rel=1e-6)


def test_gradient_norm_of_known_gradients() -> None:
    """3 and 4 give 5, and stay as they are; none or zeros give 0; one bad entry shows."""
    parameters = parameters_with([torch.tensor([0.0, -3.0]), torch.tensor([[4.0]])])
    assert float(gradient_norm(parameters)) == 5.0
    assert parameters[0].grad is not None and parameters[0].grad.tolist() == [0.0, -3.0]
    assert norm_of(None, None) == norm_of() == norm_of(torch.zeros(3)) == 0.0
    for value in (float("nan"), float("inf"), -float("inf")):
        gradient = torch.ones(100)
        gradient[57] = value
        assert not np.isfinite(norm_of(torch.ones(5), gradient)), value


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
