"""Measures of a step against loops in float64; clipping against explicit weighted sums."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stability.clipping import AdaptiveClip, MovingAverage, MovingAverages
from stability.measures.activations import attention_entropy, dead_units, output_stats
from stability.measures.monitor import NORM_INTERVAL, Monitor
from stability.measures.tensors import norms
from stability.measures.updates import SAMPLED, UpdateSample


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loop_norm(values: Tensor) -> float:
    return math.sqrt(sum(float(value) ** 2 for value in values.double().flatten().tolist()))


def softmax_row(row: list[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [value / sum(powers) for value in powers]


def loop_entropy(row: list[float]) -> float:
    return -sum(value * math.log(value) for value in row if value > 0)


def test_norms_are_those_of_each_tensor() -> None:
    """Whatever shape and scale; 0 where there is no tensor, not finite where it is not."""
    small = drawn(2, 3, 4, seed=1, scale=1e-20)
    tensors = [drawn(7, 5), None, torch.tensor(-3.0), small, torch.zeros(4), None]
    found = norms(tensors)
    assert found.dtype == torch.float32 and found.shape == (6,)
    expected = [0.0 if tensor is None else loop_norm(tensor) for tensor in tensors]
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=0.0)
    bad = norms([drawn(3), torch.tensor([1.0, math.nan]), drawn(3) / 0.0])
    assert bad.isfinite().tolist() == [True, False, False]
    assert norms([None, None]).tolist() == [0.0, 0.0] and norms([]).tolist() == []
    for kind in (torch.float16, torch.bfloat16):  # no overflow at 65,504, and seven digits
        short = [torch.full((100,), 1e4).to(kind), drawn(50, 20, seed=3).to(kind)]
        expected = [loop_norm(one) for one in short]
        assert norms(short).tolist() == pytest.approx(expected, rel=1e-5), kind


def changed(weights: list[Tensor], changes: list[Tensor]) -> tuple[UpdateSample, list[float]]:
    """A sample of weights after one change, and the ratios that it stands for."""
    sample = UpdateSample(weights)
    sample.before()
    pairs = list(zip(weights, changes, strict=True))
    expected = [loop_norm(change) / loop_norm(weight) for weight, change in pairs]
    for weight, change in pairs:
        weight.add_(change)
    return sample, expected


def test_small_updates_are_exact() -> None:
    """Of weights with up to 1,024 elements every one is looked at."""
    weights = [drawn(8, 16), drawn(SAMPLED, seed=1), drawn(3, seed=2)]
    changes = [drawn(8, 16, seed=3, scale=0.01), drawn(SAMPLED, seed=4, scale=2.0), torch.zeros(3)]
    sample, expected = changed(weights, changes)
    assert sample.ratios().tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_large_updates_are_known_within_the_sampling_error() -> None:
    """To five times 1/√1024 for random changes, exactly for one factor; not of some columns only.

    Where a few columns never change (an input that is always 0), all others are seen as they are.
    """
    for *shape, idle in (
        (300, 41, False),
        (4099, False),
        (64, 7, 33, False),
        (257, 256, False),
        (512, 512, True),
        (2048, 256, True),
        (128, 1024, True),
    ):
        weight, change = drawn(*shape), drawn(*shape, seed=1, scale=0.03)
        if idle:
            change[:, :: shape[1] // 4] = 0.0
        sample, (expected,) = changed([weight], [change])
        found = float(sample.ratios()[0])
        assert found == pytest.approx(expected, rel=5 / math.sqrt(SAMPLED)), (shape, idle)
        sample.before()
        weight.mul_(1.25)
        assert float(sample.ratios()[0]) == pytest.approx(0.25, rel=1e-5), (shape, idle)


def test_weights_changed_otherwise_are_read_again_when_told() -> None:
    """What was read after a step stands for the weights before the next, unless forgotten."""
    weight = torch.ones(40)
    sample = UpdateSample([weight])
    for told in (False, True):
        sample.reset()
        sample.before()
        weight.mul_(1.5)
        assert float(sample.ratios()[0]) == pytest.approx(0.5)
        weight.mul_(2.0)
        if told:
            sample.reset()
        sample.before()
        weight.mul_(1.25)
        assert float(sample.ratios()[0]) == pytest.approx(0.25 if told else 1.5)


def test_updates_of_zeros_and_to_what_is_not_finite() -> None:
    """A weight of zeros has no size to compare with; one that becomes NaN or infinite shows it."""
    weights = [torch.zeros(5), torch.ones(5), torch.ones(5), torch.zeros(5)]
    sample = UpdateSample(weights)
    sample.before()
    weights[0].fill_(1.0)
    weights[1][3] = math.nan
    weights[2][0] = math.inf
    weights[3][1] = math.nan
    found = sample.ratios()
    assert found[0] == 0.0 and not bool(found[1:].isfinite().any())


def figures(logits: Tensor) -> list[float]:
    """Information and entropy of an output."""
    return [float(one) for one in output_stats(logits)]


def test_output_entropy_and_information_by_loops() -> None:
    """Entropy of the mean row minus the mean entropy, and that; at their ends too.

    Uniform: nothing and log V; the same anywhere: nothing said; n different certainties: log n.
    """
    logits = drawn(9, 13, scale=2.0)
    rows = [softmax_row(row) for row in logits.double().tolist()]
    mean = [sum(row[token] for row in rows) / 9 for token in range(13)]
    entropy = sum(map(loop_entropy, rows)) / 9
    assert figures(logits) == pytest.approx([loop_entropy(mean) - entropy, entropy], rel=1e-10)
    uniform, certain = figures(torch.zeros(4, 50)), figures(1e4 * torch.eye(8, 50))
    assert uniform == pytest.approx([0.0, math.log(50)], rel=1e-6, abs=1e-12)
    constant = drawn(1, 50, scale=3.0).expand(20, 50)
    assert figures(constant)[0] == pytest.approx(0.0, abs=1e-12)
    assert certain == pytest.approx([math.log(8), 0.0], rel=1e-6, abs=1e-12)
    assert math.isnan(figures(torch.full((2, 3), math.nan))[0])


def test_attention_entropy_by_loops() -> None:
    """Mean over rows of entropy / log(visible keys); rows that see one key do not count.

    Uniform over all visible keys 1, one of many 0.
    """
    unseen = torch.ones(7, 7, dtype=torch.bool).triu(1)
    scores = drawn(2, 7, 7, scale=2.0).masked_fill(unseen, -torch.inf)
    rows = scores.softmax(dim=-1).double()
    shares = []
    for row in rows.reshape(-1, 7).tolist():
        visible = sum(value > 0 for value in row)
        if visible > 1:
            shares.append(loop_entropy(row) / math.log(visible))
    assert float(attention_entropy(rows)) == pytest.approx(sum(shares) / len(shares), rel=1e-10)
    uniform = torch.zeros(2, 3, 7, 7).masked_fill(unseen, -torch.inf).softmax(dim=-1)
    assert float(attention_entropy(uniform)) == pytest.approx(1.0)
    assert float(attention_entropy(torch.ones(1, 1))) == 0.0
    sharp = torch.full((5, 8), 1e-12)
    sharp[:, 2] = 1.0
    assert float(attention_entropy(sharp)) == pytest.approx(0.0, abs=1e-9)
    two = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    assert float(attention_entropy(two)) == pytest.approx(1.0)


def test_dead_units_by_loops() -> None:
    """Units below a millionth of the largest activation, whatever the others' sign and scale."""
    activations = drawn(20, 10)
    activations[:, 2] = 0.0
    activations[:, 7] *= 1e-8
    activations[3, 5], activations[:, 5] = 1.0, -activations[:, 5].abs()
    for scale in (1e-5, 1.0, 1e5):
        columns = (scale * activations).T.tolist()
        most = max(abs(value) for column in columns for value in column)
        dead = sum(all(abs(value) <= 1e-6 * most for value in column) for column in columns)
        assert dead == 2 and float(dead_units(scale * activations)) == pytest.approx(dead / 10)
    assert float(dead_units(torch.zeros(4, 3))) == 1.0


