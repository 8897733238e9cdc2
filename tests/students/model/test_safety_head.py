"""The safety head against loops over its definition, and its decisions against their costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from students.model.head_decisions import ALLOW, COSTS, ESCALATE, REFUSE
from students.model.heads import Heads, decide, head_values, read_heads
from students.model.safety_head import (
    LAST_STATE,
    SafetyHead,
    SafetyShape,
    prompt_features,
    shape_of,
    token_runs,
)

SHAPE = SafetyShape((1,), mean=True, buckets=96)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_whole_safety_head_against_loops() -> None:
    """W · (last and mean of the states, the mean without the first token) + b + the weights of all
    runs of one to four tokens, each once, divided by the root of their number."""
    head = SafetyHead(8, SHAPE)
    heads = Heads(head, None)
    assert head.runs is not None
    head.runs.copy_(drawn(SHAPE.buckets, 3, seed=9))
    table = head.runs.numpy()
    weight, bias = (p.detach().numpy() for p in head.parameters())
    for count in (1, 2, 3, 9):
        tokens = (np.arange(count, dtype=np.int32) % 4) * 1000
        final, layer = drawn(count, 8, seed=count), drawn(count, 8, seed=10 + count)
        features = prompt_features(SHAPE, final, {1: layer})
        means = [(x[1:] if count > 1 else x).mean(dim=0) for x in (final, layer)]
        assert torch.allclose(features, torch.cat([final[-1], layer[-1], *means]))
        rows = {
            hashed([int(token) for token in tokens[start : start + length]]) % SHAPE.buckets
            for length in range(1, 5)
            for start in range(count - length + 1)
        }
        assert token_runs(tokens, SHAPE.buckets).tolist() == sorted(rows)
        logits = (
            weight @ features.numpy() + bias + table[sorted(rows)].sum(axis=0) / len(rows) ** 0.5
        )
        wanted = np.exp(logits) / np.exp(logits).sum()
        found = heads.probabilities(features[None], [tokens])[0]
        assert found.tolist() == pytest.approx(wanted.tolist(), abs=1e-5), count


def hashed(run: list[int]) -> int:
    """FNV-1a and SplitMix64's finalizer, with Python's own integers."""
    whole = (1 << 64) - 1
    value = 0xCBF29CE484222325 ^ len(run)
    for token in run:
        value = (value ^ token) * 0x100000001B3 & whole
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & whole
    value = (value ^ value >> 27) * 0x94D049BB133111EB & whole
    return value ^ value >> 31


def test_decisions_cost_least() -> None:
    """By going through all three. Where the costs are the stated ones, REFUSE is more likely than
    not, ALLOW more likely than anything else, and what says nothing is escalated."""
    chances = torch.rand(500, 3, generator=torch.Generator().manual_seed(0)).double()
    chances = chances**3 / (chances**3).sum(dim=1, keepdim=True)
    other = ((0.0, 5.0, 1.0), (2.0, 0.0, 2.0), (1.0, 5.0, 0.0))
    for costs in (COSTS, other):
        expected = [
            [
                sum(p * costs[label][decision] for label, p in enumerate(row))
                for decision in range(3)
            ]
            for row in chances.tolist()
        ]
        taken = decide(chances, costs).tolist()
        assert taken == [row.index(min(row)) for row in expected] and set(taken) == {0, 1, 2}
    for row, decision in zip(chances.tolist(), decide(chances).tolist(), strict=True):
        assert decision != REFUSE or row[REFUSE] > 0.5
        assert decision != ALLOW or row[ALLOW] == max(row)
    assert decide(torch.full((1, 3), 1 / 3)).tolist() == [ESCALATE]
    assert decide(torch.tensor([[0.0, 0.5, 0.5], [0.5, 0.5, 0.0]])).tolist() == [ESCALATE] * 2


def test_older_files_decide_by_thresholds() -> None:
    """REFUSE from its threshold on; else ALLOW from its share of the rest on."""
    edge = torch.tensor([[0.25, 0.25, 0.5], [0.375, 0.375, 0.25], [0.0, 0.0, 1.0], [0.1, 0.8, 0.1]])
    heads = Heads(SafetyHead(8), None, thresholds=(0.5, 0.5))
    assert heads.decide(edge).tolist() == [REFUSE, ALLOW, REFUSE, ESCALATE]
    values = head_values(heads)
    assert "so8t.safety.costs" not in values
    assert set(values) == {
        f"so8t.safety.{key}" for key in ("labels", "weight", "bias", "thresholds")
    }
    again = read_heads(values, 8)
    assert again.safety is not None and again.safety.shape == LAST_STATE
    assert again.decide(edge).tolist() == [REFUSE, ALLOW, REFUSE, ESCALATE]


def test_a_shape_that_is_none_is_refused() -> None:
    """Of a configuration that somebody else may have written."""
    whole = SHAPE.to_json()
    assert shape_of(whole) == SHAPE and shape_of(None) == LAST_STATE
    for key, value in (
        ("layers", [-1]),
        ("layers", "1"),
        ("layers", None),
        ("mean", 1),
        ("buckets", -1),
        ("buckets", 1 << 40),
        ("buckets", True),
    ):
        with pytest.raises(ValueError, match="not layers, mean and buckets"):
            shape_of(whole | {key: value})
