"""Recovery from anomalies: skip the step, roll back, give up; after a collapse, watch the data."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from stability.detectors import (
    LEARNING_RATE,
    LOSS,
    NON_FINITE,
    PROBE_LOSS,
    PROBE_SIGNALS,
    Action,
    Anomaly,
    LearningRateJump,
)
from stability.events import Event, GaveUp, GuardSettings
from stability.measures.probe import ProbeReading
from stability.snapshots import Keeper, Snapshot
from stability.state import NEARBY, GuardState

SKIPPED_AT_MOST, WINDOW = 60, 100  # of so many steps, before the guard gives up
SKIPPED_IN_ROW = 10  # after which skipping does not help
CONFIRMED = 10  # steps without an anomaly after which a snapshot counts as good
# Watch mode after a collapse that the data may have caused: steps beyond it, steps between probe
# readings, rise of the probe loss (as a share of it, at least of the floor) that causes a rollback.
WATCHED, WATCH_EVERY, WATCH_RISE, WATCH_FLOOR = 25, 5, 0.15, 0.1
WATCH_ROLLBACKS = 40  # at most

Batch = list[int] | None
Report = Callable[[Event], None]


class Recovery:
    """Acts on the anomalies that a guard finds. ``report``: called with every event."""

    def __init__(
        self, state: GuardState, keeper: Keeper, *, settings: GuardSettings, report: Report
    ) -> None:
        self.state, self.keeper, self.settings, self.report = state, keeper, settings, report

    def recover(self, anomaly: Anomaly, batch: Batch, *, probed: bool) -> Event:
        """Skip the step, roll back, or give up. ``probed``: whether the guard has a probe."""
        state = self.state
        if anomaly.action == Action.SKIP:
            state.skipped_in_row += 1
            state.skipped.append(state.steps)
            while state.skipped[0] <= state.steps - WINDOW:
                state.skipped.popleft()
            if (count := len(state.skipped)) > SKIPPED_AT_MOST:
                self._give_up(anomaly, f"{count} of the last {WINDOW} steps had to be skipped")
            helpless = state.skipped_in_row >= SKIPPED_IN_ROW and self.keeper.kept
            if not helpless or self._accept(anomaly, probed=probed):
                return self._skip(anomaly, batch)
        return self._roll_back(anomaly, batch)

    def advance(self) -> None:
        """Count a step, and keep the random state before the next one for a snapshot."""
        step = self.state.steps = self.state.steps + 1
        if step % self.settings.snapshot_every == 0 or step % WATCH_EVERY == 0:
            self.keeper.keep_random_state(step)

    def keep_snapshot(self) -> None:
        """Take a snapshot when it is due, if the newest probe reading was fine."""
        state = self.state
        fine = state.steps > state.watch_until and state.collapse.is_fine(state.information)
        if not self.keeper.kept or (fine and state.steps % self.settings.snapshot_every == 0):
            self._take_snapshot()

    def _take_snapshot(self, *, keep_first: bool = False) -> None:
        state = self.state
        if not any(one.step == state.steps for one in self.keeper.kept):
            losses = state.loss.state_dict()
            self.keeper.take(state.steps, state.information, losses=losses, keep_first=keep_first)

    def _accept(self, anomaly: Anomaly, *, probed: bool) -> bool:
        """Accept a learning rate that stays, or a loss that a fine probe or a rollback confirms."""
        if anomaly.signal == LEARNING_RATE:
            self.state.rates = LearningRateJump()
            return True
        if anomaly.signal == LOSS and (probed or self.state.attempts):
            self.state.loss.reset()
            return True
        return False

    def _discard(self, *, restore_buffers: bool) -> None:
        """Drop the gradients, and restore the running averages that the forward pass changed."""
        for weight in self.keeper.weights:
            weight.grad = None
        if restore_buffers and self.keeper.kept:
            self.keeper.restore_buffers(self.keeper.kept[-1])

    def _skip(self, anomaly: Anomaly, batch: Batch) -> Event:
        step = self.state.steps
        event = _event("skip_step", anomaly, outcome="the step was skipped", step=step, batch=batch)
        self._discard(restore_buffers=anomaly.signal.startswith(NON_FINITE))
        if anomaly.suspects_data:
            self._suspect([step], batch)
        self.report(event)
        self.advance()
        return event

    def _roll_back(self, anomaly: Anomaly, batch: Batch) -> Event:
        """Restore the last good state, or give up after too many attempts."""
        state, at = self.state, self.state.steps
        watched = anomaly.suspects_data and at <= state.watch_until
        if watched:
            state.watch_rollbacks += 1
        else:
            state.attempts = state.attempts + 1 if at <= state.last_alarm + NEARBY else 1
        state.last_alarm = max(state.last_alarm, at)
        if state.attempts > self.settings.rollbacks or state.watch_rollbacks > WATCH_ROLLBACKS:
            self._give_up(anomaly, "repeated rollbacks did not help")
        snapshot = self._newest_watched() if watched else self._newest_good()
        if snapshot is None:
            self._give_up(anomaly, "there is no good state to roll back to")
        collapsed = anomaly.suspects_data and anomaly.signal in PROBE_SIGNALS
        if collapsed:  # the model has not learnt from the present batch yet
            first = snapshot.step if watched else max(state.fine_at, snapshot.step)
            self._suspect(range(first, at), None)
        elif anomaly.suspects_data:
            self._suspect([at], batch)
        self._restore(snapshot)
        if snapshot.losses is not None:
            state.loss.load_state_dict(snapshot.losses)
        to_step = snapshot.step
        state.fine_at = min(state.fine_at, to_step)
        state.skipped = deque(step for step in state.skipped if step < to_step)
        if not watched or snapshot is self.keeper.kept[0]:
            state.reference = None
        if collapsed:
            state.watch_until = max(state.watch_until, at + WATCHED)
            self.keeper.kept = self.keeper.kept if watched else [snapshot]
        outcome = f"rolled back to the state after step {to_step}"
        if not watched:
            state.watch_rollbacks, state.rate_from = 0, to_step
            state.rate_scale = self.settings.lower**state.attempts
            outcome += f", learning rate × {state.rate_scale:g} for a while"
        event = _event("rollback", anomaly, outcome=outcome, step=at, to_step=to_step, batch=batch)
        self.report(event)
        return event

    def _newest_good(self) -> Snapshot | None:
        """The newest snapshot without an anomaly soon after; an older one after each attempt."""
        state, kept = self.state, self.keeper.kept
        good = [one for one in kept if state.steps - one.step >= CONFIRMED or one is kept[0]]
        fine = [one for one in good if state.collapse.is_fine(one.information)] or good[:1]
        return fine[max(-len(fine), -state.attempts)] if fine else None

    def _newest_watched(self) -> Snapshot | None:
        """The newest snapshot after which not all batches are quarantined, else the first."""
        state = self.state
        earlier = [one for one in self.keeper.kept if one.step < state.steps]
        for one in reversed(earlier):
            if not state.quarantined.issuperset(range(one.step, state.steps)):
                return one
        return earlier[0] if earlier else None

    def _restore(self, snapshot: Snapshot) -> None:
        """Restore a snapshot, and forget what was measured since then."""
        state = self.state
        self.keeper.restore(snapshot)
        state.weights_changed()
        state.updates.still[:] = 0
        state.skipped_in_row, state.reading, state.read_at = 0, None, -1
        state.steps = snapshot.step

    def _give_up(self, anomaly: Anomaly, reason: str) -> NoReturn:
        """Restore the last good state, if there is one, and stop."""
        at, snapshot, to_step = self.state.steps, self._newest_good(), None
        if snapshot is not None:
            self._restore(snapshot)
            to_step = snapshot.step
            reason += f"; the weights are those after step {to_step}"
        event = _event("abort", anomaly, outcome=reason, step=at, to_step=to_step)
        self.report(event)
        raise GaveUp(event)

    def _suspect(self, steps: Iterable[int], batch: Batch) -> None:
        """Count an anomaly for the batches of some steps, and quarantine those with two.

        Without ``Extra`` the data does not roll back, and a step does not name a batch.
        """
        for step in steps if self.keeper.extra is not None else ():
            self.state.suspects[step] += 1
            if self.state.suspects[step] >= 2 and step not in self.state.quarantined:
                reason = f"the batch of step {step} caused two anomalies"
                self._quarantine(step, reason, batch=batch)

    def _quarantine(self, step: int, reason: str, *, batch: Batch) -> Event:
        self.state.quarantined.add(step)
        message, value = f"{reason}: it is quarantined, and another one replaces it", float(step)
        event = Event(self.state.steps, "set_aside", "batch", message, value=value, batch=batch)
        self.report(event)
        return event

    def watch(self, reading: ProbeReading) -> Anomaly | None:
        """Judge a reading strictly while suspect batches come again, and keep a sound state."""
        state, loss, reference = self.state, reading.loss, self.state.reference
        if loss is None:
            return None
        known = reference or 0.0
        limit = known + WATCH_RISE * max(abs(known), WATCH_FLOOR)
        if reference is not None and loss > limit:
            first = self.keeper.kept[0].step if self.keeper.kept else state.steps
            if state.steps > first and state.quarantined.issuperset(range(first, state.steps)):
                state.watch_until = state.steps  # other batches have the same effect
                return None
            rise = f"rose from {reference:.3g} to {loss:.3g}"
            message = f"the loss on the probe text {rise} on suspect batches"
            return Anomaly(Action.ROLLBACK, PROBE_LOSS, None, loss, limit, message, True)
        state.reference = loss if reference is None else min(loss, reference)
        self._take_snapshot(keep_first=True)
        return None

    def is_outlier(self, loss: float) -> bool:
        """Whether, after a collapse, the loss on this batch is unlike those before."""
        state = self.state
        watched = state.steps <= state.watch_until and state.steps not in state.quarantined
        return watched and self.keeper.extra is not None and loss > state.loss.usual()[1]

    def quarantine_outlier(self, loss: float, batch: Batch) -> Event:
        """Quarantine the batch before it does harm; the learning rate is the planned one again."""
        step, usual = self.state.steps, self.state.loss.usual()[0]
        self._discard(restore_buffers=True)
        self.state.suspects[step] += 1
        self.state.rate_scale = 1.0
        was = f"is {loss:.3g}, and was {usual:.3g} before the collapse"
        return self._quarantine(step, f"the loss on the batch of step {step} {was}", batch=batch)


def _event(action: str, anomaly: Anomaly, *, outcome: str, step: int, **rest: Any) -> Event:
    message = f"step {step}: {anomaly.message}; {outcome}"
    values = anomaly.tensor, anomaly.value, anomaly.limit
    return Event(step, action, anomaly.signal, message, *values, **rest)
