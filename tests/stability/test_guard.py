"""The guard around a plain PyTorch loop: any module, any optimizer, no probe."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stability import Event, Extra, GaveUp, Guard, GuardSettings, Hooks, Limit, ProbeReading
from stability.detectors import Action
from tests.support.training import OPTIMIZERS, Harm, Plain, batch, is_finite, make_model

SAME = GuardSettings(lower=1.0, rewarm=0)  # what goes back is done again as it was


def bytes_of(model: nn.Module) -> list[bytes]:
    return [parameter.detach().numpy().tobytes() for parameter in model.parameters()]


def when(due: Callable[[int], bool], harm: Harm) -> Harm:
    """Harm at every try of the steps that are due."""
    return lambda loop: harm(loop) if due(loop.tried[-1]) else None


def once(step: int, harm: Harm) -> Harm:
    """Harm at the first try of a step."""
    return lambda loop: harm(loop) if loop.tried[-1] == step not in loop.tried[:-1] else None


def spoil_loss(loop: Plain) -> None:
    loop.loss = loop.loss * math.nan


def scale_gradients(loop: Plain) -> None:
    for parameter in loop.model.parameters():
        parameter.grad.mul_(40.0)


def zero_layer(loop: Plain) -> None:
    for parameter in loop.model[3].parameters():
        parameter.data.zero_()


def flip_bit(loop: Plain) -> None:
    loop.model[3].weight.data.view(-1)[7:8].view(torch.int32).bitwise_xor_(1 << 30)


def poison_moments(loop: Plain) -> None:
    loop.optim.state[loop.model[3].weight]["exp_avg"].mul_(1e4)


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


# -- nothing is wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "scales"), [("SGD", (0.1, 1.0, 100.0)), ("AdamW", (1e-8, 1.0, 100.0))]
)
def test_a_healthy_loop_is_what_it_would_be_without(
    optimizer: str, scales: tuple[float, ...]
) -> None:
    """No event, and the bytes of plain clipping and stepping, for huge and tiny gradients."""
    for scale in scales:
        loop = Plain(optimizer, GuardSettings(max_norm=1.0), scale=scale).run(150)
        assert loop.events == [] and loop.tried == list(range(150)), scale
        assert all(verdict.action == Action.PROCEED for verdict in loop.verdicts), scale
        assert bytes_of(loop.model) == bytes_of(unguarded(optimizer, 150, scale)), scale
        if scale == 1.0:
            assert bytes_of(loop.model)[0] != bytes_of(make_model())[0]


def test_a_verdict_says_what_was_done() -> None:
    """Norm before clipping, limit, learning rate, and the largest update-to-weight ratio."""
    loop = Plain("SGD", GuardSettings(max_norm=0.05)).run(3)
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
    """A gradient of forty times the usual, below the fixed limit: cut, and the log says how far."""
    settings = GuardSettings(max_norm=1e6)
    loop = Plain("SGD", settings, when(lambda step: step == 40, scale_gradients)).run(41)
    (event,), verdict = loop.events, loop.verdicts[-1]
    norms = [verdict.totals["all"] for verdict in loop.verdicts]
    assert (event.action, event.step) == ("clip", 40)
    assert event.value == norms[-1] and event.limit == verdict.limits["all"] < 0.5 * norms[-1]
    assert verdict.limits["all"] > max(norms[20:40])


# -- steps that are left out ---------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("at", [0, 30])
def test_a_loss_that_is_no_number_is_skipped(optimizer: str, at: int) -> None:
    """Weights and moments are as if that step had not been, from the first step on."""
    seen: list[Any] = []

    def harm(loop: Plain) -> None:
        if loop.tried[-1] in (at, at + 1):
            seen.append((bytes_of(loop.model), repr(loop.optim.state_dict())))
        if loop.tried[-1] == at:
            spoil_loss(loop)
            for parameter in loop.model.parameters():
                parameter.grad.fill_(math.nan)

    loop = Plain(optimizer, harm=harm).run(60)
    assert len(seen) == 2 and seen[0] == seen[1]
    assert [(one.action, one.step, one.batch) for one in loop.events] == [("skip_step", at, [at])]
    assert loop.events[0].signal == "non-finite loss" and f"step {at}" in loop.events[0].message
    assert is_finite(loop.model) and loop.tried == list(range(60))


def test_a_step_is_skipped_and_its_cause_named() -> None:
    """The weight of an infinite gradient, or the batch of a loss far above the usual."""

    def spoil_gradient(loop: Plain) -> None:
        loop.model[3].weight.grad[2, 3] = math.inf

    def raise_loss(loop: Plain) -> None:
        loop.loss = 20.0 * loop.loss

    for at, harm, signal, tensor in (
        (5, spoil_gradient, "non-finite gradient", "3.weight"),
        (50, raise_loss, "loss", None),
    ):
        loop = Plain(harm=once(at, harm)).run(at + 10)
        (event,) = loop.events
        assert (event.action, event.signal, event.tensor) == ("skip_step", signal, tensor)
        assert event.batch == [at] and str(tensor or "") in event.message, signal
        assert is_finite(loop.model), signal


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
        loop.loss = 50.0 * loop.loss

    loop = Plain(harm=when(lambda step: step >= 60, harm)).run(150)
    assert [one.action for one in loop.events].count("rollback") == 1
    assert loop.events[-1].step < 90 and {one.signal for one in loop.events} == {"loss"}


# -- going back ----------------------------------------------------------------------------------


def test_damage_is_undone() -> None:
    """Found within five steps and named; done again, training ends as if nothing had happened."""
    expected = bytes_of(Plain().run(100).model)
    for harm in (zero_layer, flip_bit, poison_moments):
        loop = Plain(settings=SAME, harm=once(61, harm)).run(100)
        (event,) = loop.events
        assert event.action == "rollback" and 61 <= event.step <= 66 and event.to_step == 50, harm
        assert "3." in str(event.tensor) and "3." in event.message, harm
        assert bytes_of(loop.model) == expected, harm


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_step_that_is_done_again_draws_the_same_numbers(dropout: float) -> None:
    """Also the first one after the state that was put back, whose random numbers go back too."""
    torch.manual_seed(0)
    loop = Plain(settings=SAME, harm=once(61, zero_layer), dropout=dropout).run(80)
    assert len(loop.events) == 1
    assert bytes_of(loop.model) == bytes_of(Plain(dropout=dropout).run(80).model)


def test_the_learning_rate_is_lowered_and_comes_back() -> None:
    """Halved, reached again in ten steps, back after fifty more; the optimizer's setting stays."""
    damage = once(61, zero_layer)

    def harm(loop: Plain) -> None:
        assert loop.optim.param_groups[0]["lr"] == 3e-3
        damage(loop)

    loop = Plain(harm=harm).run(130)
    actions = [one.action for one in loop.verdicts]
    at = actions.index(Action.ROLLBACK)
    rates = [verdict.learning_rate / 3e-3 for verdict in loop.verdicts]
    assert rates[:at] == [1.0] * at
    after = rates[at + 1 :]
    assert after[:10] == pytest.approx([0.5 * (place + 1) / 11 for place in range(10)])
    assert after[10] == pytest.approx(0.5) and after[35] == pytest.approx(0.75)
    assert after[60:] == pytest.approx([1.0] * len(after[60:]))


