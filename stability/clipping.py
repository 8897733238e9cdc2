"""Adaptive gradient clipping: a fixed limit, and one that follows the norms of past steps."""

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
    """Exponential moving average and variance, with Adam's bias correction (Kingma & Ba 2015)."""

    decay: float = 0.97
    count: int = 0
    first: float = 0.0
    second: float = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.first = self.decay * self.first + (1 - self.decay) * value
        self.second = self.decay * self.second + (1 - self.decay) * value * value

    @property
    def mean(self) -> float:
        """The average; 0 before the first value."""
        return self.first / (1 - self.decay**self.count) if self.count else 0.0

    @property
    def deviation(self) -> float:
        if not self.count:
            return 0.0
        return math.sqrt(max(0.0, self.second / (1 - self.decay**self.count) - self.mean**2))


class MovingAverages:
    """N moving averages at once; each counts its own values."""

    def __init__(self, number: int, decay: float = 0.9) -> None:
        self.decay = decay
        self.count, self.first, self.second = (np.zeros(number) for _ in range(3))

    def add(self, values: Floats, where: Bools) -> None:
        """Average those of ``values [N]`` in that ``where [N]`` selects."""
        self.count[where] += 1
        for sums, powers in ((self.first, values), (self.second, values * values)):
            sums[where] = self.decay * sums[where] + (1 - self.decay) * powers[where]

    @property
    def mean(self) -> Floats:
        """The averages ``[N]``; 0 before the first value."""
        return self.first / self._correction

    @property
    def deviation(self) -> Floats:
        """The standard deviations ``[N]``."""
        variances = self.second / self._correction - self.mean**2
        return np.sqrt(np.maximum(0.0, variances))

    @property
    def _correction(self) -> Floats:
        return np.where(self.count > 0, 1 - self.decay**self.count, 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).tolist() for name in ("count", "first", "second")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        arrays = [np.array(state[name], dtype=np.float64) for name in ("count", "first", "second")]
        if any(values.shape != self.count.shape for values in arrays):
            raise ValueError(f"{len(state['count'])} weights were watched, not {len(self.count)}")
        self.count, self.first, self.second = arrays


class AdaptiveClip:
    """The largest gradient norm that a step may have.

    ``max_norm``, and after ``warm`` steps also ``z`` deviations above the moving average of past
    norms, both in logarithms: norms vary by factors. A deviation counts as at least ``floor``, so
    that steady norms do not make every small rise an outlier. Norms are averaged only after a sound
    step and cut to the limit: outliers do not raise it.
    """

    def __init__(
        self, max_norm: float, z: float = 5.0, *, warm: int = 20, floor: float = 0.25
    ) -> None:
        self.max_norm, self.z, self.warm, self.floor = max_norm, z, warm, floor
        self.average = MovingAverage()

    def score(self, norm: float) -> float:
        """Deviations of ``norm`` above the average; 0 while few norms are known."""
        if self.average.count < self.warm or norm <= 0:
            return 0.0
        return (math.log(norm) - self.average.mean) / max(self.average.deviation, self.floor)

    def limit(self) -> float:
        if self.average.count < self.warm:
            return self.max_norm
        return min(self.max_norm, math.exp(min(self._bound(), 700.0)))

    def _bound(self) -> float:
        return self.average.mean + self.z * max(self.average.deviation, self.floor)

    def update(self, norm: float) -> None:
        """Average the norm of a sound step in, as it was before clipping."""
        if norm > 0:
            known = self.average.count >= self.warm
            self.average.add(min(math.log(norm), self._bound()) if known else math.log(norm))

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.average)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = MovingAverage(**state)
