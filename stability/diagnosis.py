"""Finding what began it, once a loss or a gradient is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from stability.detectors import NON_FINITE, Action, Trouble, WeightLeap
from stability.measures.monitor import Before, Monitor
from stability.measures.step import local

Inputs = Callable[[], Mapping[str, Tensor]]


@torch.no_grad()
def find_cause(before: Before, monitor: Monitor, weights: WeightLeap, inputs: Inputs | None) -> Trouble:
    """The first cause in the order in which one leads to the next: weights, optimizer state, the batch, a gradient.

    Damaged weights or optimizer state must be put back; anything else passes with its step.
    """
    if (trouble := weights.judge(dict(enumerate(monitor.weight_norms())))) is not None:
        return trouble
    if (name := broken_state(monitor)) is not None:
        words = f"the optimizer's {name} is not finite"
        return Trouble(Action.ROLLBACK, "optimizer state", name, None, None, words)
    what = "loss" if not math.isfinite(before.loss) else "gradient"
    for name, tensor in (inputs() if inputs is not None else {}).items():
        # A logarithm of nothing is minus infinity and does no harm.
        if tensor.is_floating_point() and bool((torch.isnan(tensor) | torch.isposinf(tensor)).any()):
            words = f"the {what} is not finite, because the batch's {name} is not"
            return Trouble(
                Action.SKIP, f"{NON_FINITE} {what}", f"batch: {name}", None, None, words, blames_data=True
            )
    if math.isfinite(before.loss) and (found := broken_gradient(before, monitor)) is not None:
        words = f"the gradient of {found} is not finite, though the loss is"
        return Trouble(Action.SKIP, f"{NON_FINITE} gradient", found, None, None, words, blames_data=True)
    words = f"the {what} is not finite, though weights and batch are"
    return Trouble(Action.SKIP, f"{NON_FINITE} {what}", None, before.loss, None, words, blames_data=True)


def broken_gradient(before: Before, monitor: Monitor) -> str | None:
    """The weight whose gradient was the first that is not finite: the backward pass goes from the last to the first."""
    for name, norm in zip(reversed(monitor.names), reversed(before.gradients), strict=True):
        if not math.isfinite(norm):
            return name
    return None


def broken_state(monitor: Monitor) -> str | None:
    """The first tensor of the optimizer's state that is not finite, as ``exp_avg of NAME``."""
    for name, weight in zip(monitor.names, monitor.weights, strict=True):
        for kind, value in monitor.optimizer.state.get(weight, {}).items():
            if isinstance(value, Tensor) and not bool(torch.isfinite(local(value)).all()):
                return f"{kind} of {name}"
    return None


@torch.no_grad()
def with_poisoned_state(trouble: Trouble, monitor: Monitor) -> Trouble:
    """Trouble with a step just taken, and the optimizer's state named where that is what is wrong."""
    if trouble.tensor not in monitor.names:
        return trouble
    name = poisoned_state(monitor, monitor.names.index(trouble.tensor))
    return (
        trouble
        if name is None
        else replace(trouble, tensor=name, words=f"{trouble.words} (the optimizer's {name} is not sound)")
    )


def poisoned_state(monitor: Monitor, place: int) -> str | None:
    """Which moment of Adam's for a weight cannot be right: one that is not finite, is negative where it is a mean of
    squares, or breaks |m| ≤ c·√v, which holds for any gradients (Cauchy and Schwarz; c from the decay rates)."""
    weight, name = monitor.weights[place], monitor.names[place]
    state = monitor.optimizer.state.get(weight, {})
    for kind, value in state.items():
        if isinstance(value, Tensor) and not bool(torch.isfinite(local(value)).all()):
            return f"{kind} of {name}"
    first, second = state.get("exp_avg"), state.get("exp_avg_sq")
    group = next(
        (one for one in monitor.optimizer.param_groups if any(p is weight for p in one["params"])), {}
    )
    if not isinstance(first, Tensor) or not isinstance(second, Tensor) or "betas" not in group:
        return None
    m, v = local(first).double(), local(second).double()
    slow, fast = group["betas"][1], group["betas"][0]
    if bool((v < 0).any()) or not slow > fast * fast:
        return f"exp_avg_sq of {name}" if bool((v < 0).any()) else None
    # m = (1-a) Σ aⁱ g, v = (1-b) Σ bⁱ g²  ⇒  m² ≤ v · (1-a)² / (1-b) / (1 - a²/b)
    bound = (1 - fast) ** 2 / (1 - slow) / (1 - fast * fast / slow)
    return f"exp_avg or exp_avg_sq of {name}" if bool((m * m > 1.01 * bound * v + 1e-30).any()) else None
