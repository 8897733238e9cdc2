"""How a training of TRL's keeps to its time. Imports nothing of this project, for it runs in TRL's
environment."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

WARMUP = 0.05


@dataclass(frozen=True)
class Pace:
    """``seconds`` after which training ends (``None``: after its epochs), since ``began`` (Unix
    time) or, without that, of this process's processor time; ``before`` the first step so many are
    used."""

    seconds: float | None
    began: float | None
    before: float = 0.0

    def used(self) -> float:
        """Seconds that are over."""
        return time.process_time() if self.began is None else time.time() - self.began

    def over(self) -> bool:
        """Whether training ends now."""
        return self.seconds is not None and self.used() >= self.seconds

    def progress(self, step: int, steps: int) -> float:
        """The share of the training that is over: by the clock where it has a limit in seconds."""
        if self.seconds is None:
            return step / max(1, steps)
        return min(1.0, (self.used() - self.before) / max(1e-9, self.seconds - self.before))


def rate_factor(share: float) -> float:
    """The learning rate as a share of its peak: a linear rise, then half a cosine to zero."""
    if share < WARMUP:
        return max(share, 1e-3) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (share - WARMUP) / (1 - WARMUP)))
