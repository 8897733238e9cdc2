"""Adaptive gradient clipping: a fixed limit, and one that follows the norms of the steps before."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass
class MovingAverage:
    """Exponential moving average and variance of a figure; early values count as much as if there had been no zero
    before them (as in Adam: Kingma & Ba 2015)."""

    decay: float = 0.97
    count: int = 0
    first: float = 0.0
    second: float = 0.0

    def add(self, value: float) -> None:
        """Take one more value in."""
        self.count += 1
        self.first = self.decay * self.first + (1 - self.decay) * value
        self.second = self.decay * self.second + (1 - self.decay) * value * value

    @property
    def mean(self) -> float:
        """The average so far; 0 before there is any value."""
        return self.first / (1 - self.decay**self.count) if self.count else 0.0

    @property
    def deviation(self) -> float:
        """Standard deviation around it."""
        if not self.count:
            return 0.0
        return math.sqrt(max(0.0, self.second / (1 - self.decay**self.count) - self.mean**2))


class MovingAverages:
    """``MovingAverage`` of N figures at once; each counts its own values."""

    def __init__(self, number: int, decay: float = 0.9) -> None:
        self.decay = decay
        self.count, self.first, self.second = (np.zeros(number) for _ in range(3))

    def add(self, values: Floats, where: Bools) -> None:
        """Take in those of ``values [N]`` that are chosen by ``where [N]``."""
        self.count[where] += 1
        for sums, powers in ((self.first, values), (self.second, values * values)):
            sums[where] = self.decay * sums[where] + (1 - self.decay) * powers[where]

    @property
    def mean(self) -> Floats:
        """``[N]``; 0 where there is no value yet."""
        found: Floats = self.first / self._weight
        return found

    @property
    def deviation(self) -> Floats:
        """Standard deviation, ``[N]``."""
        found: Floats = np.sqrt(np.maximum(0.0, self.second / self._weight - self.mean**2))
        return found

    @property
    def _weight(self) -> Floats:
        found: Floats = np.where(self.count > 0, 1 - self.decay**self.count, 1.0)
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        return {"count": self.count.tolist(), "first": self.first.tolist(), "second": self.second.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``.

        Raises:
            KeyError, TypeError, ValueError: this is no such state, or one of another number of figures.
        """
        found = [np.array(state[name], dtype=np.float64) for name in ("count", "first", "second")]
        if any(values.shape != self.count.shape for values in found):
            raise ValueError(f"{len(state['count'])} weights were watched, not {len(self.count)}")
        self.count, self.first, self.second = found


class AdaptiveClip:
    """The largest gradient norm that a step may have.

    ``max_norm`` always, and from ``warm`` steps on, where that is less, ``z`` standard deviations above the moving
    average of past norms, both in logarithms: norms vary by factors. The deviation counts as at least ``floor``, so
    that steady norms do not make every small rise an outlier. Only norms of steps that were taken, cut to the limit,
    are averaged: outliers do not raise what the next are allowed.
    """

    def __init__(self, max_norm: float, z: float = 5.0, warm: int = 20, floor: float = 0.25) -> None:
        self.max_norm, self.z, self.warm, self.floor = max_norm, z, warm, floor
        self.average = MovingAverage()

    def score(self, norm: float) -> float:
        """How many standard deviations ``norm`` lies above the average of past norms; 0 while too few are known."""
        if self.average.count < self.warm or norm <= 0:
            return 0.0
        return (math.log(norm) - self.average.mean) / max(self.average.deviation, self.floor)

    def limit(self) -> float:
        """What the next step's norm is cut to."""
        if self.average.count < self.warm:
            return self.max_norm
        most = self.average.mean + self.z * max(self.average.deviation, self.floor)
        return min(self.max_norm, math.exp(min(most, 700.0)))

    def took(self, norm: float) -> None:
        """A step with this norm before clipping was taken."""
        if norm > 0:
            known = self.average.count >= self.warm
            most = self.average.mean + self.z * max(self.average.deviation, self.floor)
            self.average.add(min(math.log(norm), most) if known else math.log(norm))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        return asdict(self.average)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self.average = MovingAverage(**state)
