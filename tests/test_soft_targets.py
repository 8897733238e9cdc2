"""Compact soft targets: exact top-k, exact log-partition and tail mass at every node, arrays and back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from teachers.soft_targets import CompactTargets, nodes_for

NODES = (1.0, 2.0, 3.0)


def drawn(positions: int = 6, vocab_size: int = 50, scale: float = 3.0, seed: int = 0) -> Tensor:
    """Seeded float32 logits ``[N, V]``."""
    return scale * torch.randn(positions, vocab_size, generator=torch.Generator().manual_seed(seed))


def reference_log_partition(logits: list[float], temperature: float) -> float:
    """log Σ_v exp(z_v / T) in float64, summed exactly."""
    return math.log(math.fsum(math.exp(z / temperature) for z in logits))


@pytest.mark.parametrize(
    ("temperature", "nodes"), [(1.0, (1.0,)), (1, (1.0,)), (3.0, (1.0, 3.0)), (2.5, (1.0, 2.5))]
)
def test_nodes_are_one_and_the_runs_own(temperature: float, nodes: tuple[float, ...]) -> None:
    """Ascending, without repetition."""
    assert nodes_for(temperature) == nodes


@pytest.mark.parametrize("count", [1, 7, 50, 500])
def test_topk_is_exact(count: int) -> None:
    """The most probable tokens in order, with their raw logits bit for bit; never more than there are."""
    logits = drawn()
    targets = CompactTargets.from_logits(logits, count, NODES)
    kept = min(count, 50)
    assert targets.topk_ids.shape == targets.topk_logits.shape == (6, kept)
    assert targets.topk_ids.dtype == torch.int64
    for position, row in enumerate(logits.tolist()):
        order = sorted(range(50), key=lambda v, row=row: -row[v])[:kept]
        assert targets.topk_ids[position].tolist() == order
        assert targets.topk_logits[position].tolist() == [row[v] for v in order]


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("node", NODES)
def test_log_partition_is_exact(node: float, scale: float) -> None:
    """Over the whole vocabulary, not over the kept tokens, at each node."""
    logits = drawn(scale=scale)
    targets = CompactTargets.from_logits(logits, 5, NODES)
    assert targets.logsumexp.shape == (6, 3)
    expected = [reference_log_partition(row, node) for row in logits.double().tolist()]
    np.testing.assert_allclose(targets.log_partition(node).numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [1, 5, 49, 50])
@pytest.mark.parametrize("node", NODES)
def test_tail_mass_and_log_probs_are_exact(node: float, count: int) -> None:
    """Probability of each kept token, and of all the others together, at each node."""
    logits = drawn()
    targets = CompactTargets.from_logits(logits, count, NODES)
    log_probs, tail = targets.topk_log_probs(node), targets.tail_mass(node)
    for position, row in enumerate(logits.double().tolist()):
        partition = reference_log_partition(row, node)
        inside = [row[v] / node - partition for v in targets.topk_ids[position].tolist()]
        np.testing.assert_allclose(log_probs[position].numpy(), inside, atol=5e-6)
        outside = set(range(50)) - set(targets.topk_ids[position].tolist())
        mass = math.fsum(math.exp(row[v] / node - partition) for v in outside)
        assert float(tail[position]) == pytest.approx(mass, abs=2e-6)
        assert float(tail[position]) >= 0.0


def test_tail_mass_of_a_uniform_distribution() -> None:
    """k of V equal logits hold k / V of the mass at every temperature, at any height of the logits."""
    for height in (-80.0, 0.0, 80.0):
        targets = CompactTargets.from_logits(torch.full((1, 40), height), 10, NODES)
        for node in NODES:
            assert float(targets.tail_mass(node)) == pytest.approx(0.75, abs=2e-5)


@pytest.mark.parametrize("temperature", [1.5, 4.0, 0.0])
def test_unstored_temperature_raises(temperature: float) -> None:
    """The message names what is stored and what was asked."""
    targets = CompactTargets.from_logits(drawn(), 5, (1.0, 3.0))
    for ask in (targets.log_partition, targets.topk_log_probs, targets.tail_mass):
        with pytest.raises(ValueError, match=f"1, 3, not at {temperature:g}"):
            ask(temperature)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_logits_raise(value: float) -> None:
    """A damaged teacher is noticed at the first such logit."""
    logits = drawn()
    logits[3, 17] = value
    with pytest.raises(ValueError, match="not finite"):
        CompactTargets.from_logits(logits, 5, NODES)


def test_minus_infinity_raises() -> None:
    """−∞ is not finite either; kept in the top-k it makes the divergence NaN."""
    logits = drawn()
    logits[3, 17] = -float("inf")
    with pytest.raises(ValueError, match="not finite"):
        CompactTargets.from_logits(logits, 50, NODES)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(50, np.uint16), (65536, np.uint16), (65537, np.int32), (256000, np.int32)]
)
def test_arrays_and_back(vocab_size: int, dtype: type) -> None:
    """Ids take two bytes while the vocabulary allows, and the largest id survives; the rest is bit-equal."""
    targets = CompactTargets.from_logits(drawn(), 5, NODES)
    targets.topk_ids[0, 0] = vocab_size - 1
    arrays = targets.arrays(vocab_size)
    assert set(arrays) == {"topk_ids", "topk_logits", "logsumexp"}
    assert arrays["topk_ids"].dtype == dtype and arrays["topk_logits"].dtype == np.float32
    again = CompactTargets.from_arrays(arrays, NODES)
    assert again.topk_ids.dtype == torch.int64
    assert torch.equal(again.topk_ids, targets.topk_ids)
    assert torch.equal(again.topk_logits, targets.topk_logits)
    assert torch.equal(again.logsumexp, targets.logsumexp)
    assert again.nodes == NODES


def test_select_takes_positions() -> None:
    """Indices and masks pick positions of all three arrays alike; none gives none."""
    targets = CompactTargets.from_logits(drawn(), 5, NODES)
    picked = targets.select(torch.tensor([4, 0]))
    masked = targets.select(torch.tensor([True, False, False, False, True, False]))
    for name in ("topk_ids", "topk_logits", "logsumexp"):
        assert torch.equal(getattr(picked, name), getattr(targets, name)[[4, 0]])
        assert torch.equal(getattr(masked, name), getattr(targets, name)[[0, 4]])
    nothing = targets.select(torch.arange(0))
    assert nothing.topk_ids.shape == (0, 5) and nothing.tail_mass(1.0).shape == (0,)


def test_parts_equal_the_whole() -> None:
    """Reducing the logits in chunks gives the same targets as at once."""
    logits = drawn()
    whole = CompactTargets.from_logits(logits, 5, NODES)
    parts = [CompactTargets.from_logits(part, 5, NODES) for part in logits.split(4)]
    for name in ("topk_ids", "topk_logits", "logsumexp"):
        joined = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(joined, getattr(whole, name), rtol=0, atol=1e-6)
