"""Every detector fires on what it is for and is silent on trainings that are fine; every cause is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stability.detectors import (
    FIXED_TEXT_LOSS,
    INFORMATION,
    Action,
    Collapse,
    LossSpike,
    RateLeap,
    Trouble,
    UpdateLeap,
    WeightLeap,
)
from stability.diagnosis import find_cause, poisoned_state, with_poisoned_state
from stability.monitor import Monitor
from stability.probe import ProbeReading

STEPS = 600


def lognormal(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0.0, 0.3, STEPS)


LOSSES: dict[str, Callable[[int], np.ndarray]] = {
    "steady": lognormal,
    "falling": lambda seed: lognormal(seed) * (0.1 + 8.0 * np.exp(-np.arange(STEPS) / 60)),
    "to almost nothing": lambda seed: lognormal(seed) * np.exp(-np.arange(STEPS) / 40),
    "below zero": lambda seed: lognormal(seed) - np.arange(STEPS) / 50,
    "always the same": lambda seed: np.full(STEPS, 0.7),
    "zero": lambda seed: np.zeros(STEPS),
}

RATES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "warm-up and cosine": lambda share: min(share / 0.05, 0.5 + 0.5 * math.cos(math.pi * share)),
    "wsd": lambda share: min(1.0, share / 0.05, (1.0 - share) / 0.2),
    "restarts": lambda share: 0.5 + 0.5 * math.cos(math.pi * (4 * share % 1.0)),
    "nothing at first": lambda share: max(0.0, share - 0.1),
}


# -- loss and learning rate --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_of_healthy_trainings_are_no_spikes(kind: str) -> None:
    """Noise of 30 %, around whatever it is."""
    for seed in range(5):
        detector = LossSpike()
        for loss in LOSSES[kind](seed).tolist():
            assert detector.judge(loss) is None
            detector.took(loss)


def test_a_spike_is_found_once_enough_is_known() -> None:
    """Eight deviations (at least two means) above the mean; not in the first twenty steps; the batch is blamed."""
    detector = LossSpike()
    for place in range(20):
        assert detector.judge(1e6) is None and detector.limit() == math.inf
        detector.took(1.0 + 0.01 * (place % 2))
    assert detector.limit() == pytest.approx(3 * 1.005, rel=0.01)
    assert detector.judge(2.9) is None
    trouble = detector.judge(3.2)
    assert trouble is not None and trouble.action == Action.SKIP and trouble.blames_data
    assert (trouble.value, trouble.signal) == (3.2, "loss") and trouble.limit == detector.limit()


def test_a_spike_is_measured_in_deviations_where_losses_vary() -> None:
    """Weights of the moving average, from the definition."""
    losses = np.random.default_rng(3).gamma(0.5, 2.0, 20)
    detector = LossSpike()
    for loss in losses.tolist():
        detector.took(loss)
    weights = 0.97 ** np.arange(19, -1, -1)
    mean = (weights * losses).sum() / weights.sum()
    deviation = math.sqrt((weights * (losses - mean) ** 2).sum() / weights.sum())
    assert deviation > 0.25 * mean
    assert detector.limit() == pytest.approx(mean + 8 * deviation, rel=1e-6)


def test_what_is_usual_is_robust_and_of_the_newest_losses() -> None:
    """Median and three deviations by the median distance, of the last twenty; an outlier among them hardly counts."""
    losses = np.random.default_rng(5).normal(2.0, 0.3, 33)
    losses[-3] = 500.0
    detector = LossSpike()
    for place, loss in enumerate(losses.tolist()):
        if place < 20:
            assert detector.usual()[1] == math.inf
        detector.took(loss)
    newest = losses[-20:]
    median = np.median(newest)
    deviation = np.median(np.abs(newest - median)) / 0.6745
    assert deviation > 0.05 * median
    assert detector.usual() == pytest.approx((median, median + 3 * deviation))
    steady = LossSpike()
    for _ in range(20):
        steady.took(2.0)
    assert steady.usual() == pytest.approx((2.0, 2.3))
    again = LossSpike()
    again.load_state_dict(detector.state_dict())
    assert again.usual() == detector.usual() and again.limit() == detector.limit()
    older = LossSpike()  # a checkpoint of before the newest losses were kept
    older.load_state_dict(detector.state_dict()["average"] | {"largest": detector.largest})
    assert older.limit() == detector.limit() and older.usual()[1] == math.inf


@pytest.mark.parametrize("kind", RATES)
def test_schedules_make_no_leap(kind: str) -> None:
    """Of any of the usual learning rates, in two groups."""
    detector = RateLeap()
    for step in range(STEPS):
        rates = [peak * RATES[kind](step / STEPS) for peak in (1e-3, 1e-5)]
        assert detector.judge(rates, None) is None
        detector.took(rates)


@pytest.mark.parametrize("factor", [11.0, 1000.0, math.inf, math.nan])
def test_a_rate_leaps(factor: float) -> None:
    """More than ten times the largest before, in any group, which is named; nine times may be meant."""
    detector = RateLeap()
    for _ in range(10):
        assert detector.judge([1.0, factor], None) is None
        detector.took([1e-3, 1e-4])
    assert detector.judge([9e-3, 9e-4], None) is None
    assert detector.judge([1e-3, 1e-2], [1e-3, 1e-2]) is None  # the schedule says so
    trouble = detector.judge([1e-3, 1e-4 * factor], [1e-3, 1e-4])
    assert trouble == detector.judge([1e-3, 1e-4 * factor], None) or math.isnan(factor)
    assert trouble is not None and (trouble.action, trouble.tensor) == (Action.SKIP, "group 1")
    assert not trouble.blames_data


# -- weights and updates -----------------------------------------------------------------------------------


def walk(weights: list[float], ratios: list[float], seen: WeightLeap, steps: int = 4) -> list[float]:
    """Norms after some steps that change them by these shares of their size."""
    for _ in range(steps):
        weights = [norm * (1.0 + ratio) for norm, ratio in zip(weights, ratios, strict=True)]
        seen.took([abs(ratio) for ratio in ratios])
    return weights


def test_weights_may_change_as_far_as_steps_account_for() -> None:
    """Growth and decay by the sum of the steps, and by a little besides."""
    for ratio in (-0.3, -0.01, 0.0, 0.05, 0.9):
        detector = WeightLeap(["a", "b"])
        norms = [2.0, 1e-3]
        assert detector.judge(dict(enumerate(norms))) is None
        for _ in range(10):
            norms = walk(norms, [ratio, 0.0], detector)
            assert detector.judge(dict(enumerate(norms))) is None


@pytest.mark.parametrize("norm", [0.0, 1.8, 2.3, 1e30, math.inf, math.nan])
def test_a_weight_that_leaps_is_named(norm: float) -> None:
    """More than 10 % that no step accounts for, in either direction; data is not to blame."""
    detector = WeightLeap(["a", "b", "c"])
    detector.judge({0: 1.0, 1: 2.0, 2: 3.0})
    detector.took([0.0, 1e-4, 0.0])
    trouble = detector.judge({0: 1.01, 1: norm, 2: 3.0})
    assert trouble is not None and (trouble.action, trouble.tensor) == (Action.ROLLBACK, "b")
    assert not trouble.blames_data and "b" in trouble.words


def test_of_many_leaps_the_farthest_is_named() -> None:
    """One that is not finite before all others."""
    detector = WeightLeap(["a", "b", "c"])
    detector.judge({0: 1.0, 1: 1.0, 2: 1.0})
    farthest = detector.judge({0: 2.0, 1: 1e9, 2: 1e-3})
    broken = detector.judge({0: 0.0, 1: math.nan, 2: 1e9})
    assert farthest is not None and farthest.tensor == "b"
    assert broken is not None and broken.tensor == "b"


def test_weights_that_begin_at_zero_may_grow() -> None:
    """From nothing to anything; what was put back is not compared with what was before."""
    detector = WeightLeap(["a"])
    for norm in (0.0, 0.0, 5.0):
        assert detector.judge({0: norm}) is None
    assert detector.judge({0: 50.0}) is not None
    detector.forget()
    assert detector.judge({0: 50.0}) is None


def trained(
    schedule: Callable[[float], float], steps: int, zeros: int = 0, peak: float = 3e-3
) -> list[Trouble]:
    """What the detectors of weights say of a real training with AdamW. ``zeros``: a bias of zeros whose gradient is 0
    for so many steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))
    nn.init.zeros_(model[3].bias)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.01)
    monitor = Monitor(model, optimizer)
    updates, weights = UpdateLeap(monitor.names, monitor.weights), WeightLeap(monitor.names)
    draw, found = torch.Generator().manual_seed(1), []
    for step in range(steps):
        rate = peak * schedule(step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs = torch.randn(16, 6, generator=draw)
        ((model(inputs) - inputs[:, :2] - 1.0) ** 2).mean().backward()
        if step < zeros:
            model[3].bias.grad.zero_()
        before = monitor.before(0.0)
        optimizer.step()
        ratios = monitor.after()
        found += [
            one
            for one in (weights.judge(before.weights), updates.judge(ratios, before.gradients, [rate] * 6))
            if one
        ]
        weights.took(ratios)
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("kind", RATES)
def test_updates_of_healthy_trainings_are_fine(kind: str) -> None:
    """Under every schedule, weights at zero and norms at one among them."""
    assert trained(RATES[kind], STEPS) == []


def test_steps_that_round_to_nothing_are_fine() -> None:
    """At the end of a cosine to zero a step is less than the last digit of a weight of one: nothing is poisoned."""
    assert trained(RATES["warm-up and cosine"], STEPS, peak=1e-4) == []


def test_a_weight_of_zeros_may_begin_late() -> None:
    """A bias at zero that gets its first gradient after thirty steps may more than double in the next."""
    assert trained(lambda share: 1.0, 60, zeros=30) == []


RATE = [1e-3, 1e-3]


def leap(names: int = 2, elements: int = 64) -> UpdateLeap:
    return UpdateLeap([f"w{place}" for place in range(names)], [torch.zeros(elements)] * names)


def steady(steps: int = 30, elements: int = 64) -> UpdateLeap:
    detector = leap(2, elements)
    for _ in range(steps):
        assert detector.judge([0.01, 0.01], [1.0, 1.0], RATE) is None
    return detector


def test_a_step_that_overwrites_a_weight_is_named() -> None:
    """Larger than the weight and than ten usual steps; where that is usual it is not; any that is not finite."""
    assert steady().judge([0.01, 0.9], [1.0, 1.0], RATE) is None
    for value in (1.1, 1e9, math.nan, math.inf):
        trouble = steady().judge([0.01, value], [1.0, 1.0], RATE)
        assert trouble is not None and (trouble.tensor, trouble.action) == ("w1", Action.ROLLBACK)
    large = leap(1)
    for _ in range(30):
        assert large.judge([0.5], [1.0], [1e-3]) is None
    assert large.judge([4.9], [1.0], [1e-3]) is None and large.judge([20.0], [1.0], [1e-3]) is not None
    assert steady(19).judge([0.01, 1e9], [1.0, 1.0], RATE) is None


def test_small_weights_are_judged_for_being_finite_only() -> None:
    """A bias of 63 elements may pass through zero, where any step is large, or stand still."""
    assert steady(elements=63).judge([0.01, 50.0], [1.0, 1.0], RATE) is None
    detector = steady(elements=63)
    assert [detector.judge([0.0, 0.0], [1.0, 1.0], RATE) for _ in range(5)] == [None] * 5
    assert steady(elements=63).judge([0.01, math.nan], [1.0, 1.0], RATE) is not None


def test_a_weight_that_stands_still_is_named() -> None:
    """In the third step, and only against its gradient: neither without one nor with a lower rate of its own, nor where
    such small steps are rounded away."""
    detector = steady()
    found = [detector.judge([0.01, 1e-6], [1.0, 1.0], RATE) for _ in range(3)]
    assert found[:2] == [None, None] and found[2] is not None and found[2].tensor == "w1"
    for ratio, gradient, rate in (
        (0.0, 0.0, 1e-3),
        (0.01 * 1e-3, 1.0, 1e-6),
        (0.0, 1.0, 0.0),
        (0.0, 1.0, 1e-7),
    ):
        detector = steady()
        assert [detector.judge([0.01, ratio], [1.0, gradient], [1e-3, rate]) for _ in range(10)] == [
            None
        ] * 10


@pytest.mark.parametrize("stop", [10, 31, 32])
def test_update_state_goes_through_json(stop: int) -> None:
    """What is loaded judges as what was saved, also where a weight stands still already."""
    steps = [[0.01, 0.01]] * 30 + [[0.01, 1e-6]] * 3
    one, other = leap(), leap()
    for ratios in steps[:stop]:
        one.judge(ratios, [1.0, 1.0], RATE)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    found = [
        (one.judge(ratios, [1.0, 1.0], RATE), other.judge(ratios, [1.0, 1.0], RATE))
        for ratios in steps[stop:]
    ]
    assert all(mine == theirs for mine, theirs in found) and found[-1][0] is not None
    for bad in (leap(3).state_dict(), {}):
        with pytest.raises((ValueError, KeyError)):
            other.load_state_dict(bad)


# -- the fixed text ----------------------------------------------------------------------------------------


def reading(information: float, loss: float | None = None) -> ProbeReading:
    return ProbeReading(information, 1.0, loss)


def test_readings_of_a_model_that_learns_are_fine() -> None:
    """From nothing at all to much, with losses that vary; a little information more or less means nothing."""
    detector = Collapse()
    random = np.random.default_rng(0)
    for step in range(200):
        most = 2.0 * (1 - math.exp(-step / 30))
        found = reading(most * random.uniform(0.7, 1.0), (3.0 - most) * random.lognormal(0.0, 0.2))
        assert detector.judge(found) is None
    little = Collapse()
    assert [little.judge(reading(value)) for value in (0.29, 0.0, 0.29, 0.001)] == [None] * 4


def test_a_collapse_is_found() -> None:
    """Less than 0.4 of what was said before; three times the loss; output that is not finite."""
    detector = Collapse()
    assert detector.judge(reading(2.0, 0.5)) is None and detector.judge(reading(1.0, 1.4)) is None
    detector = Collapse()
    detector.judge(reading(2.0, 0.5))
    for bad, signal in (
        (reading(0.79, 0.5), INFORMATION),
        (reading(2.0, 1.6), FIXED_TEXT_LOSS),
        (reading(math.nan, 0.5), INFORMATION),
        (reading(2.0, math.nan), FIXED_TEXT_LOSS),
    ):
        trouble = detector.judge(bad)
        assert trouble is not None and (trouble.signal, trouble.action) == (signal, Action.ROLLBACK)
    assert detector.judge(reading(0.81, 1.4)) is None
    assert detector.is_fine(1.7) and not detector.is_fine(1.5) and detector.is_fine(None)


def test_a_first_loss_that_is_no_number_spoils_nothing() -> None:
    """Readings after it are judged by themselves."""
    detector = Collapse()
    detector.judge(reading(1.0, math.nan))
    assert detector.judge(reading(1.0, 0.5)) is None


# -- causes ------------------------------------------------------------------------------------------------


def a_step(optimizer: str = "AdamW") -> tuple[nn.Sequential, Monitor, WeightLeap]:
    """A model some steps into its training, after a backward pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2))
    monitor = Monitor(model, getattr(torch.optim, optimizer)(model.parameters(), lr=1e-3))
    weights = WeightLeap(monitor.names)
    for _ in range(5):
        model(torch.randn(8, 4)).square().mean().backward()
        weights.judge(monitor.before(0.0).weights)
        monitor.optimizer.step()
        weights.took(monitor.after())
    return model, monitor, weights


def batch_with(value: float) -> dict[str, Tensor]:
    return {
        "tokens": torch.zeros(3, dtype=torch.int64),
        "fine": torch.ones(2),
        "targets": torch.tensor([1.0, value]),
    }


@pytest.mark.parametrize(
    ("fault", "named", "action"),
    [
        ("weight nan", "1.weight", Action.ROLLBACK),
        ("weight leap", "1.weight", Action.ROLLBACK),
        ("state", "exp_avg_sq of 1.weight", Action.ROLLBACK),
        ("batch", "batch: targets", Action.SKIP),
        ("gradient", "1.weight", Action.SKIP),
        ("nothing", None, Action.SKIP),
    ],
)
def test_the_first_cause_is_named(fault: str, named: str | None, action: Action) -> None:
    """Everything that follows from it is broken too: gradients of the layers before, and the loss where it would be."""
    model, monitor, weights = a_step()
    loss, value = math.nan, math.nan if fault == "batch" else 0.0
    if fault == "weight nan":
        model[1].weight.data[0, 0] = math.nan
    elif fault == "weight leap":
        model[1].weight.data[0, 0] = 1e30
    elif fault == "state":
        monitor.optimizer.state[model[1].weight]["exp_avg_sq"][2, 2] = math.inf
    elif fault == "gradient":
        loss = 1.0
        for parameter in (*model[0].parameters(), model[1].weight):
            parameter.grad[0] = math.inf
    trouble = find_cause(monitor.before(loss), monitor, weights, lambda: batch_with(value))
    assert (trouble.tensor, trouble.action) == (named, action)
    assert trouble.blames_data == (action == Action.SKIP)
    assert fault in ("nothing", "batch") or "1.weight" in trouble.words


@pytest.mark.parametrize(
    "betas", [(0.9, 0.999), (0.9, 0.95), (0.0, 0.5), (0.95, 0.98), (0.5, 0.3), (0.99, 0.999)]
)
@pytest.mark.parametrize("seed", range(4))
def test_moments_of_any_gradients_are_sound(betas: tuple[float, float], seed: int) -> None:
    """|m| ≤ c √v: gradients of every size and sign, in bursts, as steep as they may be, through PyTorch's own AdamW."""
    draw = np.random.default_rng(seed)
    model = nn.Linear(4, 4, bias=False)
    monitor = Monitor(model, torch.optim.AdamW(model.parameters(), lr=0.0, betas=betas))
    steep = (
        betas[1] / betas[0] if betas[0] else 1.0
    )  # the sequence for which Cauchy and Schwarz's bound is met
    for step in range(120):
        sizes = np.exp(draw.normal(0.0, 8.0, (4, 4))) * (draw.random((4, 4)) < (1.0, 0.1)[seed % 2])
        gradient = (
            np.full((4, 4), 1e-9 * steep ** min(step, 60)) if seed == 3 else sizes * draw.normal(size=(4, 4))
        )
        model.weight.grad = torch.from_numpy(gradient).float()
        monitor.optimizer.step()
        assert poisoned_state(monitor, 0) is None


@pytest.mark.parametrize(
    ("poison", "named"),
    [
        (lambda state: state["exp_avg"].mul_(1e4), "exp_avg"),
        (lambda state: state["exp_avg_sq"].zero_(), "exp_avg_sq"),
        (lambda state: state["exp_avg_sq"].neg_(), "exp_avg_sq"),
        (lambda state: state["exp_avg"].view(-1)[3:4].fill_(math.nan), "exp_avg"),
    ],
)
def test_poisoned_moments_are_found(poison: Callable[[dict[str, Tensor]], Tensor], named: str) -> None:
    """And trouble with the weight they belong to names them, with trouble elsewhere left as it is."""
    model, monitor, _ = a_step()
    poison(monitor.optimizer.state[model[1].weight])
    place = monitor.names.index("1.weight")
    found = poisoned_state(monitor, place)
    assert found is not None and named in found and found.endswith("of 1.weight")
    trouble = Trouble(Action.ROLLBACK, "update ratio", "1.weight", 9.0, 1.0, "it leapt")
    assert with_poisoned_state(trouble, monitor).tensor == found
    for other in ("2.weight", "group 0", None):
        elsewhere = Trouble(Action.ROLLBACK, "update ratio", other, 9.0, 1.0, "it leapt")
        assert with_poisoned_state(elsewhere, monitor) == elsewhere


@pytest.mark.parametrize(
    "optimizer", ["SGD", "Adagrad", "RMSprop", "Adamax", "NAdam", "RAdam", "Adafactor", "Rprop"]
)
def test_other_optimizers_are_not_accused(optimizer: str) -> None:
    """Whatever they keep."""
    _, monitor, weights = a_step(optimizer)
    assert [poisoned_state(monitor, place) for place in range(6)] == [None] * 6
    assert find_cause(monitor.before(math.nan), monitor, weights, None).tensor is None
