"""The guard of a training loop: clip, skip a step, go back to the last good state, or give up.

Instead of ``optimizer.step()`` a loop calls ``guard.step(loss)``::

    guard = Guard(model, optimizer)
    ...
        loss.backward()
        guard.step(loss)
        optimizer.zero_grad()

It works on any ``nn.Module`` and optimizer, also under DDP and FSDP2 (``fully_shard``); ``docs/stability.md`` has a
whole example and the measurements behind the bounds.

Long because watching and recovering share one state.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stability.clipping import AdaptiveClip
from stability.consensus import Processes, nearest_the_cause
from stability.detectors import (
    FIXED_TEXT,
    FIXED_TEXT_LOSS,
    LEARNING_RATE,
    LOSS,
    NON_FINITE,
    Action,
    Collapse,
    LossSpike,
    RateLeap,
    Trouble,
    UpdateLeap,
    WeightLeap,
)
from stability.diagnosis import Inputs, find_cause, with_poisoned_state
from stability.events import Event, GaveUp, GuardSettings, Limit, Verdict, event_of
from stability.measures.monitor import Before, ClipGroups, Monitor
from stability.measures.probe import Probe, ProbeReading
from stability.snapshots import Extra, Keeper, Snapshot

CONFIRM = 10  # steps without trouble after which a snapshot counts as good
WINDOW = 100  # steps over which skipped ones are counted ...
MOST_SKIPPED = 60  # ... and so many of them are too many
ROW = 10  # skipped in a row, and skipping does not help
SAME_PLACE = 50  # an alarm within so many steps of the last is the same trouble again
CLOSE = 5  # while that lasts, the fixed text is looked at so often
# After a collapse that the data may have caused, so many steps beyond it are watched closely and go back for a loss on
# the fixed text that is by such a share of it (or of LEAST) larger ...
CAREFUL, SLIGHTLY, LEAST = 25, 0.15, 0.1
MOST_CAREFUL = 40  # ... so often at most


class Guard:
    """Watches every step of a training and keeps it from being spoilt.

    Args:
        model: any module.
        optimizer: its optimizer, which ``step`` steps; any whose step needs no closure.
        schedule: of the learning rate, so that it goes back with the weights; the caller steps it.
        settings: see ``GuardSettings``.
        clip_groups: parameters whose gradients are clipped together, by name (none: all of them).
        probe: reads the model on some fixed text (none: collapse to a constant is seen only through the loss).
        extra: what else goes back (data position, objective).
        limits: bounds for figures that ``step`` is given.
        on_event: called with every event, as it happens.
        on_probe: called with the step and every reading.
        rename: what a weight is called in events.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler | None = None,
        *,
        settings: GuardSettings | None = None,
        clip_groups: ClipGroups | None = None,
        probe: Probe | None = None,
        extra: Extra | None = None,
        limits: Sequence[Limit] = (),
        on_event: Callable[[Event], None] = lambda event: None,
        on_probe: Callable[[int, ProbeReading], None] = lambda step, reading: None,
        rename: Callable[[str], str] = str,
    ) -> None:
        self.settings = settings or GuardSettings()
        self.monitor = Monitor(model, optimizer, clip_groups, rename)
        self.optimizer = optimizer
        self.schedule, self.probe, self.on_event, self.on_probe = schedule, probe, on_event, on_probe
        weights = self.monitor.weights
        self.processes = Processes(weights[0].device if weights else torch.device("cpu"))
        self.limits = {limit.name: limit for limit in limits}
        self.keeper = Keeper(model, optimizer, schedule, extra, self.settings.snapshots)
        self.clips = {
            name: AdaptiveClip(self.settings.max_norm, self.settings.z_clip)
            for name in self.monitor.clip_groups
        }
        self.loss, self.rates, self.collapse = LossSpike(), RateLeap(), Collapse()
        self.weights, self.updates = WeightLeap(self.monitor.names), UpdateLeap(self.monitor.names, weights)
        self.steps = self.row = 0
        self.newest: Event | None = None
        self.reading: ProbeReading | None = None  # of the fixed text, not judged yet
        self.information: float | None = None  # of the newest reading
        self.read_at = -1  # the step of it
        self.fine_at = 0  # the step of the newest probe that was fine
        self.skipped: deque[int] = deque()
        self.tries, self.alarm = 0, -SAME_PLACE
        self.lowered, self.since = 1.0, 0
        self.careful_until, self.careful_turns = -1, 0
        self.reference: float | None = None  # the lowest loss on the fixed text while it is careful
        self.blamed: Counter[int] = Counter()
        self.set_aside: set[int] = set()
        self.losses: dict[int, dict[str, Any]] = {}  # what losses were like at each state that is kept

    def step(
        self,
        loss: Tensor | float,
        batch: Sequence[int] | None = None,
        inputs: Inputs | None = None,
        figures: Mapping[str, float] | None = None,
    ) -> Verdict:
        """Look at loss and gradients, take the optimizer's step if they are sound, and look at what it did.

        After going back (``verdict.action``), the caller's schedule is where it was then: it is not stepped.

        Args:
            loss: of this step.
            batch: names of what is in the batch, for the log.
            inputs: makes the batch's tensors by name; asked only when something is wrong.
            figures: the caller's own, for ``limits``.

        Raises:
            GaveUp: going back did not help ``settings.rollbacks`` times; the model is in its last good state.
        """
        self._look_at_fixed_text()
        before = self.monitor.before(loss)
        trouble = self._judge_before(before, self._judge_figures(before, inputs, figures or {}))
        if self._all_proceed(trouble):
            # All processes are in the wake of a collapse, or none is.
            if self.steps <= self.careful_until and self.processes.most(int(self._is_foreign(before.loss))):
                return self._leave_out(before, batch)
            if self.steps % self.settings.snapshot_every == 0 or not self.keeper.kept:
                self._keep()
            verdict = self._take(before)
            trouble, ratio = self._judge_after(before)
            if self._all_proceed(trouble):
                self._took(before)
                return Verdict(Action.PROCEED, before.totals, verdict.limits, ratio, verdict.learning_rate)
        return self._act(self._worst(trouble), before, batch)

    def is_set_aside(self, step: int) -> bool:
        """Whether the batch that comes after ``step`` steps made trouble twice, so that another is to be taken."""
        return step in self.set_aside

    def is_under_suspicion(self, step: int) -> bool:
        """Whether the batch that comes after ``step`` steps has ever been blamed for trouble."""
        return step in self.blamed

    def weights_changed(self) -> None:
        """The caller has changed weights outside the optimizer (pruned, clamped, loaded): that is no damage."""
        self.weights.forget()
        self.monitor.forget()

    def learning_rate_scale(self) -> float:
        """What the schedule's learning rate is multiplied by now: 1 except for a while after going back."""
        if self.lowered == 1.0:
            return 1.0
        steps, settings = max(0, self.steps - self.since), self.settings
        warm = min(1.0, (steps + 1) / (settings.rewarm + 1))
        back = min(1.0, max(0, steps - settings.rewarm) / settings.recover)
        return warm * (self.lowered + (1.0 - self.lowered) * back)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep, as JSON takes it; snapshots are not among it."""
        return guard_state(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``.

        Raises:
            KeyError, TypeError, ValueError: this is no such state.
        """
        restore_guard(self, state)

    def _look_at_fixed_text(self) -> None:
        """Read the probe when it is due, and where a snapshot is, before the step is judged."""
        close = self.steps <= max(self.alarm + SAME_PLACE, self.careful_until)
        every = CLOSE if close else self.settings.probe_every
        due = self.steps % every == 0 or self.steps % self.settings.snapshot_every == 0
        if self.probe is not None and due and self.steps != self.read_at:  # a step may be tried again
            self.reading, self.read_at = self.probe(), self.steps
            self.information = self.reading.information
            self.on_probe(self.steps, self.reading)

    def _judge_before(self, before: Before, trouble: Trouble | None) -> Trouble | None:
        """What is wrong before the step is taken, the worst first; ``trouble``: what its figures say."""
        # By all processes or by none: what is known of it, and which states are kept for it, must be the same in all.
        if self.reading is not None and self._all_proceed(trouble):
            trouble, self.reading = self._judge_fixed_text(self.reading), None
        if trouble is None and (spike := self.loss.judge(before.loss)) is not None:
            return self._damaged_weight() or (None if self._is_foreign(before.loss) else spike)
        return trouble

    def _judge_figures(
        self, before: Before, inputs: Inputs | None, figures: Mapping[str, float]
    ) -> Trouble | None:
        """What this process sees in the figures of the step, but for how high the loss is."""
        if not all(map(math.isfinite, [before.loss, *before.totals.values()])):
            return find_cause(before, self.monitor, self.weights, inputs)
        for name, value in figures.items():
            limit = self.limits.get(name)
            if limit is not None and not value <= limit.at_most:
                where = limit.where()
                words = f"{name} is {value:.3g}" + (f" in {where}" if where else "")
                return Trouble(Action.ROLLBACK, name, where, value, limit.at_most, words)
        planned = None if self.schedule is None else [float(rate) for rate in self.schedule.get_last_lr()]
        return self.weights.judge(before.weights) or self.rates.judge(before.rates, planned)

    def _judge_fixed_text(self, reading: ProbeReading) -> Trouble | None:
        """What a new reading of the probe says about the model."""
        trouble = self.collapse.judge(reading)
        if trouble is None and self.steps <= self.careful_until:
            trouble = self._judge_carefully(reading)
        if trouble is not None:
            return self._damaged_weight() or trouble
        if self.collapse.is_fine(reading.information):
            self.fine_at = self.steps
        return None

    def _judge_carefully(self, reading: ProbeReading) -> Trouble | None:
        """Data that has made the model collapse once comes again: go back for a little, and keep what is good."""
        loss, reference = reading.loss, self.reference
        if loss is None:
            return None
        limit = math.inf if reference is None else reference + SLIGHTLY * max(abs(reference), LEAST)
        first = self.keeper.kept[0].step if self.keeper.kept else self.steps
        if loss > limit and self.steps > first and self.set_aside.issuperset(range(first, self.steps)):
            self.careful_until = self.steps  # it rises with other batches too: none of them is to blame
            return None
        if reference is not None and loss > limit:
            words = f"the loss on the fixed text went from {reference:.3g} to {loss:.3g} on batches under suspicion"
            return Trouble(Action.ROLLBACK, FIXED_TEXT_LOSS, None, loss, limit, words, blames_data=True)
        self.reference = loss if reference is None else min(loss, reference)
        self._take_snapshot(reading.information, keep_first=True)
        return None

    def _is_foreign(self, loss: float) -> bool:
        """Whether a batch in the wake of a collapse is unlike those before it: it need not do its harm once more."""
        here = self.steps <= self.careful_until and self.steps not in self.set_aside
        return here and self.keeper.extra is not None and loss > self.loss.usual()[1]

    def _leave_out(self, before: Before, batch: Sequence[int] | None) -> Verdict:
        """Set the batch aside; no step has been taken with it, so there are no weights to take back."""
        for parameter in self.monitor.weights:
            parameter.grad = None
        if self.keeper.kept:
            self.keeper.restore_buffers(self.keeper.kept[-1])
        words = (
            f"the loss on the batch of step {self.steps} is {before.loss:.3g}, and was {self.loss.usual()[0]:.3g} "
            "before the collapse: another takes its place"
        )
        self.blamed[self.steps] += 1
        self.lowered = 1.0  # it is the data that is to blame
        self._put_aside(self.steps, words, None if batch is None else list(batch))
        return Verdict(Action.ROLLBACK, before.totals, event=self.newest)

    def _damaged_weight(self) -> Trouble | None:
        """A weight whose norm leapt, of all of them."""
        return self.weights.judge(dict(enumerate(self.monitor.weight_norms())))

    def _all_proceed(self, trouble: Trouble | None) -> bool:
        """Whether no process of the launch has found anything."""
        mine = Action.PROCEED if trouble is None else trouble.action
        return self.processes.most(int(mine)) == Action.PROCEED

    def _worst(self, mine: Trouble | None) -> Trouble:
        """The most severe trouble of any process, the same in all of them. Where that is a spike of the loss, the fixed
        text tells whether it is the model's fault or the batch's."""
        trouble = nearest_the_cause(self.processes.all(mine))
        if trouble.signal == LOSS and self.probe is not None:
            trouble = self.collapse.judge(self.probe()) or trouble
        return trouble

    @torch.no_grad()
    def _take(self, before: Before) -> Verdict:
        """Clip, and step the optimizer at the learning rate of the moment."""
        limits = {}
        for name, parameters in self.monitor.clip_groups.items():
            clip, total = self.clips[name], before.totals[name]
            limit = clip.limit()
            limits[name] = limit if total > limit else clip.max_norm
            torch.nn.utils.clip_grads_with_norm_(parameters, limits[name], self.monitor.totals[name])
            if total > limits[name] < clip.max_norm:
                words = (
                    f"step {self.steps}: gradient norm {total:.3g} is {clip.score(total):.1f} deviations above those "
                    f"before; cut to {limits[name]:.3g}"
                )
                self._tell(
                    Event(self.steps, "clip", f"gradient norm, {name}", words, None, total, limits[name])
                )
        scale = self.learning_rate_scale()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups if scale != 1.0 else ():
            group["lr"] = group["lr"] * scale  # not in place: it may be a tensor
        try:
            self.optimizer.step()
        finally:
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        return Verdict(Action.PROCEED, limits=limits, learning_rate=float(rates[0]) * scale)

    def _judge_after(self, before: Before) -> tuple[Trouble | None, float]:
        """What is wrong with the step just taken, and the largest update-to-weight ratio."""
        ratios = self.monitor.after()
        scale = self.learning_rate_scale()
        rates = self.monitor.rates([rate * scale for rate in before.rates])
        trouble = self.updates.judge(ratios, before.gradients, rates)
        if trouble is None:
            self.weights.took(ratios)
            return None, max(ratios, default=0.0)
        return with_poisoned_state(trouble, self.monitor), 0.0

    def _took(self, before: Before) -> None:
        """The step was sound: its figures are what the next are compared with."""
        self.loss.took(before.loss)
        self.rates.took(before.rates)
        for name, total in before.totals.items():
            self.clips[name].took(total)
        self.row = 0
        self._go_on()

    def _go_on(self) -> None:
        """One more step is done with.

        What is random in the next one is drawn before its loss is known, so the random state of a snapshot is kept now.
        """
        self.steps += 1
        if self.steps % self.settings.snapshot_every == 0 or self.steps % CLOSE == 0:
            self.keeper.keep_random_state(self.steps)

    def _keep(self) -> None:
        """Take a snapshot, unless the last look at the fixed text was not fine."""
        there = any(one.step == self.steps for one in self.keeper.kept)
        fine = self.steps > self.careful_until and self.collapse.is_fine(self.information)
        if not self.keeper.kept or (fine and not there):
            self._take_snapshot(self.information)

    def _take_snapshot(self, information: float | None, *, keep_first: bool = False) -> None:
        """Keep the state, and what losses were like so far."""
        if self.keeper.kept and self.keeper.kept[-1].step == self.steps:
            return
        self.keeper.take(self.steps, information, keep_first=keep_first)
        self.losses[self.steps] = self.loss.state_dict()
        self.losses = {one.step: self.losses[one.step] for one in self.keeper.kept if one.step in self.losses}

    def _act(self, trouble: Trouble, before: Before, batch: Sequence[int] | None) -> Verdict:
        """Skip, go back, or give up."""
        names = None if batch is None else list(batch)
        if trouble.action == Action.SKIP:
            self.row += 1
            self.skipped.append(self.steps)
            while self.skipped and self.skipped[0] <= self.steps - WINDOW:
                self.skipped.popleft()
            if len(self.skipped) > MOST_SKIPPED:
                why = f"{len(self.skipped)} of the last {WINDOW} steps had to be skipped"
                return self._give_up(trouble, why)
            if self.row < ROW or not self.keeper.kept or self._is_normal_now(trouble):
                return self._skip(trouble, before, names)
        return self._go_back(trouble, before, names)

    def _is_normal_now(self, trouble: Trouble) -> bool:
        """Whether what has come so often in a row is accepted: a learning rate that stays, and a loss that stays though
        the fixed text is fine or, where there is none, though training went back for it."""
        if trouble.signal == LEARNING_RATE:
            self.rates = RateLeap()
            return True
        if trouble.signal == LOSS and (self.probe is not None or self.tries):
            self.loss.forget()
            return True
        return False

    def _skip(self, trouble: Trouble, before: Before, batch: list[int] | None) -> Verdict:
        """Leave this step out: the weights and the optimizer stay as they are."""
        words = f"step {self.steps}: {trouble.words}; the step was skipped"
        event = event_of(self.steps, "skip_step", trouble, words, batch=batch)
        for parameter in self.monitor.weights:
            parameter.grad = None
        if trouble.signal.startswith(NON_FINITE) and self.keeper.kept:
            self.keeper.restore_buffers(self.keeper.kept[-1])  # the forward pass has spoilt running averages
        if trouble.blames_data:
            self._blame(self.steps, batch)
        self._tell(event)
        self._go_on()
        return Verdict(Action.SKIP, before.totals, learning_rate=0.0, event=event)

    def _go_back(self, trouble: Trouble, before: Before, batch: list[int] | None) -> Verdict:
        """Put the last good state back, or give up where that was done often enough."""
        at, careful = self.steps, trouble.blames_data and self.steps <= self.careful_until
        if careful:
            self.careful_turns += 1
        else:
            self.tries = self.tries + 1 if at <= self.alarm + SAME_PLACE else 1
        self.alarm = max(self.alarm, at)
        if self.tries > self.settings.rollbacks or self.careful_turns > MOST_CAREFUL:
            return self._give_up(trouble, "going back again and again did not help")
        found = self._one_before(at) if careful else self._choose(at)
        if found is None:
            return self._give_up(trouble, "there is no good state to go back to")
        if trouble.blames_data:
            if trouble.signal in FIXED_TEXT:  # any step since, but not this one, which is not taken yet
                suspects = range(found.step if careful else max(self.fine_at, found.step), at)
            else:
                suspects = range(at, at + 1)
            for step in suspects:
                self._blame(step, batch if step == at else None)
        self.keeper.restore(found)
        self._forget()
        self.steps = found.step
        if found.step in self.losses:
            self.loss.load_state_dict(self.losses[found.step])
        self.fine_at = min(self.fine_at, found.step)
        self.skipped = deque(step for step in self.skipped if step < found.step)
        if not careful:
            self.lowered, self.since = self.settings.lower**self.tries, found.step
        if found is self.keeper.kept[0]:
            self.reference = None  # this state is what the careful steps from it are compared with
        if trouble.blames_data and trouble.signal in FIXED_TEXT:
            self.careful_until = max(self.careful_until, at + CAREFUL)
            self.keeper.kept = self.keeper.kept if careful else [found]
        if not careful:
            self.careful_turns, self.reference = 0, None
        words = f"step {at}: {trouble.words}; back to the state after step {found.step}"
        words += "" if careful else f", learning rate × {self.lowered:g} for a while"
        event = event_of(at, "rollback", trouble, words, to_step=found.step, batch=batch)
        self._tell(event)
        return Verdict(Action.ROLLBACK, before.totals, event=event)

    def _one_before(self, at: int) -> Snapshot | None:
        """The newest state from which other batches are still to be tried: where all since are set aside already, it is
        the state itself that is spoilt."""
        for one in reversed(self.keeper.kept):
            if one.step < at and not self.set_aside.issuperset(range(one.step, at)):
                return one
        return self.keeper.kept[0] if self.keeper.kept and self.keeper.kept[0].step < at else None

    def _choose(self, at: int) -> Snapshot | None:
        """The newest state that had no trouble for some steps after it; after each try in vain, the one before."""
        good = [one for one in self.keeper.kept if at - one.step >= CONFIRM or one is self.keeper.kept[0]]
        fine = [one for one in good if self.collapse.is_fine(one.information)] or good[:1]
        return fine[max(-len(fine), -self.tries)] if fine else None

    def _give_up(self, trouble: Trouble, why: str) -> Verdict:
        """Restore what can be restored, and stop."""
        at, found = self.steps, self._choose(self.steps)
        if found is not None:
            self.keeper.restore(found)
            self._forget()
            self.steps = found.step
        words = f"step {at}: {trouble.words}; {why}"
        if found is not None:
            words += f"; the weights are those after step {found.step}"
        event = event_of(at, "abort", trouble, words, to_step=None if found is None else found.step)
        self._tell(event)
        raise GaveUp(event)

    def _blame(self, step: int, batch: list[int] | None) -> None:
        """Count that a batch made trouble; after the second time it is set aside.

        Where the place in the data does not go back with the weights, the same step is not the same batch.
        """
        if self.keeper.extra is None:
            return
        self.blamed[step] += 1
        if self.blamed[step] >= 2 and step not in self.set_aside:
            words = f"the batch of step {step} made trouble twice: another takes its place"
            self._put_aside(step, words, batch)

    def _put_aside(self, step: int, words: str, batch: list[int] | None) -> None:
        """Another batch is to take the place of that of a step."""
        self.set_aside.add(step)
        self._tell(Event(self.steps, "set_aside", "batch", words, batch=batch, value=float(step)))

    def _forget(self) -> None:
        """The model was put back: what was known of its weights' norms, and what was under way, is void."""
        self.weights_changed()
        self.row, self.reading, self.read_at = 0, None, -1
        self.updates.still[:] = 0

    def _tell(self, event: Event) -> None:
        self.newest = event
        self.on_event(event)


