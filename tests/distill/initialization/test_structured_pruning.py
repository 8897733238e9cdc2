"""What a smaller student keeps of a teacher, on cases made by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.initialization.structured_pruning import (
    CLEARLY_LESS,
    HeadGroup,
    choose_head_groups,
    chosen_spans,
    identity_projection,
    layer_spans,
    match_rotary_pairs,
    principal_projection,
    relative_changes,
    stream_moment,
)
from students.model.config import SO8TConfig


def test_spans() -> None:
    """Every layer once, as even as can be."""
    assert [list(span) for span in layer_spans(6, 3)] == [[0, 1], [2, 3], [4, 5]]
    assert [len(span) for span in layer_spans(6, 4)] == [2, 1, 2, 1]
    assert [list(span) for span in layer_spans(3, 5)] == [[0], [1], [2]]
    for layers, count in itertools.product(range(1, 33), range(1, 33)):
        spans = layer_spans(layers, count)
        assert [layer for span in spans for layer in span] == list(range(layers)), (layers, count)
        lengths = {len(span) for span in spans}
        assert len(spans) == min(layers, count), (layers, count)
        assert max(lengths) - min(lengths) <= 1, (layers, count)


def test_layers_that_change_little_are_dropped() -> None:
    """Of all divisions whose spans are at most a layer longer than equal ones, as far as that is
    clearly better: against all of them."""
    draw = np.random.default_rng(0)
    better = 0
    for layers, count in itertools.product(range(1, 9), range(1, 10)):
        changes = torch.from_numpy(np.triu(draw.random((layers + 1, layers + 1)) ** 3, 1))
        equal = [len(span) for span in layer_spans(layers, count)]

        def cost(lengths: Sequence[int], changes: Tensor = changes) -> float:
            ends = np.cumsum([0, *lengths]).tolist()
            return sum(float(changes[a + 1, b]) for a, b in itertools.pairwise(ends))

        longest = max(equal) + 1
        all_lengths = itertools.product(range(1, longest + 1), repeat=len(equal))
        least = min(cost(lengths) for lengths in all_lengths if sum(lengths) == layers)
        spans = chosen_spans(changes, count)
        assert [layer for span in spans for layer in span] == list(range(layers)), (layers, count)
        if least <= CLEARLY_LESS * cost(equal):
            assert cost([len(span) for span in spans]) == pytest.approx(least), (layers, count)
            better += cost(equal) > 0
        else:
            assert spans == layer_spans(layers, count), (layers, count)
    assert better > 10


def test_changes_of_a_stream() -> None:
    """Medians over tokens, whatever the first one does; nothing changes a stream of zeros."""
    draw = np.random.default_rng(1)
    states = [draw.standard_normal((7, 4)).astype(np.float32) for _ in range(3)]
    for state in states:
        state[0] *= 1e3
    found = relative_changes([torch.from_numpy(state) for state in states]).numpy()
    for before, after in itertools.product(range(3), repeat=2):
        shares = [
            sum((x - y) ** 2 for x, y in zip(one, other, strict=True)) / sum(x**2 for x in one)
            for one, other in zip(states[after], states[before], strict=True)
        ]
        expected = sorted(map(float, shares))[3] if before < after else 0.0
        assert found[before, after] == pytest.approx(expected, rel=1e-5), (before, after)
    assert not relative_changes([torch.zeros(2, 4)] * 3).any()


def test_rotary_pairs_of_like_speed() -> None:
    """Against all ordered matchings."""
    theirs, half, odd = (
        (10000.0 ** -np.arange(0, 1, 1 / pairs)).astype(np.float32) for pairs in (8, 4, 5)
    )
    taken, given = match_rotary_pairs(theirs, half)
    assert taken.tolist() == [0, 2, 4, 6] and given.tolist() == [0, 1, 2, 3]
    given, taken = match_rotary_pairs(half, theirs)
    assert taken.tolist() == [0, 2, 4, 6] and given.tolist() == [0, 1, 2, 3]
    taken, _ = match_rotary_pairs(theirs, odd)
    costs = {
        indices: np.abs(np.log(theirs[list(indices)] / odd)).sum()
        for indices in itertools.combinations(range(8), 5)
    }
    assert costs[tuple(taken.tolist())] == pytest.approx(min(costs.values()))
    same, also = match_rotary_pairs(theirs, theirs)
    assert same.tolist() == also.tolist() == list(range(8))


def test_units_are_whole_groups() -> None:
    """The strongest groups of heads, whole, or their strongest heads; all, where there is room."""

    def chosen(heads: int, kv_heads: int) -> list[HeadGroup]:
        config = SO8TConfig(
            vocab_size=8,
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=16,
            intermediate_size=64,
        )
        return choose_head_groups([0.1, 0.2, 5.0, 0.0, 1.0, 2.0], 3, config)

    assert chosen(4, 2) == [HeadGroup(1, (2, 3)), HeadGroup(2, (4, 5))]
    assert chosen(2, 2) == [HeadGroup(1, (2,)), HeadGroup(2, (5,))]
    assert [unit.kv_head for unit in chosen(16, 8)] == [0, 1, 2]


def test_streams() -> None:
    """The strongest directions of what is seen after the norm; back and forth they are whole."""
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(300, 6, generator=draw) * torch.tensor([5.0, 0.1, 3.0, 0.1, 4.0, 0.1])
    states[0] *= 1e4  # one large token
    scale = torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0, 1.0])
    result = principal_projection(stream_moment(states, scale), scale, torch.ones(6), 3)
    assert result.narrows and (result.up.T @ result.down - torch.eye(3)).abs().max() < 1e-5
    kept = (states @ result.down) @ result.up.T
    assert (kept - states).square().mean() < 0.01 * states.square().mean()
    assert result.down.abs().amax(dim=1)[[1, 3, 5]].max() < 0.2
    whole = identity_projection(3, 5)
    assert not whole.narrows and (whole.down @ whole.up.T - torch.eye(3)).abs().max() == 0
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0])
    turned = principal_projection(stream_moment(states, scale), scale, signs, 3)
    assert sorted(turned.signs.tolist()) == [-1.0, 1.0, 1.0]
    for sign, direction in zip(turned.signs, turned.down.T, strict=True):
        assert direction[signs != sign].abs().max() == 0
