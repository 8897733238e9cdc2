"""Every detector fires on what it is for, not on sound trainings; every cause is named.

Over 400 lines because every detector is tested on the same kinds of training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stability.detectors import (
    INFORMATION,
    PROBE_LOSS,
    Action,
    Anomaly,
    Collapse,
    LearningRateJump,
    LossSpike,
    UpdateJump,
    WeightJump,
)
from stability.diagnosis import find_cause, poisoned_state, with_poisoned_state
from stability.measures.monitor import Monitor
from stability.measures.probe import ProbeReading

STEPS = 600
PLACE = np.arange(STEPS)
LOSSES: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # of noise around 1
    "steady": lambda noise: noise,
    "falling": lambda noise: noise * (0.1 + 8.0 * np.exp(-PLACE / 60)),
    "to almost nothing": lambda noise: noise * np.exp(-PLACE / 40),
    "below zero": lambda noise: noise - PLACE / 50,
    "always the same": lambda noise: np.full(STEPS, 0.7),
    "zero": lambda noise: np.zeros(STEPS),
}
RATES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "warm-up and cosine": lambda share: min(share / 0.05, 0.5 + 0.5 * math.cos(math.pi * share)),
    "wsd": lambda share: min(1.0, share / 0.05, (1.0 - share) / 0.2),
    "restarts": lambda share: 0.5 + 0.5 * math.cos(math.pi * (4 * share % 1.0)),
    "nothing at first": lambda share: max(0.0, share - 0.1),
}


# -- loss and learning rate ----------------------------------------------------------------------


def took(losses: np.ndarray) -> LossSpike:
    detector = LossSpike()
    for loss in losses.tolist():
        detector.update(loss)
    return detector


def test_losses_of_healthy_trainings_are_no_spikes() -> None:
    """Noise of 30 %, around whatever it is."""
    for kind, made_of in LOSSES.items():
        for seed in range(5):
            detector = LossSpike()
            noise = np.random.default_rng(seed).lognormal(0.0, 0.3, STEPS)
            for step, loss in enumerate(made_of(noise).tolist()):
                assert detector.judge(loss) is None, (kind, seed, step)
                detector.update(loss)


def test_a_spike_is_found_once_enough_is_known() -> None:
    """Eight deviations (two means at least) above the mean, after twenty steps; data is blamed."""
    detector = LossSpike()
    for place in range(20):
        assert detector.judge(1e6) is None and detector.limit() == math.inf
        detector.update(1.0 + 0.01 * (place % 2))
    assert detector.limit() == pytest.approx(3 * 1.005, rel=0.01)
    assert detector.judge(2.9) is None
    trouble = detector.judge(3.2)
    assert trouble is not None and trouble.action == Action.SKIP and trouble.suspects_data
    assert (trouble.value, trouble.signal) == (3.2, "loss") and trouble.limit == detector.limit()
    losses = np.random.default_rng(3).gamma(0.5, 2.0, 20)
    weights = 0.97 ** np.arange(19, -1, -1)  # of the moving average
    mean = (weights * losses).sum() / weights.sum()
    deviation = math.sqrt((weights * (losses - mean) ** 2).sum() / weights.sum())
    assert deviation > 0.25 * mean
    assert took(losses).limit() == pytest.approx(mean + 8 * deviation, rel=1e-6)


def test_what_is_usual_is_robust_and_of_the_newest_losses() -> None:
    """Median and three robust deviations of the last twenty; an outlier hardly counts."""
    losses = np.random.default_rng(5).normal(2.0, 0.3, 33)
    losses[-3] = 500.0
    for count in range(20):
        assert took(losses[:count]).usual()[1] == math.inf, count
    detector = took(losses)
    newest = losses[-20:]
    median = np.median(newest)
    deviation = np.median(np.abs(newest - median)) / 0.6745
    assert deviation > 0.05 * median
    assert detector.usual() == pytest.approx((median, median + 3 * deviation))
    assert took(np.full(20, 2.0)).usual() == pytest.approx((2.0, 2.3))
    again = LossSpike()
    again.load_state_dict(detector.state_dict())
    assert again.usual() == detector.usual() and again.limit() == detector.limit()
    older = LossSpike()  # a checkpoint of before the newest losses were kept
    older.load_state_dict(detector.state_dict()["average"] | {"largest": detector.largest})
    assert older.limit() == detector.limit() and older.usual()[1] == math.inf


def test_schedules_make_no_leap() -> None:
    """Of any of the usual learning rates, in two groups."""
    for kind, schedule in RATES.items():
        detector = LearningRateJump()
        for step in range(STEPS):
            rates = [peak * schedule(step / STEPS) for peak in (1e-3, 1e-5)]
            assert detector.judge(rates, None) is None, (kind, step)
            detector.update(rates)


def test_a_rate_leaps() -> None:
    """More than ten times the largest before, in any group, which is named; nine may be meant."""
    for factor in (11.0, 1000.0, math.inf, math.nan):
        detector = LearningRateJump()
        for _ in range(10):
            assert detector.judge([1.0, factor], None) is None, factor
            detector.update([1e-3, 1e-4])
        assert detector.judge([9e-3, 9e-4], None) is None, factor
        assert detector.judge([1e-3, 1e-2], [1e-3, 1e-2]) is None, factor  # the schedule says so
        trouble = detector.judge([1e-3, 1e-4 * factor], [1e-3, 1e-4])
        unplanned = detector.judge([1e-3, 1e-4 * factor], None)
        assert trouble == unplanned or math.isnan(factor), factor
        assert trouble is not None and not trouble.suspects_data, factor
        assert (trouble.action, trouble.tensor) == (Action.SKIP, "group 1"), factor


# -- weights and updates -------------------------------------------------------------------------


def test_weights_may_change_as_far_as_steps_account_for() -> None:
    """Growth and decay by the sum of the steps, and by a little besides."""
    for ratio in (-0.3, -0.01, 0.0, 0.05, 0.9):
        detector = WeightJump(["a", "b"])
        norms = [2.0, 1e-3]
        assert detector.judge(dict(enumerate(norms))) is None
        for look in range(10):
            for _ in range(4):
                norms[0] *= 1.0 + ratio
                detector.update([abs(ratio), 0.0])
            assert detector.judge(dict(enumerate(norms))) is None, (ratio, look)


def test_a_weight_that_leaps_is_named() -> None:
    """By over 10 % that no step accounts for; of many the farthest, and not finite before all."""
    for norm in (0.0, 1.8, 2.3, 1e30, math.inf, math.nan):
        detector = WeightJump(["a", "b", "c"])
        detector.judge({0: 1.0, 1: 2.0, 2: 3.0})
        detector.update([0.0, 1e-4, 0.0])
        trouble = detector.judge({0: 1.01, 1: norm, 2: 3.0})
        assert trouble is not None and "b" in trouble.message, norm
        assert (trouble.action, trouble.tensor) == (Action.ROLLBACK, "b"), norm
        assert not trouble.suspects_data, norm
    detector = WeightJump(["a", "b", "c"])
    detector.judge({0: 1.0, 1: 1.0, 2: 1.0})
    for norms in ({0: 2.0, 1: 1e9, 2: 1e-3}, {0: 0.0, 1: math.nan, 2: 1e9}):
        trouble = detector.judge(norms)
        assert trouble is not None and trouble.tensor == "b", norms


def test_weights_that_begin_at_zero_may_grow() -> None:
    """From nothing to anything; weights that are put back are not compared with earlier ones."""
    detector = WeightJump(["a"])
    for norm in (0.0, 0.0, 5.0):
        assert detector.judge({0: norm}) is None
    assert detector.judge({0: 50.0}) is not None
    detector.reset()
    assert detector.judge({0: 50.0}) is None


def trained(
    schedule: Callable[[float], float], *, peak: float = 3e-3, zeros: int = 0, width: int = 64
) -> list[Anomaly]:
    """What the detectors of weights say of a real training with AdamW, in 300 steps.

    ``zeros``: a bias of zeros whose gradient is 0 for so many steps; ``width``: with less than 64,
    no weight is large enough for its updates to be judged.
    """
    torch.manual_seed(0)
    parts = nn.Linear(6, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, 2)
    model = nn.Sequential(*parts)
    nn.init.zeros_(model[3].bias)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.01)
    monitor = Monitor(model, optimizer)
    updates, weights = UpdateJump(monitor.names, monitor.weights), WeightJump(monitor.names)
    draw, found = torch.Generator().manual_seed(1), []
    for step in range(300):
        rate = peak * schedule(step / 300)
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs = torch.randn(16, 6, generator=draw)
        ((model(inputs) - inputs[:, :2] - 1.0) ** 2).mean().backward()
        if step < zeros:
            model[3].bias.grad.zero_()
        before = monitor.before(0.0)
        optimizer.step()
        ratios = monitor.after()
        found.append(weights.judge(before.weights))
        found.append(updates.judge(ratios, before.gradients, rates=[rate] * 6))
        weights.update(ratios)
        optimizer.zero_grad()
    return [one for one in found if one]


def test_updates_of_healthy_trainings_are_fine() -> None:
    """Under every schedule, with weights at zero and norms at one.

    Neither steps that round to nothing at the end of a cosine are poison, nor is a bias at zero
    that gets its first gradient late and then more than doubles.
    """
    for kind, schedule in RATES.items():
        # A bias of 64 zeros is a false alarm after so many steps at a rate of 0.
        width = 8 if kind == "nothing at first" else 64
        assert trained(schedule, width=width) == [], kind
    assert trained(RATES["warm-up and cosine"], peak=1e-4) == []
    assert trained(RATES["constant"], zeros=30) == []


RATE = [1e-3, 1e-3]


def leap(names: int = 2, elements: int = 64) -> UpdateJump:
    return UpdateJump([f"w{place}" for place in range(names)], [torch.zeros(elements)] * names)


def steady(steps: int = 30, elements: int = 64) -> UpdateJump:
    detector = leap(2, elements)
    for _ in range(steps):
        assert detector.judge([0.01, 0.01], [1.0, 1.0], rates=RATE) is None
    return detector


def test_a_step_that_overwrites_a_weight_is_named() -> None:
    """Larger than the weight and than ten usual steps, or not finite; not where it is usual."""
    assert steady().judge([0.01, 0.9], [1.0, 1.0], rates=RATE) is None
    for value in (1.1, 1e9, math.nan, math.inf):
        trouble = steady().judge([0.01, value], [1.0, 1.0], rates=RATE)
        assert trouble is not None, value
        assert (trouble.tensor, trouble.action) == ("w1", Action.ROLLBACK), value
    large = leap(1)
    for _ in range(30):
        assert large.judge([0.5], [1.0], rates=[1e-3]) is None
    assert large.judge([4.9], [1.0], rates=[1e-3]) is None
    assert large.judge([20.0], [1.0], rates=[1e-3]) is not None
    assert steady(19).judge([0.01, 1e9], [1.0, 1.0], rates=RATE) is None
    # A bias of 63 elements may pass through zero, where any step is large, or stand still.
    assert steady(elements=63).judge([0.01, 50.0], [1.0, 1.0], rates=RATE) is None
    detector = steady(elements=63)
    assert [detector.judge([0.0, 0.0], [1.0, 1.0], rates=RATE) for _ in range(5)] == [None] * 5
    assert steady(elements=63).judge([0.01, math.nan], [1.0, 1.0], rates=RATE) is not None


def test_a_weight_that_stands_still_is_named() -> None:
    """In the third step, against its gradient; not without one, at a low rate, or by rounding."""
    detector = steady()
    found = [detector.judge([0.01, 1e-6], [1.0, 1.0], rates=RATE) for _ in range(3)]
    assert found[:2] == [None, None] and found[2] is not None and found[2].tensor == "w1"
    for ratio, gradient, rate in (
        (0.0, 0.0, 1e-3),
        (0.01 * 1e-3, 1.0, 1e-6),
        (0.0, 1.0, 0.0),
        (0.0, 1.0, 1e-7),
    ):
        detector, rates = steady(), [1e-3, rate]
        found = [detector.judge([0.01, ratio], [1.0, gradient], rates=rates) for _ in range(10)]
        assert found == [None] * 10, (ratio, gradient, rate)
    for spread, named in ((0.9, None), (0.1, "w1")):  # of steps that varied much nothing is known
        detector = leap()
        for place in range(40):
            usual = [1e-4 * (1.0 + spread * (-1.0) ** place)] * 2
            assert detector.judge(usual, [1.0, 1.0], rates=RATE) is None, spread
        found = [detector.judge([1e-4, 1e-8], [1.0, 1.0], rates=RATE) for _ in range(3)]
        assert [one and one.tensor for one in found] == [None, None, named], spread


def test_update_state_goes_through_json() -> None:
    """What is loaded judges as what was saved, also where a weight stands still already."""
    steps = [[0.01, 0.01]] * 30 + [[0.01, 1e-6]] * 3
    for stop in (10, 31, 32):
        one, other = leap(), leap()
        for ratios in steps[:stop]:
            one.judge(ratios, [1.0, 1.0], rates=RATE)
        other.load_state_dict(json.loads(json.dumps(one.state_dict())))
        mine, theirs = (
            [detector.judge(ratios, [1.0, 1.0], rates=RATE) for ratios in steps[stop:]]
            for detector in (one, other)
        )
        assert mine == theirs and mine[-1] is not None, stop
    for bad in (leap(3).state_dict(), {}):
        with pytest.raises((ValueError, KeyError)):
            leap().load_state_dict(bad)


# -- the fixed text ------------------------------------------------------------------------------


def reading(information: float, loss: float | None = None) -> ProbeReading:
    return ProbeReading(information, 1.0, loss)


def test_readings_of_a_model_that_learns_are_fine() -> None:
    """From nothing to much, with losses that vary; small changes of little information too."""
    detector = Collapse()
    random = np.random.default_rng(0)
    for step in range(200):
        most = 2.0 * (1 - math.exp(-step / 30))
        found = reading(most * random.uniform(0.7, 1.0), (3.0 - most) * random.lognormal(0.0, 0.2))
        assert detector.judge(found) is None, step
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
        (reading(2.0, 1.6), PROBE_LOSS),
        (reading(math.nan, 0.5), INFORMATION),
        (reading(2.0, math.nan), PROBE_LOSS),
    ):
        trouble = detector.judge(bad)
        assert trouble is not None, bad
        assert (trouble.signal, trouble.action) == (signal, Action.ROLLBACK), bad
    assert detector.judge(reading(0.81, 1.4)) is None
    assert detector.is_fine(1.7) and not detector.is_fine(1.5) and detector.is_fine(None)
    first = Collapse()  # a first loss that is no number spoils nothing
    first.judge(reading(1.0, math.nan))
    assert first.judge(reading(1.0, 0.5)) is None


# -- causes --------------------------------------------------------------------------------------


def a_step(optimizer: str = "AdamW") -> tuple[nn.Sequential, Monitor, WeightJump]:
    """A model some steps into its training, after a backward pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2))
    monitor = Monitor(model, getattr(torch.optim, optimizer)(model.parameters(), lr=1e-3))
    weights = WeightJump(monitor.names)
    for _ in range(5):
        model(torch.randn(8, 4)).square().mean().backward()
        weights.judge(monitor.before(0.0).weights)
        monitor.optimizer.step()
        weights.update(monitor.after())
    return model, monitor, weights


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
    """What follows from it is broken too: earlier layers' gradients, and the loss."""
    model, monitor, weights = a_step()
    loss, targets = math.nan, torch.tensor([1.0, math.nan if fault == "batch" else 0.0])
    batch = {"tokens": torch.zeros(3, dtype=torch.int64), "fine": torch.ones(2), "targets": targets}
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
    trouble = find_cause(monitor.before(loss), monitor, weights=weights, inputs=lambda: batch)
    assert (trouble.tensor, trouble.action) == (named, action)
    assert trouble.suspects_data == (action == Action.SKIP)
    assert fault in ("nothing", "batch") or "1.weight" in trouble.message