def test_a_learning_rate_that_is_a_tensor_comes_back_too() -> None:
    """Lowered after going back, never to nothing, it is the caller's again, to the last digit."""
    model = make_model()
    rate = torch.tensor(3e-3)
    guard = Guard(model, torch.optim.AdamW(model.parameters(), lr=rate))
    guard.state.rate_scale, guard.state.rate_from = 0.5, 0
    for step in range(5):
        inputs, wanted = batch(step)
        loss = (model(inputs) - wanted).square().mean()
        loss.backward()
        guard.step(loss.detach())
        assert float(guard.optimizer.param_groups[0]["lr"]) == pytest.approx(3e-3, rel=1e-6)
    guard.state.rate_from = 30  # whatever state training goes back to
    for guard.state.steps in range(100):
        assert 0.0 < guard.learning_rate_scale() <= 1.0, guard.state.steps


def test_the_newest_state_may_have_the_damage_in_it() -> None:
    """A state kept in the very step in which damage shows is only used if there is no other."""
    for count, at, to in ((3, 75, 50), (1, 77, 75)):
        settings = GuardSettings(snapshots=count)
        loop = Plain(settings=settings, harm=once(at, poison_moments)).run(100)
        events = [(one.action, one.step, one.to_step) for one in loop.events]
        assert events == [("rollback", at, to)], count
        assert is_finite(loop.model), count


# -- giving up -----------------------------------------------------------------------------------


def test_trouble_without_end_ends_training() -> None:
    """After so many returns, farther each time, with finite weights of a state that was good."""
    for rollbacks in (1, 3):
        harm = when(lambda step: step >= 90, zero_layer)
        loop = Plain(settings=GuardSettings(rollbacks=rollbacks), harm=harm)
        with pytest.raises(GaveUp) as caught:
            loop.run(200)
        assert [one.action for one in loop.events] == ["rollback"] * rollbacks + ["abort"]
        assert caught.value.event == loop.events[-1], rollbacks
        assert str(caught.value) == loop.events[-1].message, rollbacks
        targets = [one.to_step for one in loop.events]
        assert targets[:-1] == [75, 50, 25][:rollbacks]
        assert targets == sorted(targets, reverse=True), rollbacks
        assert is_finite(loop.model) and loop.guard.state.steps == targets[-1], rollbacks
        assert bytes_of(loop.model) != bytes_of(make_model()), rollbacks