def weighted(values: np.ndarray, decay: float) -> tuple[float, float]:
    """Mean and deviation where the k-th value before the newest weighs decay^k."""
    weights = decay ** np.arange(len(values) - 1, -1, -1)
    mean = float((weights * values).sum() / weights.sum())
    return mean, math.sqrt((weights * (values - mean) ** 2).sum() / weights.sum())


def test_moving_average_is_an_explicit_weighted_mean() -> None:
    """The k-th value before the newest weighs decay^k, also in the deviation."""
    for number in (1, 2, 30, 200):
        values = np.random.default_rng(number).lognormal(1.0, 0.5, number)
        average = MovingAverage(0.9)
        for value in values:
            average.add(float(value))
        mean, deviation = weighted(values, 0.9)
        assert average.mean == pytest.approx(mean, rel=1e-9), number
        assert average.deviation == pytest.approx(deviation, rel=1e-5, abs=1e-7), number
    assert MovingAverage().mean == MovingAverage().deviation == 0.0


def test_many_moving_averages_are_each_their_own() -> None:
    """Every figure counts its own values, through JSON too; the number of figures must agree."""
    many, ones = MovingAverages(4), [MovingAverage(0.9) for _ in range(4)]
    draw = np.random.default_rng(0)
    for step in range(30):
        values, where = draw.lognormal(size=4), draw.random(4) < (0.0, 0.3, 0.7, 1.0)
        many.add(values, where)
        for place in np.flatnonzero(where):
            ones[place].add(float(values[place]))
        if step == 20:
            state = json.loads(json.dumps(many.state_dict()))
            many = MovingAverages(4)
            many.load_state_dict(state)
    assert many.count.tolist() == [one.count for one in ones] and many.count[0] == 0 < many.count[1]
    assert many.mean.tolist() == pytest.approx([one.mean for one in ones], rel=1e-12)
    assert many.deviation.tolist() == pytest.approx([one.deviation for one in ones], rel=1e-6)
    with pytest.raises(ValueError, match="4 weights were watched, not 3"):
        MovingAverages(3).load_state_dict(many.state_dict())


