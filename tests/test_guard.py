"""The guard around a plain PyTorch loop, without anything of this project: any module, any optimizer, no probe."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stability import Event, Extra, GaveUp, Guard, GuardSettings, Limit, ProbeReading, Verdict
from stability.detectors import Action

OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3),
}
SAME = GuardSettings(lower=1.0, rewarm=0)  # what goes back is done again as it was


def make_model(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The same for the same step, and something to be learnt."""
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(1000 + step))
    return inputs, torch.sin(inputs[:, :4])


@dataclass
class Plain:
    """A guarded loop. ``harm`` is called with the loop after each backward pass, as often as a step is tried."""

    optimizer: str = "AdamW"
    settings: GuardSettings | None = None
    harm: Callable[[Plain], None] = lambda loop: None
    scale: float = 1.0  # of the loss
    dropout: float = 0.0
    extra: Extra | None = None
    events: list[Event] = field(default_factory=list)
    tried: list[int] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = make_model(self.dropout)
        self.optim = OPTIMIZERS[self.optimizer](self.model)
        self.guard = Guard(
            self.model, self.optim, settings=self.settings, extra=self.extra, on_event=self.events.append
        )
        self.loss = torch.zeros(())

    def run(self, until: int) -> Plain:
        while self.guard.steps < until:
            self.tried.append(self.guard.steps)
            inputs, wanted = batch(self.guard.steps)
            self.loss = self.scale * (self.model(inputs) - wanted).square().mean()
            self.loss.backward()
            self.harm(self)
            self.verdicts.append(self.guard.step(self.loss.detach(), batch=[self.guard.steps]))
            self.optim.zero_grad()
        return self

    def once(self, step: int) -> bool:
        """Whether this is the first try of that step."""
        return self.tried[-1] == step and self.tried.count(step) == 1


def bytes_of(model: nn.Module) -> list[bytes]:
    return [parameter.detach().numpy().tobytes() for parameter in model.parameters()]


