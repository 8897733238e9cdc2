"""What a guard is told, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from stability.detectors import Action, Trouble


@dataclass(frozen=True)
class GuardSettings:
    """``max_norm``: of the gradient, always (none unless it is given); ``z_clip``: how many deviations above past norms
    it is cut besides.

    ``snapshot_every`` steps a state is kept in memory, the newest ``snapshots`` of them. ``rollbacks``: how often in a
    row it goes back before it gives up; each time the learning rate is multiplied by ``lower``, is reached again over
    ``rewarm`` steps and comes back over ``recover`` steps. ``probe_every``: steps between looks at the fixed text.
    """

    max_norm: float = math.inf
    z_clip: float = 5.0
    snapshot_every: int = 25
    snapshots: int = 3
    rollbacks: int = 3
    lower: float = 0.5
    rewarm: int = 10
    recover: int = 50
    probe_every: int = 25

    def __post_init__(self) -> None:
        """See that counts are ones.

        Raises:
            ValueError: names the setting that is too small.
        """
        for name in ("snapshot_every", "snapshots", "rollbacks", "recover", "probe_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class Limit:
    """A figure of the caller's that must not exceed ``at_most``; ``where`` says which tensor it is worst in."""

    name: str
    at_most: float
    where: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Event:
    """What the guard did, as the log has it. ``batch``: the caller's names for what was in the batch."""

    step: int
    action: str
    signal: str
    words: str
    tensor: str | None = None
    value: float | None = None
    limit: float | None = None
    to_step: int | None = None
    batch: list[int] | None = None


@dataclass(frozen=True)
class Verdict:
    """What became of a step. ``action``: what was done about it; ``totals``: gradient norms of the clip groups before
    clipping; ``limits``: what they were cut to; ``update_ratio``: the largest of any weight."""

    action: Action
    totals: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    update_ratio: float = 0.0
    learning_rate: float = 0.0
    event: Event | None = None


class GaveUp(RuntimeError):
    """Training cannot go on; the model is as it was in its last good state. ``event`` says why."""

    def __init__(self, event: Event) -> None:
        super().__init__(event.words)
        self.event = event


def event_of(
    step: int,
    action: str,
    trouble: Trouble,
    words: str,
    *,
    to_step: int | None = None,
    batch: list[int] | None = None,
) -> Event:
    """What is logged of trouble and what was done about it."""
    return Event(
        step, action, trouble.signal, words, trouble.tensor, trouble.value, trouble.limit, to_step, batch
    )
