"""Detectors: each judges one kind of value against its own past.

Every bound is far outside what a training that converges shows (docs/stability.md has the
measurements): a false alarm costs more than a step detected four steps later.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stability.clipping import Floats, MovingAverage, MovingAverages
from stability.measures.probe import ProbeReading
from stability.measures.tensors import local

# Signals, as logs name them. An older name of the probe text is the fixed text.
LOSS, LEARNING_RATE, NON_FINITE = "loss", "learning rate", "non-finite"
WEIGHT_NORM, UPDATE_RATIO = "weight norm", "update ratio"
INFORMATION, PROBE_LOSS = "output information", "loss on the fixed text"
PROBE_SIGNALS = (INFORMATION, PROBE_LOSS)


class Action(IntEnum):
    """What to do about a step, in order of severity."""

    PROCEED = 0
    SKIP = 1
    ROLLBACK = 2


@dataclass(frozen=True)
class Anomaly:
    """One thing that is wrong. ``suspects_data``: the batch may be the cause."""

    action: Action
    signal: str
    tensor: str | None
    value: float | None
    limit: float | None
    message: str
    suspects_data: bool = False


_skip, _rollback = partial(Anomaly, Action.SKIP), partial(Anomaly, Action.ROLLBACK)


class LossSpike:
    """A loss ``z`` deviations above the average; one deviation is at least ``floor`` × mean."""

    def __init__(self, z: float = 8.0, warm: int = 20, *, floor: float = 0.25) -> None:
        self.z, self.warm, self.floor = z, warm, floor
        self.average = MovingAverage()
        self.largest = 0.0
        self.recent: deque[float] = deque(maxlen=warm)

    def limit(self) -> float:
        """The bound; infinite while few losses are known, and where nearly all of them are 0."""
        mean = self.average.mean
        if self.average.count < self.warm or abs(mean) <= 1e-3 * self.largest:
            return math.inf
        return mean + self.z * max(self.average.deviation, self.floor * abs(mean), 1e-6)

    def usual(self) -> tuple[float, float]:
        """Median of the newest losses, and the bound of an outlier: three deviations above it.

        A deviation is at least a twentieth of the median. It is robust: the median distance from
        the median, which is 0.6745 deviations of a normal distribution.
        """
        if len(self.recent) < self.warm:
            return math.nan, math.inf
        median = statistics.median(self.recent)
        deviation = statistics.median(abs(loss - median) for loss in self.recent) / 0.6745
        return median, median + 3.0 * max(deviation, 0.05 * abs(median))

    def judge(self, loss: float) -> Anomaly | None:
        limit = self.limit()
        if loss <= limit:
            return None
        message = f"the loss is {loss:.3g}, and {self.average.mean:.3g} on average before"
        return _skip(LOSS, None, loss, limit, message, suspects_data=True)

    def update(self, loss: float) -> None:
        """Average the loss of a step in, cut to the limit: one outlier sets no new level."""
        self.average.add(min(loss, self.limit()))
        self.recent.append(loss)
        self.largest = max(self.largest, abs(loss))

    def reset(self) -> None:
        """Accept the present level: learn the average anew."""
        self.average, self.largest = MovingAverage(), 0.0
        self.recent.clear()

    def state_dict(self) -> dict[str, Any]:
        average, recent = asdict(self.average), list(self.recent)
        return {"average": average, "largest": self.largest, "recent": recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.largest = float(state["largest"])
        # Older checkpoints have the average flat, and no losses.
        flat = {key: value for key, value in state.items() if key not in ("largest", "recent")}
        self.average = MovingAverage(**state.get("average", flat))
        self.recent.clear()
        self.recent.extend(map(float, state.get("recent", ())))


class LearningRateJump:
    """A learning rate ten times as large as any before."""

    FACTOR, WARM = 10.0, 10

    def __init__(self) -> None:
        self.largest: list[float] = []
        self.count = 0

    def judge(self, rates: Sequence[float], planned: Sequence[float] | None) -> Anomaly | None:
        """Judge the rate of every parameter group; a rate ``planned`` by the schedule is right."""
        if self.count < self.WARM or len(self.largest) != len(rates):
            return None
        for group, (rate, largest) in enumerate(zip(rates, self.largest, strict=True)):
            if planned is not None and rate == planned[group]:
                continue
            limit = self.FACTOR * largest
            if largest > 0 and not rate <= limit:
                value = f"is {rate:.3g}, and was {largest:.3g} at most before"
                message = f"the learning rate of parameter group {group} {value}"
                return _skip(LEARNING_RATE, f"group {group}", rate, limit, message)
        return None

    def update(self, rates: Sequence[float]) -> None:
        if len(self.largest) != len(rates):
            self.largest, self.count = list(rates), 0
        self.largest = [max(pair) for pair in zip(self.largest, rates, strict=True)]
        self.count += 1


class WeightJump:
    """A weight whose norm changed by more than the optimizer's steps account for.

    A step changes a norm by no more than its own size. The bound is four times the sum of the
    sampled updates since the last reading, plus 10 %; a flipped exponent bit or a zeroed layer is
    far beyond it.
    """

    SHARE, FLOOR = 4.0, 0.1

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.reset()

    def reset(self) -> None:
        """Forget all norms: something else than the optimizer has changed the weights."""
        self.known: list[float | None] = [None] * len(self.names)
        self.allowed = [0.0] * len(self.names)

    def judge(self, norms: dict[int, float]) -> Anomaly | None:
        """Judge the norms of some weights, by index, and remember them if all are sound."""
        worst: tuple[float, Anomaly] | None = None
        for index, norm in norms.items():
            before = self.known[index]
            if (anomaly := self._judge(index, norm)) is not None:
                distance = math.inf if not norm > 0 or not before else abs(math.log(norm / before))
                if worst is None or distance > worst[0] or not math.isfinite(norm):
                    worst = (distance if math.isfinite(norm) else math.inf, anomaly)
        if worst is not None:
            return worst[1]
        for index, norm in norms.items():
            self.known[index], self.allowed[index] = norm, 0.0
        return None

    def _judge(self, index: int, norm: float) -> Anomaly | None:
        name, before = self.names[index], self.known[index]
        if not math.isfinite(norm):
            message = f"the weight {name} is not finite"
            return _rollback(WEIGHT_NORM, name, norm, None, message)
        if not before:  # unknown, or zeros, from which every step is a jump
            return None
        bound = self.SHARE * self.allowed[index] + self.FLOOR
        low, high = before * math.exp(-bound), before * math.exp(min(bound, 50.0))
        if low <= norm <= high:
            return None
        limit = high if norm > high else low
        change = f"the norm of the weight {name} went from {before:.3g} to {norm:.3g}"
        message = f"{change}, more than the optimizer's steps account for"
        return _rollback(WEIGHT_NORM, name, norm, limit, message)

    def update(self, ratios: Sequence[float]) -> None:
        self.allowed = [total + ratio for total, ratio in zip(self.allowed, ratios, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return {"known": list(self.known), "allowed": list(self.allowed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["known"]) != len(self.names) or len(state["allowed"]) != len(self.names):
            raise ValueError(f"{len(state['known'])} weights were watched, not {len(self.names)}")
        self.known, self.allowed = list(state["known"]), list(state["allowed"])


class UpdateJump:
    """A step larger than its weight and ten times the usual one, or none despite a gradient.

    Poisoned optimizer state causes either. Weights of few elements (biases, scalars) are not
    judged: they may pass through zero, where every step is large. A standstill is judged only where
    steps were steady, and larger than the rounding of the weight's type.
    """

    WHOLE, FACTOR, WARM, FEWEST = 1.0, 10.0, 20, 64
    STILL, STILL_STEPS, GRADIENT, STEADY = 0.01, 3, 0.1, 0.5

    def __init__(self, names: Sequence[str], weights: Sequence[Tensor]) -> None:
        number = len(names)
        self.names = names
        self.judged = np.array([local(one).numel() >= self.FEWEST for one in weights], dtype=bool)
        self.rounding = np.array([torch.finfo(one.dtype).eps for one in weights])
        self.ratios, self.gradients = MovingAverages(number), MovingAverages(number)
        self.relative = MovingAverages(number)  # ratio / learning rate, whatever the schedule
        self.still = np.zeros(number, dtype=np.int64)

    def judge(
        self, ratios: Sequence[float], gradients: Sequence[float], *, rates: Sequence[float]
    ) -> Anomaly | None:
        """Judge the last step, and average a sound one in. ``rates``: learning rate by weight."""
        values = np.array(ratios)
        broken = np.flatnonzero(~np.isfinite(values))
        if len(broken):
            name, value = self.names[broken[0]], float(values[broken[0]])
            message = f"the step made the weight {name} not finite"
            return _rollback(UPDATE_RATIO, name, value, None, message)
        pulls, steps = np.array(gradients), np.array(rates)
        return self._judge_jump(values) or self._judge_still(values, pulls, rates=steps)

    def _judge_jump(self, ratios: Floats) -> Anomaly | None:
        known = self.judged & (self.ratios.count >= self.WARM)
        limits = np.where(known, np.maximum(self.WHOLE, self.FACTOR * self.ratios.mean), np.inf)
        over = ratios / limits
        if not len(over) or over.max() <= 1:
            return None
        index = int(over.argmax())
        name, ratio, usual = self.names[index], float(ratios[index]), self.ratios.mean[index]
        change = f"the step changed the weight {name} by {ratio:.3g} of its size"
        message = f"{change}; {usual:.3g} is usual"
        return _rollback(UPDATE_RATIO, name, ratio, float(limits[index]), message)

    def _judge_still(self, ratios: Floats, gradients: Floats, *, rates: Floats) -> Anomaly | None:
        usual, moves = self.relative.mean, rates > 0
        limits = self.STILL * usual * rates
        steady = self.relative.deviation < self.STEADY * usual
        known = self.judged & moves & steady & (self.relative.count >= self.WARM)
        pulled = (self.gradients.mean > 0) & (gradients > self.GRADIENT * self.gradients.mean)
        frozen = known & pulled & (limits > self.rounding) & (ratios < limits)
        self.still = np.where(frozen, self.still + 1, 0)
        if len(self.still) and self.still.max() >= self.STILL_STEPS:
            index = int(self.still.argmax())
            name, ratio = self.names[index], float(ratios[index])
            change = f"a step changes the weight {name} by only {ratio:.1e} of its size"
            message = f"{change}, in spite of its gradient"
            return _rollback(UPDATE_RATIO, name, ratio, float(limits[index]), message)
        self.ratios.add(ratios, ~frozen)
        self.gradients.add(gradients, ~frozen)
        self.relative.add(ratios / np.where(moves, rates, 1.0), moves & ~frozen)
        return None

    def _averages(self) -> dict[str, MovingAverages]:
        return {"ratios": self.ratios, "relative": self.relative, "gradients": self.gradients}

    def state_dict(self) -> dict[str, Any]:
        averages = {name: one.state_dict() for name, one in self._averages().items()}
        return {**averages, "still": self.still.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, one in self._averages().items():
            one.load_state_dict(state[name])
        self.still = np.array(state["still"], dtype=np.int64)


class Collapse:
    """Output on the probe text that loses its information, or a loss there that trebles.

    Information below ``SHARE`` of its maximum is a collapse, above ``FINE`` of it fine. Up to
    ``LEAST`` nats there is nothing to lose.
    """

    SHARE, FINE, LEAST, WORSE = 0.4, 0.8, 0.3, 3.0

    def __init__(self) -> None:
        self.most = 0.0
        self.loss: float | None = None  # of the newest sound reading

    def judge(self, reading: ProbeReading) -> Anomaly | None:
        information, loss = reading.information, reading.loss
        if not math.isfinite(information):
            message = "the model's output on the probe text is not finite"
            return _rollback(INFORMATION, None, information, None, message)
        limit = self.SHARE * self.most
        if self.most > self.LEAST and information < limit:
            change = f"has {information:.3g} nats of information, and had {self.most:.3g}"
            message = f"the output on the probe text {change}: it collapses to a constant"
            return _rollback(INFORMATION, None, information, limit, message, suspects_data=True)
        if loss is not None and self.loss is not None:
            limit = self.WORSE * max(self.loss, 0.1)
            if not loss <= limit:
                message = f"the loss on the probe text is {loss:.3g}, and was {self.loss:.3g}"
                return _rollback(PROBE_LOSS, None, loss, limit, message, suspects_data=True)
        self.most = max(self.most, information)
        self.loss = loss if loss is not None and math.isfinite(loss) else self.loss
        return None

    def is_fine(self, information: float | None) -> bool:
        """Whether a state with this information is good enough to roll back to."""
        if information is None or self.most <= self.LEAST:
            return True
        return information >= self.FINE * self.most
