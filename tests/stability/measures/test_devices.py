"""Measures on a device without float64, and where products may be rounded: the same figures."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stability.diagnosis import poisoned_state
from stability.measures.activations import attention_entropy, dead_units, hidden_rank, output_stats
from stability.measures.monitor import Monitor
from stability.measures.spectrum import (
    effective_rank,
    fast_singular_values,
    heavy_tail_exponent,
    singular_values,
    stable_rank,
)
from stability.measures.weights import weigh
from tests.support.pretended_gpu import on_gpu, to_gpu
from tests.support.pretended_gpu.arithmetic import rounded_products, without_float64

MATRIX = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
MEASURES: dict[str, Callable[[Tensor], object]] = {
    "singular values": lambda one: singular_values(one).tolist(),
    "fast singular values": lambda one: fast_singular_values(one).tolist(),
    "effective rank": lambda one: float(effective_rank(fast_singular_values(one))),
    "stable rank": lambda one: float(stable_rank(singular_values(one))),
    "heavy tail": heavy_tail_exponent,
    "weigh": lambda one: weigh("w", one),
    "weigh, a long side": lambda one: weigh("w", one, exact_side=8),
    "output": lambda one: [float(value) for value in output_stats(one)],
    "hidden rank": hidden_rank,
    "attention": lambda one: float(attention_entropy([one.softmax(dim=-1)])),
    "dead units": lambda one: float(dead_units(one.relu())),
}


@pytest.mark.parametrize("name", MEASURES)
def test_figures_are_the_same(name: str) -> None:
    measure = MEASURES[name]
    expected = measure(MATRIX)
    with without_float64():
        assert measure(on_gpu(MATRIX)) == expected
    with rounded_products():
        assert measure(MATRIX) == expected


def test_a_monitor_needs_no_float64_on_the_device() -> None:
    """Nor does the look at Adam's moments after a fault."""

    def figures(model: nn.Module) -> tuple[dict[str, float], str | None]:
        optimizer = torch.optim.Adam(model.parameters(), foreach=False)
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        first = next(model.parameters())
        optimizer.state[first]["exp_avg_sq"].mul_(1e-6)
        monitor = Monitor(model, optimizer)
        return monitor.weigh(), poisoned_state(monitor, 0)

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(12, 9)

    expected = figures(made())
    assert expected[1] is not None
    with without_float64():
        found = figures(to_gpu(made()))
    assert found == (pytest.approx(expected[0], rel=1e-6), expected[1])
