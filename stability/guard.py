"""The guard of a training loop: clip, skip a step, roll back to the last good state, or give up.

A loop calls ``guard.step(loss)`` instead of ``optimizer.step()``. It works on any ``nn.Module`` and
optimizer, also under DDP and FSDP2 (``fully_shard``); ``docs/stability.md`` has an example and the
measurements behind the bounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stability.clipping import AdaptiveClip
from stability.consensus import Processes, root_cause
from stability.detectors import LOSS, Action, Anomaly, UpdateJump, WeightJump
from stability.diagnosis import Inputs, damaged_weight, find_cause, with_poisoned_state
from stability.events import Event, GuardSettings, Hooks, Verdict
from stability.measures.monitor import GradientReading, Monitor
from stability.measures.probe import ProbeReading
from stability.recovery import WATCH_EVERY, Recovery
from stability.snapshots import Keeper
from stability.state import NEARBY, GuardState


class Guard:
    """Watches every step of a training and keeps it from being spoilt.

    ``optimizer``: any whose step needs no closure; ``schedule``: of the learning rate, rolled back
    with the weights and stepped by the caller; ``monitor``: one with clip groups or other names.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        schedule: LRScheduler | None = None,
        settings: GuardSettings | None = None,
        monitor: Monitor | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        hooks = hooks or Hooks()
        self.optimizer, self.schedule = optimizer, schedule
        self.settings = settings or GuardSettings()
        self.monitor = monitor or Monitor(model, optimizer)
        self.probe, self.on_event, self.on_probe = hooks.probe, hooks.on_event, hooks.on_probe
        self.limits = {limit.name: limit for limit in hooks.limits}
        names, weights = self.monitor.names, self.monitor.weights
        self.processes = Processes(weights[0].device if weights else torch.device("cpu"))
        bounds = self.settings.max_norm, self.settings.z_clip
        clips = {name: AdaptiveClip(*bounds) for name in self.monitor.clip_groups}
        jumps = WeightJump(names), UpdateJump(names, weights)
        self.state = state = GuardState(self.monitor, clips, *jumps)
        count = self.settings.snapshots
        self.keeper = Keeper(model, optimizer, schedule=schedule, extra=hooks.extra, count=count)
        self.recovery = Recovery(state, self.keeper, settings=self.settings, report=self._report)

    def step(
        self,
        loss: Tensor | float,
        batch: Sequence[int] | None = None,
        *,
        inputs: Inputs | None = None,
        stats: Mapping[str, float] | None = None,
    ) -> Verdict:
        """Judge loss and gradients, step the optimizer if they are sound, and judge the update.

        After a rollback (``verdict.action``) the schedule is rolled back too: do not step it.
        ``batch``: names of what is in the batch, for the log; ``inputs``: makes its tensors by
        name, called only after an anomaly; ``stats``: the caller's own, for ``Hooks.limits``.

        Raises:
            GaveUp: rollbacks did not help; the model is in its last good state.
        """
        names = None if batch is None else list(batch)
        self._read_probe()
        before = self.monitor.before(loss)
        anomaly = self._judge_before(before, self._judge_stats(before, stats or {}, inputs=inputs))
        if self._all_proceed(anomaly):
            if self._any_outlier(before.loss):
                event = self.recovery.quarantine_outlier(before.loss, names)
                return Verdict(Action.ROLLBACK, before.totals, event=event)
            self.recovery.keep_snapshot()
            verdict = self._update(before)
            anomaly, ratio = self._judge_update(before)
            if self._all_proceed(anomaly):
                self._accept(before)
                return replace(verdict, update_ratio=ratio)
        event = self.recovery.recover(self._worst(anomaly), names, probed=self.probe is not None)
        action = Action.SKIP if event.action == "skip_step" else Action.ROLLBACK
        return Verdict(action, before.totals, event=event)

    def is_quarantined(self, step: int) -> bool:
        """Whether another batch must replace the one after ``step`` steps."""
        return step in self.state.quarantined

    def is_suspect(self, step: int) -> bool:
        """Whether the batch after ``step`` steps was ever suspected of an anomaly."""
        return step in self.state.suspects

    def weights_changed(self) -> None:
        """Tell that the caller has changed weights (pruned, clamped, loaded): that is no damage."""
        self.state.weights_changed()

    def learning_rate_scale(self) -> float:
        """The present factor of the learning rate: 1 except for some time after a rollback."""
        state, settings = self.state, self.settings
        if state.rate_scale == 1.0:
            return 1.0
        steps = max(0, state.steps - state.rate_from)
        warm = min(1.0, (steps + 1) / (settings.rewarm + 1))
        recovered = min(1.0, max(0, steps - settings.rewarm) / settings.recover)
        return warm * (state.rate_scale + (1.0 - state.rate_scale) * recovered)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON takes it; snapshots are not part of it."""
        return self.state.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``.

        Raises:
            KeyError, TypeError, ValueError: no such state.
        """
        self.state.load_state_dict(state)

    def _read_probe(self) -> None:
        """Read the probe if it is due, also before a snapshot and often after an alarm."""
        state = self.state
        close = state.steps <= max(state.last_alarm + NEARBY, state.watch_until)
        every = WATCH_EVERY if close else self.settings.probe_every
        due = state.steps % every == 0 or state.steps % self.settings.snapshot_every == 0
        if self.probe is not None and due and state.steps != state.read_at:  # steps may be retried
            state.reading, state.read_at = self.probe(), state.steps
            state.information = state.reading.information
            self.on_probe(state.steps, state.reading)

    def _judge_stats(
        self, before: GradientReading, stats: Mapping[str, float], *, inputs: Inputs | None
    ) -> Anomaly | None:
        """What this process sees in a step before it is taken, except for the level of the loss."""
        weights = self.state.weights
        if not all(map(math.isfinite, [before.loss, *before.totals.values()])):
            return find_cause(before, self.monitor, weights=weights, inputs=inputs)
        for name, value in stats.items():
            limit = self.limits.get(name)
            if limit is not None and not value <= limit.at_most:
                where = limit.where()
                message = f"{name} is {value:.3g}" + (f" in {where}" if where else "")
                return Anomaly(Action.ROLLBACK, name, where, value, limit.at_most, message)
        planned = None if self.schedule is None else list(map(float, self.schedule.get_last_lr()))
        return weights.judge(before.weights) or self.state.rates.judge(before.rates, planned)

    def _judge_before(self, before: GradientReading, anomaly: Anomaly | None) -> Anomaly | None:
        """The worst anomaly before the step, ``anomaly`` first, then those of probe and loss."""
        # The processes judge a reading together: what follows from it must be the same in all.
        reading = self.state.reading
        if reading is not None and self._all_proceed(anomaly):
            self.state.reading = None
            anomaly = self._judge_probe(reading)
        if anomaly is None and (spike := self.state.loss.judge(before.loss)) is not None:
            outlier = self.recovery.is_outlier(before.loss)
            return damaged_weight(self.monitor, self.state.weights) or (None if outlier else spike)
        return anomaly

    def _judge_probe(self, reading: ProbeReading) -> Anomaly | None:
        state = self.state
        anomaly = state.collapse.judge(reading)
        if anomaly is None and state.steps <= state.watch_until:
            anomaly = self.recovery.watch(reading)
        if anomaly is not None:
            return damaged_weight(self.monitor, state.weights) or anomaly
        if state.collapse.is_fine(reading.information):
            state.fine_at = state.steps
        return None

    def _judge_update(self, before: GradientReading) -> tuple[Anomaly | None, float]:
        """What is wrong with the step just taken, and the largest update-to-weight ratio."""
        ratios = self.monitor.after()
        scale = self.learning_rate_scale()
        rates = self.monitor.rates([rate * scale for rate in before.rates])
        anomaly = self.state.updates.judge(ratios, before.gradients, rates=rates)
        if anomaly is not None:
            return with_poisoned_state(anomaly, self.monitor), 0.0
        self.state.weights.update(ratios)
        return None, max(ratios, default=0.0)

    def _all_proceed(self, anomaly: Anomaly | None) -> bool:
        """Whether no process of the launch has found an anomaly."""
        action = Action.PROCEED if anomaly is None else anomaly.action
        return self.processes.maximum(int(action)) == Action.PROCEED

    def _any_outlier(self, loss: float) -> bool:
        """Whether, in watch mode (of all processes or of none), any process has an outlier."""
        if self.state.steps > self.state.watch_until:
            return False
        return bool(self.processes.maximum(int(self.recovery.is_outlier(loss))))

    def _worst(self, anomaly: Anomaly | None) -> Anomaly:
        """The most severe anomaly of any process, the same in all of them.

        After a spike of the loss the probe tells whether the model or the batch is the cause.
        """
        worst = root_cause(self.processes.gather(anomaly))
        if worst.signal == LOSS and self.probe is not None:
            worst = self.state.collapse.judge(self.probe()) or worst
        return worst

    @torch.no_grad()
    def _update(self, before: GradientReading) -> Verdict:
        """Clip, and step the optimizer at the present learning rate."""
        limits = {}
        for name, parameters in self.monitor.clip_groups.items():
            clip, total = self.state.clips[name], before.totals[name]
            limit = clip.limit()
            limits[name] = limit = limit if total > limit else clip.max_norm
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, self.monitor.totals[name])
            if total > limit < clip.max_norm:
                step, score = self.state.steps, clip.score(total)
                message = f"step {step}: gradient norm {total:.3g} is {score:.1f} deviations above"
                message += f" those before; cut to {limit:.3g}"
                signal = f"gradient norm, {name}"
                self._report(Event(step, "clip", signal, message, value=total, limit=limit))
        scale = self.learning_rate_scale()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups if scale != 1.0 else ():
            group["lr"] = group["lr"] * scale  # not in place: it may be a tensor
        try:
            self.optimizer.step()
        finally:
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        rate = float(rates[0]) * scale
        return Verdict(Action.PROCEED, before.totals, limits, learning_rate=rate)

    def _accept(self, before: GradientReading) -> None:
        """The step was sound: later steps are compared with it."""
        state = self.state
        state.loss.update(before.loss)
        state.rates.update(before.rates)
        for name, total in before.totals.items():
            state.clips[name].update(total)
        state.skipped_in_row = 0
        self.recovery.advance()

    def _report(self, event: Event) -> None:
        self.state.newest = event
        self.on_event(event)
