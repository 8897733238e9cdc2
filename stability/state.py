"""What a guard knows of its training, and the part of it that a checkpoint keeps."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from stability.clipping import AdaptiveClip
from stability.detectors import Collapse, LearningRateJump, LossSpike, UpdateJump, WeightJump
from stability.events import Event
from stability.measures.monitor import Monitor
from stability.measures.probe import ProbeReading

NEARBY = 50  # steps after an alarm in which another one has the same cause


@dataclass
class GuardState:
    """Detectors, counters and suspects.

    ``attempts``: rollbacks since the first of the last alarms that were near each other;
    ``rate_scale``: of the learning rate since the rollback to ``rate_from``. Batches are watched
    through step ``watch_until``, with ``reference`` the lowest probe loss. ``suspects``: anomalies
    by the step of the batch; ``quarantined``: steps whose batch is replaced.
    """

    monitor: Monitor
    clips: dict[str, AdaptiveClip]
    weights: WeightJump
    updates: UpdateJump
    loss: LossSpike = field(default_factory=LossSpike)
    rates: LearningRateJump = field(default_factory=LearningRateJump)
    collapse: Collapse = field(default_factory=Collapse)
    steps: int = 0
    newest: Event | None = None
    reading: ProbeReading | None = None  # not judged yet; not kept
    read_at: int = -1  # step of the newest reading; not kept
    information: float | None = None  # of the newest reading
    fine_at: int = 0  # step of the newest fine reading
    skipped_in_row: int = 0
    skipped: deque[int] = field(default_factory=deque)  # steps of late
    attempts: int = 0
    last_alarm: int = -NEARBY
    rate_scale: float = 1.0
    rate_from: int = 0
    watch_until: int = -1
    watch_rollbacks: int = 0
    reference: float | None = None
    suspects: Counter[int] = field(default_factory=Counter)
    quarantined: set[int] = field(default_factory=set)

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON takes it; the keys are older than the names of the fields."""
        newest = self.newest
        return {
            "steps": self.steps,
            "loss": self.loss.state_dict(),
            "clips": {name: clip.state_dict() for name, clip in self.clips.items()},
            "rates": [self.rates.count, self.rates.largest],
            "updates": self.updates.state_dict(),
            # Of sharded weights, each process knows the norm of its own part.
            "weights": None if self.monitor.sharded else self.weights.state_dict(),
            "fixed_text": [self.collapse.most, self.collapse.loss],
            "information": self.information,
            "fine_at": self.fine_at,
            "turn": self.monitor.readings,
            "skipped": [self.skipped_in_row, *self.skipped],
            "tries": [self.attempts, self.last_alarm],
            "lowered": [self.rate_scale, self.rate_from],
            "careful": [self.watch_until, self.watch_rollbacks, self.reference],
            "blamed": sorted(self.suspects.items()),
            "set_aside": sorted(self.quarantined),
            "newest": newest and [newest.step, newest.action, newest.signal, newest.message],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self.steps = int(state["steps"])
        self.loss.load_state_dict(state["loss"])
        for name, clip in self.clips.items():
            clip.load_state_dict(state["clips"][name])
        self.rates.count, self.rates.largest = state["rates"]
        self.updates.load_state_dict(state["updates"])
        if state["weights"] is not None and not self.monitor.sharded:
            self.weights.load_state_dict(state["weights"])
        self.collapse.most, self.collapse.loss = state["fixed_text"]
        self.information, self.fine_at = state["information"], int(state["fine_at"])
        self.monitor.readings = int(state["turn"])
        self.monitor.reset()
        self.skipped_in_row, *skipped = map(int, state["skipped"])
        self.skipped = deque(skipped)
        self.attempts, self.last_alarm = map(int, state["tries"])
        self.rate_scale, self.rate_from = float(state["lowered"][0]), int(state["lowered"][1])
        self.watch_until, self.watch_rollbacks, self.reference = state["careful"]
        self.suspects = Counter({int(step): int(count) for step, count in state["blamed"]})
        self.quarantined = set(map(int, state["set_aside"]))
        self.newest = Event(*state["newest"]) if state.get("newest") else None

    def weights_changed(self) -> None:
        """Forget the weights: something else than the optimizer's step has changed them."""
        self.weights.reset()
        self.monitor.reset()