def fed(norms_seen: list[float], **settings: float) -> AdaptiveClip:
    clip = AdaptiveClip(**{"max_norm": 100.0, **settings})
    for norm in norms_seen:
        clip.update(norm)
    return clip


def test_clip_is_the_fixed_limit_until_it_is_warm() -> None:
    """And never more than that afterwards; scores are 0 so long, and norms of 0 teach nothing."""
    for count in range(20):
        clip = fed([0.01] * count + [0.0] * 50)
        assert clip.limit() == 100.0 and clip.score(50.0) == 0.0, count
    assert fed([1e6] * 50).limit() == 100.0
    assert fed([0.01] * 20).limit() < 100.0


def test_clip_is_so_many_deviations_above_past_norms() -> None:
    """In logarithms, with the weights of the moving average; a quarter is the least deviation."""
    seen = np.random.default_rng(0).lognormal(-1.0, 0.6, 20)  # no outlier, all before it is warm
    clip = fed(seen.tolist(), z=4.0)
    mean, deviation = weighted(np.log(seen), 0.97)
    assert deviation > 0.25
    assert clip.limit() == pytest.approx(math.exp(mean + 4.0 * deviation), rel=1e-6)
    assert clip.score(math.exp(mean + 3.0 * deviation)) == pytest.approx(3.0, rel=1e-6)
    assert fed([2.0] * 40).limit() == pytest.approx(2.0 * math.exp(1.25), rel=1e-6)