def test_moments_of_any_gradients_are_sound() -> None:
    """|m| ≤ c √v: gradients of every size and sign, in bursts, as steep as may be, by AdamW."""
    kinds = [(0.9, 0.999), (0.9, 0.95), (0.0, 0.5), (0.95, 0.98), (0.5, 0.3), (0.99, 0.999)]
    model = nn.ParameterList(torch.zeros(4, 4, 4) for _ in kinds)  # four seeds of 4×4 each
    groups = [{"params": [one], "betas": kind} for one, kind in zip(model, kinds, strict=True)]
    monitor = Monitor(model, torch.optim.AdamW(groups, lr=0.0))
    draws = [np.random.default_rng(seed) for seed in range(3)]
    for step in range(120):
        drawn = []
        for seed, draw in enumerate(draws):
            sizes = np.exp(draw.normal(0.0, 8.0, (4, 4)))
            drawn.append(
                sizes * (draw.random((4, 4)) < (1.0, 0.1)[seed % 2]) * draw.normal(size=(4, 4))
            )
        for weight, (fast, slow) in zip(model, kinds, strict=True):
            steep = slow / fast if fast else 1.0  # where Cauchy and Schwarz's bound is met
            gradient = np.stack([*drawn, np.full((4, 4), 1e-9 * steep ** min(step, 60))])
            weight.grad = torch.from_numpy(gradient).float()
        monitor.optimizer.step()
        for place, kind in enumerate(kinds):
            assert poisoned_state(monitor, place) is None, (kind, step)