def is_finite(model: nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def unguarded(optimizer: str, steps: int, scale: float = 1.0, max_norm: float = 1.0) -> nn.Module:
    """The loop that everybody writes."""
    model = make_model()
    optim = OPTIMIZERS[optimizer](model)
    for step in range(steps):
        inputs, wanted = batch(step)
        (scale * (model(inputs) - wanted).square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optim.step()
        optim.zero_grad()
    return model


# -- nothing is wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "scale"),
    [("SGD", 0.1), ("SGD", 1.0), ("SGD", 100.0), ("AdamW", 1e-8), ("AdamW", 1.0), ("AdamW", 100.0)],
)
def test_a_healthy_loop_is_what_it_would_be_without(optimizer: str, scale: float) -> None:
    """300 steps: no event, and the bytes of plain clipping and stepping, whether gradients are huge or tiny."""
    loop = Plain(optimizer, GuardSettings(max_norm=1.0), scale=scale).run(300)
    assert loop.events == [] and loop.tried == list(range(300))
    assert all(verdict.action == Action.PROCEED for verdict in loop.verdicts)
    assert bytes_of(loop.model) == bytes_of(unguarded(optimizer, 300, scale))
    if scale == 1.0:
        assert not torch.equal(next(loop.model.parameters()), next(make_model().parameters()))


def test_a_verdict_says_what_was_done() -> None:
    """Norm before clipping, limit, learning rate, and the largest update-to-weight ratio."""
    loop = Plain("SGD", GuardSettings(max_norm=0.05))
    loop.run(3)
    before = [one.detach().clone() for one in loop.model.parameters()]
    inputs, wanted = batch(3)
    (loop.model(inputs) - wanted).square().mean().backward()
    norm = math.sqrt(sum(float(one.grad.square().sum()) for one in loop.model.parameters()))
    verdict = loop.guard.step(0.5)
    ratios = [
        float((one.detach() - old).norm() / old.norm())
        for one, old in zip(loop.model.parameters(), before, strict=True)
    ]
    assert norm > 0.05 and verdict.totals == pytest.approx({"all": norm}, rel=1e-5)
    assert verdict.limits == {"all": 0.05} and verdict.learning_rate == 0.02
    assert verdict.update_ratio == pytest.approx(max(ratios), rel=1e-4)


def test_gradients_are_cut_to_the_moving_limit() -> None:
    """A gradient forty times as large as usual, below the fixed limit: cut, and the log says from what to what."""

    def harm(loop: Plain) -> None:
        if loop.tried[-1] == 40:
            for parameter in loop.model.parameters():
                parameter.grad.mul_(40.0)

    loop = Plain("SGD", GuardSettings(max_norm=1e6), harm).run(41)
    event, verdict = loop.events[-1], loop.verdicts[-1]
    norms = [verdict.totals["all"] for verdict in loop.verdicts]
    assert (len(loop.events), event.action, event.step) == (1, "clip", 40)
    assert event.value == norms[-1] and event.limit == verdict.limits["all"] < 0.5 * norms[-1]
    assert verdict.limits["all"] > max(norms[20:40])


# -- steps that are left out -------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("at", [0, 30])
def test_a_loss_that_is_no_number_is_skipped(optimizer: str, at: int) -> None:
    """Weights and moments are as if that step had not been, from the first step on."""
    seen: dict[str, Any] = {}

    def harm(loop: Plain) -> None:
        if loop.tried[-1] == at:
            seen["weights"], seen["state"] = bytes_of(loop.model), repr(loop.optim.state_dict())
            loop.loss = loop.loss * math.nan
            for parameter in loop.model.parameters():
                parameter.grad.fill_(math.nan)
        elif loop.tried[-1] == at + 1:
            assert (bytes_of(loop.model), repr(loop.optim.state_dict())) == (seen["weights"], seen["state"])

    loop = Plain(optimizer, harm=harm).run(60)
    assert [(one.action, one.step, one.batch) for one in loop.events] == [("skip_step", at, [at])]
    assert loop.events[0].signal == "non-finite loss" and f"step {at}" in loop.events[0].words
    assert is_finite(loop.model) and loop.tried == list(range(60))


def test_an_infinite_gradient_is_named() -> None:
    """Its weight, in the event and its words; the step is left out."""

    def harm(loop: Plain) -> None:
        if loop.tried[-1] == 5:
            loop.model[3].weight.grad[2, 3] = math.inf

    loop = Plain(harm=harm).run(20)
    (event,) = loop.events
    assert (event.action, event.signal, event.tensor) == ("skip_step", "non-finite gradient", "3.weight")
    assert "3.weight" in event.words and is_finite(loop.model)


def test_a_spike_of_the_loss_is_skipped() -> None:
    """One far above the usual, in a batch that is named."""

    def harm(loop: Plain) -> None:
        if loop.tried[-1] == 50:
            loop.loss = 20.0 * loop.loss

    (event,) = Plain(harm=harm).run(60).events
    assert (event.action, event.signal, event.batch) == ("skip_step", "loss", [50])


def test_a_learning_rate_that_leaps_does_not_reach_the_weights() -> None:
    """Until it is set right; one that stays is meant, after ten steps."""

    def harm(loop: Plain) -> None:
        if loop.tried[-1] in (40, 45, 50):
            loop.optim.param_groups[0]["lr"] = 3e-3 if loop.tried[-1] == 45 else 20 * 3e-3

    loop = Plain("AdamW", harm=harm).run(80)
    assert [one.step for one in loop.events] == [*range(40, 45), *range(50, 60)]
    assert {(one.action, one.signal) for one in loop.events} == {("skip_step", "learning rate")}
    assert loop.verdicts[-1].learning_rate == 20 * 3e-3 and is_finite(loop.model)


def test_a_loss_that_stays_where_it_leapt_is_accepted() -> None:
    """Other data may be harder: without a probe, after going back for it once."""

    def harm(loop: Plain) -> None:
        if loop.tried[-1] >= 60:
            loop.loss = 50.0 * loop.loss

    loop = Plain(harm=harm).run(150)
    assert [one.action for one in loop.events].count("rollback") == 1 and loop.events[-1].step < 90
    assert {one.signal for one in loop.events} == {"loss"}


# -- going back --------------------------------------------------------------------------------------------


def zero_layer(loop: Plain) -> None:
    for parameter in loop.model[3].parameters():
        parameter.data.zero_()


def flip_bit(loop: Plain) -> None:
    loop.model[3].weight.data.view(-1)[7:8].view(torch.int32).bitwise_xor_(1 << 30)


def poison_moments(loop: Plain) -> None:
    loop.optim.state[loop.model[3].weight]["exp_avg"].mul_(1e4)


HARM = {"zeroed": zero_layer, "bit": flip_bit, "moments": poison_moments}


@pytest.mark.parametrize("kind", HARM)
def test_damage_is_undone(kind: str) -> None:
    """Found within five steps and named; done again as it was, training ends as if nothing had happened."""

    def harm(loop: Plain) -> None:
        if loop.once(61):
            HARM[kind](loop)

    loop = Plain(settings=SAME, harm=harm).run(100)
    (event,) = loop.events
    assert event.action == "rollback" and 61 <= event.step <= 66 and event.to_step == 50
    assert "3." in str(event.tensor) and "3." in event.words
    assert bytes_of(loop.model) == bytes_of(Plain().run(100).model)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_step_that_is_done_again_draws_the_same_numbers(dropout: float) -> None:
    """Also the first one after the state that was put back: its random numbers go back to before it."""

    def harm(loop: Plain) -> None:
        if loop.once(61):
            zero_layer(loop)

    torch.manual_seed(0)
    loop = Plain(settings=SAME, harm=harm, dropout=dropout).run(80)
    assert len(loop.events) == 1
    assert bytes_of(loop.model) == bytes_of(Plain(dropout=dropout).run(80).model)


def test_the_learning_rate_is_lowered_and_comes_back() -> None:
    """Halved, reached again over ten steps, back after fifty more; the optimizer's own setting is never changed."""

    def harm(loop: Plain) -> None:
        assert loop.optim.param_groups[0]["lr"] == 3e-3
        if loop.once(61):
            zero_layer(loop)

    loop = Plain(harm=harm).run(130)
    at = next(place for place, one in enumerate(loop.verdicts) if one.action == Action.ROLLBACK)
    rates = [verdict.learning_rate / 3e-3 for verdict in loop.verdicts]
    assert rates[:at] == [1.0] * at
    after = rates[at + 1 :]
    assert after[:10] == pytest.approx([0.5 * (place + 1) / 11 for place in range(10)])
    assert after[10] == pytest.approx(0.5) and after[35] == pytest.approx(0.75)
    assert after[60:] == pytest.approx([1.0] * len(after[60:]))


def test_a_learning_rate_that_is_a_tensor_comes_back_too() -> None:
    """Lowered for a while after going back, it is the caller's again, to the last digit."""
    model = make_model()
    rate = torch.tensor(3e-3)
    guard = Guard(model, torch.optim.AdamW(model.parameters(), lr=rate))
    guard.lowered, guard.since = 0.5, 0
    for step in range(5):
        inputs, wanted = batch(step)
        loss = (model(inputs) - wanted).square().mean()
        loss.backward()
        guard.step(loss.detach())
        assert float(guard.optimizer.param_groups[0]["lr"]) == pytest.approx(3e-3, rel=1e-6)


def test_the_learning_rate_is_never_negative() -> None:
    """Whatever state training goes back to after it was lowered."""
    guard = Plain().guard
    guard.lowered, guard.since = 0.5, 30
    for guard.steps in range(100):
        assert 0.0 < guard.learning_rate_scale() <= 1.0


@pytest.mark.parametrize(("count", "at", "to"), [(3, 75, 50), (1, 77, 75)])
def test_the_newest_state_may_have_the_damage_in_it(count: int, at: int, to: int) -> None:
    """One that was kept in the very step in which damage shows is not gone back to, unless there is no other."""

    def harm(loop: Plain) -> None:
        if loop.once(at):
            poison_moments(loop)

    loop = Plain(settings=GuardSettings(snapshots=count), harm=harm).run(100)
    assert [(one.action, one.step, one.to_step) for one in loop.events] == [("rollback", at, to)]
    assert is_finite(loop.model)


# -- giving up ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rollbacks", [1, 3])
def test_trouble_without_end_ends_training(rollbacks: int) -> None:
    """After so many times of going back, farther each time, with finite weights of a state that was good."""

    def harm(loop: Plain) -> None:
        if loop.tried[-1] >= 90:
            zero_layer(loop)

    loop = Plain(settings=GuardSettings(rollbacks=rollbacks), harm=harm)
    with pytest.raises(GaveUp) as caught:
        loop.run(200)
    assert [one.action for one in loop.events] == ["rollback"] * rollbacks + ["abort"]
    assert caught.value.event == loop.events[-1] and str(caught.value) == loop.events[-1].words
    targets = [one.to_step for one in loop.events]
    assert targets[:-1] == [75, 50, 25][:rollbacks] and targets == sorted(targets, reverse=True)
    assert is_finite(loop.model) and loop.guard.steps == targets[-1]
    assert bytes_of(loop.model) != bytes_of(make_model())


@pytest.mark.parametrize(("first", "actions"), [(30, ["rollback"] * 3 + ["abort"]), (0, ["abort"])])
def test_losses_that_are_never_a_number_end_training(first: int, actions: list[str]) -> None:
    """Skipped ten in a row it goes back, three times; a loop without one sound step has nothing to go back to."""

    def harm(loop: Plain) -> None:
        if loop.tried[-1] >= first:
            loop.loss = loop.loss * math.nan

    loop = Plain(harm=harm)
    with pytest.raises(GaveUp):
        loop.run(1000)
    assert [one.action for one in loop.events if one.action != "skip_step"] == actions
    assert is_finite(loop.model) and len(loop.tried) <= 200


def test_a_batch_that_makes_trouble_twice_is_set_aside() -> None:
    """Once it has come again after going back; the caller can ask for it, others are not suspected."""

    def harm(loop: Plain) -> None:
        if loop.tried[-1] == 55:
            loop.loss = loop.loss * math.nan
        if loop.once(60):
            zero_layer(loop)

    loop = Plain(harm=harm, extra=Extra(lambda: None, lambda saved: None)).run(80)
    assert [one.action for one in loop.events] == ["skip_step", "rollback", "set_aside", "skip_step"]
    assert loop.events[2].value == 55 and loop.events[2].batch == [55]
    assert [step for step in range(80) if loop.guard.is_set_aside(step)] == [55]
    assert [step for step in range(80) if loop.guard.is_under_suspicion(step)] == [55]


def test_after_a_collapse_batches_unlike_those_before_are_set_aside_untouched() -> None:
    """Ten batches in a row spoil the model, too little each to be noticed. Once the fixed text shows it, each is set
    aside by its own loss with nothing to take back, and at the full learning rate; sound batches are not."""
    model = make_model()
    optim = OPTIMIZERS["AdamW"](model)
    state = {"step": 0, "harm": 0}  # goes back with the weights
    events: list[Event] = []
    guard = Guard(
        model,
        optim,
        settings=GuardSettings(snapshot_every=10, probe_every=5),
        probe=lambda: ProbeReading(2.0 if state["harm"] < 6 else 0.1, 1.0),
        extra=Extra(lambda: dict(state), state.update),
        on_event=events.append,
    )
    while (step := state["step"]) < 110:
        spoils = 60 <= step < 70 and not guard.is_set_aside(step)
        inputs, wanted = batch(step)
        (model(inputs) - wanted).square().mean().backward()
        before, known = bytes_of(model), len(events)
        verdict = guard.step(1.5 if spoils else 1.0 + 0.02 * (step % 3), batch=[step])
        optim.zero_grad()
        if verdict.action == Action.PROCEED:
            state["step"] += 1
            state["harm"] += spoils
        elif [one.action for one in events[known:]] == ["set_aside"]:
            assert bytes_of(model) == before and state["step"] == step
    actions = [one.action for one in events]
    assert actions == ["rollback", *["set_aside"] * 10]
    assert [one.value for one in events[1:]] == list(range(60, 70)) and state["harm"] == 0
    assert events[1].words.startswith("the loss on the batch of step 60 is 1.5, and was 1.02 before")
    assert guard.learning_rate_scale() == 1.0


@pytest.mark.parametrize("value", [2.0, math.nan])
def test_the_callers_own_limits_and_state(value: float) -> None:
    """A figure beyond its limit, or that is no number: back to the last good state, with what the caller keeps."""
    loop, counted = Plain(), {"steps": 0}
    loop.guard = Guard(
        loop.model,
        loop.optim,
        extra=Extra(lambda: dict(counted), counted.update),
        limits=[Limit("tilt", 1.0, lambda: "3.weight")],
        on_event=loop.events.append,
    )
    for step in range(12):
        inputs, wanted = batch(step)
        loss = (loop.model(inputs) - wanted).square().mean()
        loss.backward()
        loop.guard.step(loss.detach(), figures={"tilt": value if step == 11 else 1.0, "other": 1e9})
        counted["steps"] += 1
    (event,) = loop.events
    assert (event.signal, event.tensor, event.to_step) == ("tilt", "3.weight", 0)
    assert counted == {"steps": 1} and bytes_of(loop.model) == bytes_of(make_model())


# -- saved and loaded --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [10, 40, 64, 70])
def test_a_guard_that_is_loaded_goes_on_as_the_one_that_was_saved(stop: int) -> None:
    """Through JSON, before, between and after trouble: the same events and bytes as without the break."""

    def harm(loop: Plain) -> None:
        if loop.tried[-1] in (35, 62):
            loop.loss = loop.loss * math.nan
        if loop.once(75):
            for parameter in loop.model.parameters():
                parameter.grad.mul_(40.0)

    whole = Plain(harm=harm).run(120)
    first = Plain(harm=harm).run(stop)
    second = Plain(harm=harm)
    second.model.load_state_dict(first.model.state_dict())
    second.optim.load_state_dict(first.optim.state_dict())
    second.guard.load_state_dict(json.loads(json.dumps(first.guard.state_dict())))
    second.run(120)
    assert repr(first.events + second.events) == repr(whole.events) and len(whole.events) >= 2
    assert bytes_of(second.model) == bytes_of(whole.model)
    assert second.guard.state_dict() == whole.guard.state_dict()
