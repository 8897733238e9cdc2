"""What counts as trouble: each detector judges one kind of figure against what that figure has been so far.

Every bound is far outside what a training that converges shows (docs/stability.md has the measurements): a false alarm
costs more than a step found out four steps later.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stability.clipping import Floats, MovingAverage, MovingAverages
from stability.measures.monitor import TURNS
from stability.measures.probe import ProbeReading
from stability.measures.step import local

LOSS, LEARNING_RATE, NON_FINITE = "loss", "learning rate", "non-finite"
INFORMATION = "output information"
FIXED_TEXT_LOSS = "loss on the fixed text"
FIXED_TEXT = (INFORMATION, FIXED_TEXT_LOSS)


class Action(IntEnum):
    """What to do about a step, the more severe the larger."""

    PROCEED = 0
    SKIP = 1
    ROLLBACK = 2


@dataclass(frozen=True)
class Trouble:
    """One thing that is wrong. ``blames_data``: the batch may be the cause."""

    action: Action
    signal: str
    tensor: str | None
    value: float | None
    limit: float | None
    words: str
    blames_data: bool = False


class LossSpike:
    """A loss far above the ones before: more than ``z`` deviations, which count as a quarter of the mean at least."""

    def __init__(self, z: float = 8.0, warm: int = 20, floor: float = 0.25) -> None:
        self.z, self.warm, self.floor = z, warm, floor
        self.average = MovingAverage()
        self.largest = 0.0
        self.recent: deque[float] = deque(maxlen=warm)

    def limit(self) -> float:
        """The largest loss that is none; infinite while too few are known, and where losses are nearly all 0."""
        mean = self.average.mean
        if self.average.count < self.warm or abs(mean) <= 1e-3 * self.largest:
            return math.inf
        return mean + self.z * max(self.average.deviation, self.floor * abs(mean), 1e-6)

    def usual(self) -> tuple[float, float]:
        """The median of the newest losses, and the largest that is still like them: three deviations higher.

        A deviation is at least a twentieth of the median, and robust: found from the median of the distances from the
        median, which is 0.6745 deviations of a normal distribution.
        """
        if len(self.recent) < self.warm:
            return math.nan, math.inf
        middle = statistics.median(self.recent)
        deviation = statistics.median(abs(loss - middle) for loss in self.recent) / 0.6745
        return middle, middle + 3.0 * max(deviation, 0.05 * abs(middle))

    def judge(self, loss: float) -> Trouble | None:
        """Whether this loss is a spike; one that is not is averaged in with ``took``."""
        limit = self.limit()
        if loss <= limit:
            return None
        words = f"the loss is {loss:.3g}, and {self.average.mean:.3g} on average before"
        return Trouble(Action.SKIP, LOSS, None, loss, limit, words, blames_data=True)

    def took(self, loss: float) -> None:
        """A step with this loss was taken. It counts as the limit at most: one odd batch is no new normal."""
        self.average.add(min(loss, self.limit()))
        self.recent.append(loss)
        self.largest = max(self.largest, abs(loss))

    def forget(self) -> None:
        """What is seen now is the new normal."""
        self.average, self.largest = MovingAverage(), 0.0
        self.recent.clear()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        return {"average": asdict(self.average), "largest": self.largest, "recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self.largest = float(state["largest"])
        old = {name: value for name, value in state.items() if name not in ("largest", "recent")}
        self.average = MovingAverage(**state.get("average", old))  # checkpoints of before had it flat
        self.recent.clear()
        self.recent.extend(map(float, state.get("recent", ())))


class RateLeap:
    """A learning rate ten times as large as any before."""

    FACTOR, WARM = 10.0, 10

    def __init__(self) -> None:
        self.largest: list[float] = []
        self.count = 0

    def judge(self, rates: Sequence[float], planned: Sequence[float] | None) -> Trouble | None:
        """Judge the rate of every parameter group; one that is as the schedule ``planned`` it is right."""
        if self.count < self.WARM or len(self.largest) != len(rates):
            return None
        for place, (rate, most) in enumerate(zip(rates, self.largest, strict=True)):
            if planned is not None and rate == planned[place]:
                continue
            if most > 0 and not rate <= self.FACTOR * most:
                words = f"the learning rate of parameter group {place} is {rate:.3g}, and was {most:.3g} at most before"
                return Trouble(Action.SKIP, LEARNING_RATE, f"group {place}", rate, self.FACTOR * most, words)
        return None

    def took(self, rates: Sequence[float]) -> None:
        """A step with these rates was taken."""
        if len(self.largest) != len(rates):
            self.largest, self.count = list(rates), 0
        self.largest = [max(pair) for pair in zip(self.largest, rates, strict=True)]
        self.count += 1


class WeightLeap:
    """A weight whose norm has changed by more than the optimizer's steps account for.

    A norm cannot change by more than the step it takes. What the sampled updates since the last look add up to is
    allowed four times, and 10 % beside it; a bit that flips in an exponent, or a layer that is zeroed, is far beyond.
    """

    SHARE, FLOOR = 4.0, 0.1

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.known: list[float | None] = [None] * len(names)
        self.allowed = [0.0] * len(names)

    def judge(self, norms: dict[int, float]) -> Trouble | None:
        """Judge the norms of some weights, by place; those that are fine are remembered."""
        worst: tuple[float, Trouble] | None = None
        for place, norm in norms.items():
            before = self.known[place]
            if (trouble := self._judge(place, before, norm)) is not None:
                far = math.inf if not norm > 0 or not before else abs(math.log(norm / before))
                if worst is None or far > worst[0] or not math.isfinite(norm):
                    worst = (math.inf if not math.isfinite(norm) else far, trouble)
        if worst is not None:
            return worst[1]
        for place, norm in norms.items():
            self.known[place], self.allowed[place] = norm, 0.0
        return None

    def _judge(self, place: int, before: float | None, norm: float) -> Trouble | None:
        name = self.names[place]
        if not math.isfinite(norm):
            words = f"the weight {name} is not finite"
            return Trouble(Action.ROLLBACK, "weight norm", name, norm, None, words)
        if not before:  # not seen yet, or still as zeros, from where any step is a leap
            return None
        bound = self.SHARE * self.allowed[place] + self.FLOOR
        low, high = before * math.exp(-bound), before * math.exp(min(bound, 50.0))
        if low <= norm <= high:
            return None
        words = (
            f"the norm of the weight {name} went from {before:.3g} to {norm:.3g}, more than the optimizer's steps "
            "account for"
        )
        return Trouble(Action.ROLLBACK, "weight norm", name, norm, high if norm > high else low, words)

    def took(self, ratios: Sequence[float]) -> None:
        """A step with these update-to-weight ratios was taken."""
        self.allowed = [total + ratio for total, ratio in zip(self.allowed, ratios, strict=True)]

    def forget(self) -> None:
        """The weights were put back: nothing is known of their norms."""
        self.known = [None] * len(self.names)
        self.allowed = [0.0] * len(self.names)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        return {"known": list(self.known), "allowed": list(self.allowed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``.

        Raises:
            KeyError, TypeError, ValueError: this is no such state, or one of another number of weights.
        """
        if len(state["known"]) != len(self.names) or len(state["allowed"]) != len(self.names):
            raise ValueError(f"{len(state['known'])} weights were watched, not {len(self.names)}")
        self.known, self.allowed = list(state["known"]), list(state["allowed"])


