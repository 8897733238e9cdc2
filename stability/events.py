"""The guard's settings, what its caller adds, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stability.detectors import Action
from stability.measures.probe import Probe, ProbeReading
from stability.snapshots import Extra


@dataclass(frozen=True)
class GuardSettings:
    """Bounds of the clipping, and how often the guard looks and acts.

    ``max_norm``: limit of gradient norms; ``z_clip``: deviations above past norms at which they
    are clipped too. ``snapshot_every``: steps between snapshots, of which the newest ``snapshots``
    stay in memory. ``rollbacks``: in a row, before the guard gives up; each multiplies the learning
    rate by ``lower``, reached over ``rewarm`` steps, which rises to its schedule over ``recover``
    more. ``probe_every``: steps between readings of the probe.
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
        for name in ("snapshot_every", "snapshots", "rollbacks", "recover", "probe_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class Limit:
    """A bound of one of the caller's stats; ``where`` names the tensor with the worst value."""

    name: str
    at_most: float
    where: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Event:
    """One act of the guard, as logged. ``batch``: the caller's names of what was in the batch."""

    step: int
    action: str
    signal: str
    message: str
    tensor: str | None = None
    value: float | None = None
    limit: float | None = None
    to_step: int | None = None
    batch: list[int] | None = None


@dataclass(frozen=True)
class Hooks:
    """What the caller adds to a guard.

    ``probe``: reads the model on a probe text; without it a collapse shows only in the loss.
    ``extra``: the caller's own state (data position, objective), which rolls back too. ``limits``:
    of the stats that ``Guard.step`` gets. ``on_event``: gets every event at once; ``on_probe``: the
    step and every reading.
    """

    probe: Probe | None = None
    extra: Extra | None = None
    limits: Sequence[Limit] = ()
    on_event: Callable[[Event], None] = lambda event: None
    on_probe: Callable[[int, ProbeReading], None] = lambda step, reading: None


@dataclass(frozen=True)
class Verdict:
    """The outcome of a step.

    ``action``: what was done; ``totals``: gradient norms of the clip groups before clipping;
    ``limits``: their limits; ``update_ratio``: the largest update-to-weight ratio of any weight.
    """

    action: Action
    totals: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    update_ratio: float = 0.0
    learning_rate: float = 0.0
    event: Event | None = None


class GaveUp(RuntimeError):
    """Training cannot go on; the model is in its last good state. ``event`` says why."""

    def __init__(self, event: Event) -> None:
        super().__init__(event.message)
        self.event = event
