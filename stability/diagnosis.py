"""The cause of a loss or gradient that is not finite, and of a step that is not sound."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from numerics.precision import float64
from stability.consensus import BATCH
from stability.detectors import NON_FINITE, Action, Anomaly, WeightJump
from stability.measures.monitor import GradientReading, Monitor
from stability.measures.tensors import local

Inputs = Callable[[], Mapping[str, Tensor]]


def damaged_weight(monitor: Monitor, weights: WeightJump) -> Anomaly | None:
    """A weight whose norm jumped, of all of them."""
    return weights.judge(dict(enumerate(monitor.weight_norms())))


@torch.no_grad()
def find_cause(
    before: GradientReading, monitor: Monitor, *, weights: WeightJump, inputs: Inputs | None
) -> Anomaly:
    """The first cause, in causal order: weights, optimizer state, the batch, a gradient.

    Damaged weights and optimizer state need a rollback; anything else ends with its step.
    """
    if (anomaly := damaged_weight(monitor, weights)) is not None:
        return anomaly
    for name, weight in zip(monitor.names, monitor.weights, strict=True):
        if state := _non_finite(monitor.optimizer.state.get(weight, {}), name):
            message = f"the optimizer's {state} is not finite"
            return Anomaly(Action.ROLLBACK, "optimizer state", state, None, None, message)
    what = "gradient" if math.isfinite(before.loss) else "loss"
    tensor, value, message = None, None, f"the {what} is not finite, though weights and batch are"
    if batch := _non_finite_input(inputs() if inputs is not None else {}):
        tensor = f"{BATCH}{batch}"
        message = f"the {what} is not finite, because the batch's {batch} is not"
    elif math.isfinite(before.loss) and (tensor := _first_non_finite(before, monitor)):
        message = f"the gradient of {tensor} is not finite, though the loss is"
    else:
        value = before.loss
    signal = f"{NON_FINITE} {what}"
    return Anomaly(Action.SKIP, signal, tensor, value, None, message, suspects_data=True)


def _non_finite_input(inputs: Mapping[str, Tensor]) -> str | None:
    """The first of a batch's tensors with a NaN or +∞; -∞, the logarithm of 0, does no harm."""
    floats = ((name, one) for name, one in inputs.items() if one.is_floating_point())
    return next((name for name, one in floats if bool((one.isnan() | one.isposinf()).any())), None)


def _first_non_finite(before: GradientReading, monitor: Monitor) -> str | None:
    """The weight with the first gradient that is not finite; the backward pass runs in reverse."""
    norms = zip(reversed(monitor.names), reversed(before.gradients), strict=True)
    return next((name for name, norm in norms if not math.isfinite(norm)), None)


def _non_finite(state: Mapping[str, Any], name: str) -> str | None:
    """The first tensor of a weight's optimizer state that is not finite, as ``exp_avg of NAME``."""
    tensors = {kind: local(value) for kind, value in state.items() if isinstance(value, Tensor)}
    broken = (kind for kind, value in tensors.items() if not bool(value.isfinite().all()))
    return next((f"{kind} of {name}" for kind in broken), None)


@torch.no_grad()
def with_poisoned_state(anomaly: Anomaly, monitor: Monitor) -> Anomaly:
    """An anomaly of the last step, with the optimizer state named that caused it, if any did."""
    if anomaly.tensor not in monitor.names:
        return anomaly
    state = poisoned_state(monitor, monitor.names.index(anomaly.tensor))
    if state is None:
        return anomaly
    message = f"{anomaly.message} (the optimizer's {state} is not sound)"
    return replace(anomaly, tensor=state, message=message)


def poisoned_state(monitor: Monitor, index: int) -> str | None:
    """The moment of Adam's that cannot be right for a weight.

    It is not finite, a negative mean of squares, or breaks |m| ≤ c·√v, which holds for any
    gradients (Cauchy and Schwarz; c from the decay rates).
    """
    weight, name = monitor.weights[index], monitor.names[index]
    state = monitor.optimizer.state.get(weight, {})
    if broken := _non_finite(state, name):
        return broken
    first, second = state.get("exp_avg"), state.get("exp_avg_sq")
    groups = monitor.optimizer.param_groups
    group = next((one for one in groups if any(p is weight for p in one["params"])), {})
    if not isinstance(first, Tensor) or not isinstance(second, Tensor) or "betas" not in group:
        return None
    m, v = float64(local(first)), float64(local(second))
    fast, slow = group["betas"]
    if bool((v < 0).any()):
        return f"exp_avg_sq of {name}"
    if not slow > fast * fast:
        return None
    # m = (1-a) Σ aⁱ g, v = (1-b) Σ bⁱ g²  ⇒  m² ≤ v · (1-a)² / (1-b) / (1 - a²/b)
    bound = (1 - fast) ** 2 / (1 - slow) / (1 - fast * fast / slow)
    breaks = bool((m * m > 1.01 * bound * v + 1e-30).any())
    return f"exp_avg or exp_avg_sq of {name}" if breaks else None