class UpdateLeap:
    """A step larger than the weight it changes and ten times what such steps were; or none any more where there were
    some, though the gradient is as it was: poisoned optimizer state does the one or the other.

    Weights of few elements (biases, scalars) may pass through zero, where any step is large: they are not judged.
    Standing still is judged only where steps were steady, and larger than what the weight's type rounds away.
    """

    WHOLE, FACTOR, WARM, FEWEST = 1.0, 10.0, 20, 64
    STILL, STILL_STEPS, GRADIENT, STEADY = 0.01, 3, 0.1, 0.5

    def __init__(self, names: Sequence[str], weights: Sequence[Tensor]) -> None:
        number = len(names)
        self.names = names
        self.judged = np.array([local(one).numel() >= self.FEWEST for one in weights], dtype=bool)
        self.rounding = np.array([torch.finfo(one.dtype).eps for one in weights])
        self.ratios, self.gradients = MovingAverages(number), MovingAverages(number)
        self.relative = MovingAverages(number)  # ratio / learning rate, which no schedule moves
        self.still = np.zeros(number, dtype=np.int64)

    def judge(
        self, ratios: Sequence[float], gradients: Sequence[float], rates: Sequence[float]
    ) -> Trouble | None:
        """Judge the step just taken; if it is fine, it is averaged in. ``rates``: the learning rate of each weight."""
        found, pull, rate = np.array(ratios), np.array(gradients), np.array(rates)
        broken = np.flatnonzero(~np.isfinite(found))
        if len(broken):
            name, value = self.names[broken[0]], float(found[broken[0]])
            words = f"the step made the weight {name} not finite"
            return Trouble(Action.ROLLBACK, "update ratio", name, value, None, words)
        return self._leaps(found) or self._stands_still(found, pull, rate)

    def _leaps(self, ratios: Floats) -> Trouble | None:
        known = self.judged & (self.ratios.count >= self.WARM)
        limits = np.where(known, np.maximum(self.WHOLE, self.FACTOR * self.ratios.mean), np.inf)
        over = ratios / limits
        if not len(over) or over.max() <= 1:
            return None
        place = int(over.argmax())
        name, ratio, limit = self.names[place], float(ratios[place]), float(limits[place])
        usual = float(self.ratios.mean[place])
        words = f"the step changed the weight {name} by {ratio:.3g} of its size; {usual:.3g} is usual"
        return Trouble(Action.ROLLBACK, "update ratio", name, ratio, limit, words)

    def _stands_still(self, ratios: Floats, gradients: Floats, rates: Floats) -> Trouble | None:
        usual, moves = self.relative.mean, rates > 0
        limits = self.STILL * usual * rates
        steady = self.relative.deviation < self.STEADY * usual
        known = self.judged & moves & steady & (self.relative.count >= self.WARM) & (limits > self.rounding)
        pulled = (self.gradients.mean > 0) & (gradients > self.GRADIENT * self.gradients.mean)
        frozen = known & pulled & (ratios < limits)
        self.still = np.where(frozen, self.still + 1, 0)
        if len(self.still) and self.still.max() >= self.STILL_STEPS:
            place = int(self.still.argmax())
            name, ratio = self.names[place], float(ratios[place])
            words = (
                f"a step changes the weight {name} by {ratio:.1e} of its size only, in spite of its gradient"
            )
            return Trouble(Action.ROLLBACK, "update ratio", name, ratio, float(limits[place]), words)
        self.ratios.add(ratios, ~frozen)
        self.gradients.add(gradients, ~frozen)
        self.relative.add(ratios / np.where(moves, rates, 1.0), moves & ~frozen)
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        kinds = {"ratios": self.ratios, "relative": self.relative, "gradients": self.gradients}
        return {name: one.state_dict() for name, one in kinds.items()} | {"still": self.still.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``.

        Raises:
            KeyError, TypeError, ValueError: this is no such state, or one of another number of weights.
        """
        for name, one in (
            ("ratios", self.ratios),
            ("relative", self.relative),
            ("gradients", self.gradients),
        ):
            one.load_state_dict(state[name])
        self.still = np.array(state["still"], dtype=np.int64)


class Collapse:
    """Output on the fixed text that says less and less about its input (below ``SHARE`` of the most it ever said), or a
    loss there that is ``WORSE`` times the one before."""

    SHARE, FINE, LEAST, WORSE = 0.4, 0.8, 0.3, 3.0

    def __init__(self) -> None:
        self.most = 0.0
        self.loss: float | None = None  # of the newest reading that was fine

    def judge(self, reading: ProbeReading) -> Trouble | None:
        """Judge a reading; up to 0.3 nats of information there is nothing to lose."""
        information, loss = reading.information, reading.loss
        if not math.isfinite(information):
            words = "the model's output on the fixed text is not finite"
            return Trouble(Action.ROLLBACK, INFORMATION, None, information, None, words)
        limit = self.SHARE * self.most
        if self.most > self.LEAST and information < limit:
            words = (
                f"the output on the fixed text says {information:.3g} nats about its place, and said {self.most:.3g}: "
                "the model is collapsing to a constant"
            )
            return Trouble(Action.ROLLBACK, INFORMATION, None, information, limit, words, blames_data=True)
        if (
            loss is not None
            and self.loss is not None
            and not loss <= (most := self.WORSE * max(self.loss, 0.1))
        ):
            words = f"the loss on the fixed text is {loss:.3g}, and was {self.loss:.3g}"
            return Trouble(Action.ROLLBACK, FIXED_TEXT_LOSS, None, loss, most, words, blames_data=True)
        self.most = max(self.most, information)
        self.loss = loss if loss is not None and math.isfinite(loss) else self.loss
        return None

    def is_fine(self, information: float | None) -> bool:
        """Whether a state with this information is one to go back to."""
        return information is None or self.most <= self.LEAST or information >= self.FINE * self.most


assert TURNS <= 5  # a weight's norm is seen soon enough to be found within five steps