def test_losses_that_are_never_a_number_end_training() -> None:
    """Ten in a row go back, three times; without one sound step there is nothing to go back to."""
    for first, actions in ((30, ["rollback"] * 3 + ["abort"]), (0, ["abort"])):
        loop = Plain(harm=when(lambda step, first=first: step >= first, spoil_loss))
        with pytest.raises(GaveUp):
            loop.run(1000)
        assert [one.action for one in loop.events if one.action != "skip_step"] == actions, first
        assert is_finite(loop.model) and len(loop.tried) <= 200, first


def test_a_batch_that_makes_trouble_twice_is_set_aside() -> None:
    """Once it has come again after going back; the caller can ask for it, others are sound."""
    spoil, damage = when(lambda step: step == 55, spoil_loss), once(60, zero_layer)

    def harm(loop: Plain) -> None:
        spoil(loop)
        damage(loop)

    loop = Plain(harm=harm, extra=Extra(lambda: None, lambda saved: None)).run(80)
    actions = [one.action for one in loop.events]
    assert actions == ["skip_step", "rollback", "set_aside", "skip_step"]
    assert loop.events[2].value == 55 and loop.events[2].batch == [55]
    assert [step for step in range(80) if loop.guard.is_quarantined(step)] == [55]
    assert [step for step in range(80) if loop.guard.is_suspect(step)] == [55]


def test_after_a_collapse_batches_unlike_those_before_are_set_aside_untouched() -> None:
    """Ten batches in a row spoil the model, too little each to be noticed.

    Once the fixed text shows it, each is set aside by its own loss, with nothing to take back and
    at the full learning rate; sound batches are not.
    """
    model = make_model()
    optim = OPTIMIZERS["AdamW"](model)
    state = {"step": 0, "harm": 0}  # goes back with the weights
    events: list[Event] = []
    guard = Guard(
        model,
        optim,
        settings=GuardSettings(snapshot_every=10, probe_every=5),
        hooks=Hooks(
            probe=lambda: ProbeReading(2.0 if state["harm"] < 6 else 0.1, 1.0),
            extra=Extra(lambda: dict(state), state.update),
            on_event=events.append,
        ),
    )
    while (step := state["step"]) < 110:
        spoils = 60 <= step < 70 and not guard.is_quarantined(step)
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
    assert [one.action for one in events] == ["rollback", *["set_aside"] * 10]
    assert [one.value for one in events[1:]] == list(range(60, 70)) and state["harm"] == 0
    assert all(part in events[1].message for part in ("step 60", "1.5", "1.02"))
    assert guard.learning_rate_scale() == 1.0


def test_the_callers_own_limits_and_state() -> None:
    """A figure beyond its limit or not a number: back, with what the caller keeps."""
    for value in (2.0, math.nan):
        loop, counted = Plain(), {"steps": 0}
        loop.guard = Guard(
            loop.model,
            loop.optim,
            hooks=Hooks(
                extra=Extra(lambda counted=counted: dict(counted), counted.update),
                limits=[Limit("tilt", 1.0, lambda: "3.weight")],
                on_event=loop.events.append,
            ),
        )
        for step in range(12):
            inputs, wanted = batch(step)
            loss = (loop.model(inputs) - wanted).square().mean()
            loss.backward()
            tilt = value if step == 11 else 1.0
            loop.guard.step(loss.detach(), stats={"tilt": tilt, "other": 1e9})
            counted["steps"] += 1
        (event,) = loop.events
        assert (event.signal, event.tensor, event.to_step) == ("tilt", "3.weight", 0), value
        assert counted == {"steps": 1}, value
        assert bytes_of(loop.model) == bytes_of(make_model()), value


# -- saved and loaded ----------------------------------------------------------------------------


def test_a_guard_that_is_loaded_goes_on_as_the_one_that_was_saved() -> None:
    """Through JSON, before, between and after trouble: the events and bytes of no break."""
    spoil, grow = when(lambda step: step in (35, 62), spoil_loss), once(75, scale_gradients)

    def harm(loop: Plain) -> None:
        spoil(loop)
        grow(loop)

    whole = Plain(harm=harm).run(90)
    assert len(whole.events) >= 2
    first = Plain(harm=harm)
    for stop in (10, 40, 64, 70):
        first.run(stop)
        second = Plain(harm=harm)
        second.model.load_state_dict(first.model.state_dict())
        second.optim.load_state_dict(copy.deepcopy(first.optim.state_dict()))
        second.guard.load_state_dict(json.loads(json.dumps(first.guard.state_dict())))
        second.run(90)
        assert repr(first.events + second.events) == repr(whole.events), stop
        assert bytes_of(second.model) == bytes_of(whole.model), stop
        assert second.guard.state_dict() == whole.guard.state_dict(), stop