@pytest.mark.parametrize(
    ("poison", "named"),
    [
        (lambda state: state["exp_avg"].mul_(1e4), "exp_avg"),
        (lambda state: state["exp_avg_sq"].zero_(), "exp_avg_sq"),
        (lambda state: state["exp_avg_sq"].neg_(), "exp_avg_sq"),
        (lambda state: state["exp_avg"].view(-1)[3:4].fill_(math.nan), "exp_avg"),
    ],
)
def test_poisoned_moments_are_found(
    poison: Callable[[dict[str, Tensor]], Tensor], named: str
) -> None:
    """Anomaly with the weight they belong to names them; trouble elsewhere is left as it is."""
    model, monitor, _ = a_step()
    poison(monitor.optimizer.state[model[1].weight])
    found = poisoned_state(monitor, monitor.names.index("1.weight"))
    assert found is not None and named in found and found.endswith("of 1.weight")
    trouble = Anomaly(Action.ROLLBACK, "update ratio", "1.weight", 9.0, 1.0, "it leapt")
    assert with_poisoned_state(trouble, monitor).tensor == found
    for other in ("2.weight", "group 0", None):
        elsewhere = Anomaly(Action.ROLLBACK, "update ratio", other, 9.0, 1.0, "it leapt")
        assert with_poisoned_state(elsewhere, monitor) == elsewhere, other


def test_other_optimizers_are_not_accused() -> None:
    """Whatever they keep."""
    kinds = ("SGD", "Adagrad", "RMSprop", "Adamax", "NAdam", "RAdam", "Adafactor", "Rprop")
    for optimizer in kinds:
        _, monitor, weights = a_step(optimizer)
        found = [poisoned_state(monitor, place) for place in range(6)]
        assert found == [None] * 6, optimizer
        trouble = find_cause(monitor.before(math.nan), monitor, weights=weights, inputs=None)
        assert trouble.tensor is None, optimizer