def guard_state(guard: Guard) -> dict[str, Any]:
    """The state of ``guard``."""
    newest = guard.newest
    return {
        "steps": guard.steps,
        "loss": guard.loss.state_dict(),
        "clips": {name: clip.state_dict() for name, clip in guard.clips.items()},
        "rates": [guard.rates.count, guard.rates.largest],
        "updates": guard.updates.state_dict(),
        # Of weights that are spread each process knows the norm of its own part.
        "weights": None if guard.monitor.spread else guard.weights.state_dict(),
        "fixed_text": [guard.collapse.most, guard.collapse.loss],
        "information": guard.information,
        "fine_at": guard.fine_at,
        "turn": guard.monitor.turn,
        "skipped": [guard.row, *guard.skipped],
        "tries": [guard.tries, guard.alarm],
        "lowered": [guard.lowered, guard.since],
        "careful": [guard.careful_until, guard.careful_turns, guard.reference],
        "blamed": sorted(guard.blamed.items()),
        "set_aside": sorted(guard.set_aside),
        "newest": newest and [newest.step, newest.action, newest.signal, newest.words],
    }


def restore_guard(guard: Guard, state: dict[str, Any]) -> None:
    """The inverse of ``guard_state``.

    Raises:
        KeyError, TypeError, ValueError: this is no such state.
    """
    guard.steps = int(state["steps"])
    guard.loss.load_state_dict(state["loss"])
    for name, clip in guard.clips.items():
        clip.load_state_dict(state["clips"][name])
    guard.rates.count, guard.rates.largest = state["rates"]
    guard.updates.load_state_dict(state["updates"])
    if state["weights"] is not None and not guard.monitor.spread:
        guard.weights.load_state_dict(state["weights"])
    guard.collapse.most, guard.collapse.loss = state["fixed_text"]
    guard.information, guard.fine_at = state["information"], int(state["fine_at"])
    guard.monitor.turn = int(state["turn"])
    guard.monitor.forget()
    guard.row, *skipped = map(int, state["skipped"])
    guard.skipped = deque(skipped)
    guard.tries, guard.alarm = map(int, state["tries"])
    guard.lowered, guard.since = float(state["lowered"][0]), int(state["lowered"][1])
    guard.careful_until, guard.careful_turns, guard.reference = state["careful"]
    guard.blamed = Counter({int(step): int(count) for step, count in state["blamed"]})
    guard.set_aside = set(map(int, state["set_aside"]))
    guard.newest = Event(*state["newest"]) if state.get("newest") else None