def test_an_outlier_hardly_raises_what_is_allowed() -> None:
    """However far out: it counts as the limit of its time."""
    steady = [1.0 + 0.1 * (place % 2) for place in range(40)]
    after = [fed([*steady, outlier]).limit() for outlier in (4.0, 1e3, 1e30)]
    assert after == pytest.approx([after[0]] * 3, rel=1e-9)
    assert after[2] < 1.5 * fed(steady).limit()


def test_clip_state_goes_through_json() -> None:
    """What is loaded goes on as what was saved."""
    one = fed(np.random.default_rng(1).lognormal(0.0, 0.5, 30).tolist())
    other = AdaptiveClip(100.0)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for norm in (0.3, 7.0, 1.0):
        assert other.limit() == one.limit() and other.score(norm) == one.score(norm)
        one.update(norm)
        other.update(norm)


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 3))


def test_monitor_reads_a_step() -> None:
    """Norms of gradients and clip groups, rates, each weight's norm within four steps."""
    model = small_model()
    last = list(model[3].parameters())
    body = list(model[:3].parameters())
    optimizer = torch.optim.SGD([{"params": body}, {"params": last, "lr": 0.5}], lr=0.1)
    monitor = Monitor(model, optimizer, clip_groups={"body": body, "head": last}, rename=str.upper)
    model(drawn(4, 5))[:, 0].sum().backward()
    last[1].grad = None
    seen: dict[int, float] = {}
    for _ in range(NORM_INTERVAL):
        found = monitor.before(torch.tensor(1.5))
        seen |= found.weights
    names = [name.upper() for name, _ in model.named_parameters()]
    assert monitor.names == names and found.loss == 1.5 and found.rates == [0.1, 0.5]
    gradients = [0.0 if one.grad is None else loop_norm(one.grad) for one in model.parameters()]
    assert found.gradients == pytest.approx(gradients, rel=1e-5)
    totals = {"body": math.hypot(*gradients[:4]), "head": math.hypot(*gradients[4:])}
    assert found.totals == pytest.approx(totals, rel=1e-5)
    expected = [loop_norm(one.detach()) for one in model.parameters()]
    assert [seen[place] for place in range(6)] == pytest.approx(expected, rel=1e-5)
    assert monitor.weight_norms() == pytest.approx(expected, rel=1e-5)
    model[0].weight.requires_grad_(False)  # no more watched, and without a gradient to clip
    model[0].weight.grad = None
    monitor = Monitor(model, optimizer, clip_groups={"all": list(model.parameters())})
    expected = math.hypot(*gradients[1:])
    assert monitor.before(0.0).totals["all"] == pytest.approx(expected, rel=1e-5)


def test_monitor_changes_nothing_and_weighs_everything() -> None:
    """Looking leaves weights and gradients as they are; deep figures are those of the weights."""
    model = small_model()
    monitor = Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model(drawn(4, 5)).sum().backward()
    before = [(one.detach().clone(), one.grad.clone()) for one in model.parameters()]
    monitor.before(0.0), monitor.after(), monitor.weight_norms()
    figures = monitor.weigh()
    for one, (weight, gradient) in zip(model.parameters(), before, strict=True):
        assert torch.equal(one, weight) and torch.equal(one.grad, gradient)
    weight = model[0].weight.detach().double()
    values = np.linalg.svd(weight.numpy(), compute_uv=False)
    shares = values / values.sum()
    rank = math.exp(-(shares * np.log(shares)).sum())
    assert figures["norm:0.weight"] == pytest.approx(loop_norm(weight), rel=1e-5)
    assert figures["spread:0.weight"] == pytest.approx(float(np.std(weight.numpy())), rel=1e-5)
    assert figures["rank:0.weight"] == pytest.approx(rank, rel=1e-6)
    assert "rank:0.bias" not in figures and "norm:0.bias" in figures


def test_a_weighing_counts_its_products() -> None:
    """The Gram matrix of the shorter side and its eigenvalues; vectors have neither."""
    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 4, bias=False))
    monitor = Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert monitor.weigh_products == 2 * 9 * 5 + 60 * 27 + 2 * 9 * 4 + 60 * 27
