"""From a store to batches: a clean split, every sequence once per epoch, padding."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from distill.errors import UserError
from distill.training.data import (
    MAX_HELD_OUT,
    WATCH_SHARE,
    TrainingData,
    load_batch,
    micro_batches,
    shuffled,
    split,
)
from teachers.store.store import SoftTargetStore
from teachers.targets.distributions import CompactTargets, DenseTargets, HiddenTargets
from teachers.targets.recipe import Recipe
from tests.support.stores import write_store
from tests.support.teachers import BigramTeacher

# What each kind of targets consists of, row by row.
KINDS = {
    "buckets": (Recipe(num_topk=3), CompactTargets, ("topk_ids", "topk_logits", "tail")),
    "sketch": (
        Recipe(num_topk=3, sketch_bytes=5, layers=(0,), layer_bytes=4),
        CompactTargets,
        ("topk_ids", "topk_logits", "tail", "coordinates"),
    ),
    "hidden": (Recipe("hidden"), HiddenTargets, ("coordinates",)),
    "dense": (Recipe("dense"), DenseTargets, ("logits",)),
}


def make_store(
    folder: Path, sequences: list[list[int]], per_shard: int = 4, kind: str = "buckets"
) -> SoftTargetStore:
    """A store of ``sequences`` with seeded targets."""
    rows = [np.array(row, dtype=np.int32) for row in sequences]
    return write_store(folder, BigramTeacher(20, 8, seed=3), rows, KINDS[kind][0], per_shard)


def varied(count: int, copies: int = 1) -> list[list[int]]:
    """``count`` different sequences, each ``copies`` times, shuffled."""
    random = np.random.default_rng(1)
    different = [[*divmod(n, 20), *random.integers(0, 20, n % 5).tolist()] for n in range(count)]
    return [different[place] for place in random.permutation(np.repeat(np.arange(count), copies))]


def test_no_held_out_sequence_occurs_in_training(tmp_path: Path) -> None:
    """Not by index nor by content; held-out ones differ; all copies of others are trained."""
    for copies in (1, 3):
        sequences = varied(30, copies)
        store = make_store(tmp_path / f"{copies}", sequences)
        for share, seed in itertools.product((0.001, 0.1, 0.4), (0, 1)):
            row = (copies, share, seed)
            parts = split(store, share, seed)
            held_out = [tuple(sequences[index]) for index in parts.held_out]
            trained = [tuple(sequences[index]) for index in parts.train]
            assert not set(held_out) & set(trained), row
            assert len(set(held_out)) == len(held_out) == max(1, round(share * 30)), row
            assert len(set(trained)) == 30 - len(held_out), row
            assert len(trained) == copies * len(set(trained)), row
            assert len(set(parts.train.tolist())) == len(parts.train), row


def test_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    """The same seed gives the same split, another another one; sorted, with 128 at most."""
    store = make_store(tmp_path / "few", varied(40))
    first, again, other = split(store, 0.25, 5), split(store, 0.25, 5), split(store, 0.25, 6)
    assert np.array_equal(first.train, again.train)
    assert np.array_equal(first.held_out, again.held_out)
    assert not np.array_equal(first.held_out, other.held_out)
    assert sorted(first.train.tolist()) == first.train.tolist()
    assert sorted([*first.train, *first.held_out]) == list(range(40))
    parts = split(make_store(tmp_path / "many", varied(300), per_shard=300), 0.9, 0)
    assert len(parts.held_out) == MAX_HELD_OUT == 128 and len(parts.train) == 172


def test_validation_points_are_a_small_part_of_training(tmp_path: Path) -> None:
    """All points together score a share of the tokens trained on, each the same sequences: in a
    longer training these and others. A short one has those of a point that says something: so many
    positions that are learnt, and so many sequences."""
    texts = [[*divmod(number, 20), *[number % 7] * 98] for number in range(200)]
    store = make_store(tmp_path / "whole", texts, per_shard=50)
    data, before = TrainingData(store, split(store, 0.5, 0), 0), set[int]()
    for trained, points, count in ((0.0, 5, 6), (3e5, 2, 15), (6e5, 2, 30), (1e9, 12, 100)):
        limited = data.watching(trained, points)
        assert limited.watched is not None and limited.watched_count == count, trained
        now = set(limited.watched.tolist())
        assert before <= now <= set(data.split.held_out.tolist())
        found = list(limited.held_out(4, torch.device("cpu")))
        assert sum(len(batch.lengths) for batch in found) == count
        assert count in (6, 100) or points * count * 100 == WATCH_SHARE * trained
        before = now
    assert len(next(data.held_out(100, torch.device("cpu"))).lengths) == 100  # no limit
    masks = [np.arange(99) < 5 for _ in texts]
    rows = [np.array(row, dtype=np.int32) for row in texts]
    masked = write_store(
        tmp_path / "masked", BigramTeacher(20, 8, seed=3), rows, KINDS["buckets"][0], 50, masks
    )
    assert replace(data, store=masked).watching(0.0, 5).watched_count == 100  # 5 positions each


def test_training_always_keeps_a_sequence(tmp_path: Path) -> None:
    """Whatever share is held out; copies of one sequence alone are refused."""
    with pytest.raises(UserError, match="only 1 different"):
        split(make_store(tmp_path / "one", [[1, 2, 3]] * 5), 0.1, 0)
    for count, share in ((2, 0.1), (2, 0.8), (3, 0.9)):
        parts = split(make_store(tmp_path / f"{count}-{share}", varied(count)), share, 0)
        assert len(parts.train) >= 1 and len(parts.held_out) >= 1, (count, share)
        assert len(parts.train) + len(parts.held_out) == count, (count, share)


def epoch_order(
    train: NDArray[np.int64],
    lengths: NDArray[np.int64],
    size: int,
    seed: int,
    epoch: int,
    most: int | None = None,
) -> list[NDArray[np.int64]]:
    """The batches of an epoch of a store that fits a window."""
    random = np.random.default_rng([seed, 2, epoch])
    return shuffled(train, lengths.astype(np.int32), size, random, most)


def test_an_epoch_covers_every_sequence_once() -> None:
    """None twice, left out or foreign; no batch too large and at most one smaller."""
    train = np.arange(3, 150, 2)
    lengths = np.random.default_rng(0).integers(2, 60, 200)
    for size in (1, 4, 7, 200):
        batches = epoch_order(train, lengths, size, seed=0, epoch=0)
        assert sorted(np.concatenate(batches).tolist()) == train.tolist(), size
        sizes = sorted(len(batch) for batch in batches)
        assert set(sizes[1:]) <= {size} and len(batches) == math.ceil(len(train) / size), size


def test_batches_of_tokens_are_full_and_cover_every_sequence() -> None:
    """Up to so many tokens, a longer sequence alone; equal lengths give what a size gives."""
    train, lengths = np.arange(3, 150), np.random.default_rng(0).integers(2, 60, 200)
    for most in (16, 100, 333, 10_000):
        batches = epoch_order(train, lengths, 16, 0, 0, most)
        assert sorted(np.concatenate(batches).tolist()) == train.tolist(), most
        sizes = [int(lengths[batch].sum()) for batch in batches]
        assert all(
            size <= most or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True)
        )
        assert len(batches) <= 2 * lengths[train].sum() / most + 2, most
    equal = np.full(200, 10)
    by_tokens, by_size = (epoch_order(train, equal, 4, 0, 1, most) for most in (40, None))
    assert [one.tolist() for one in by_tokens] == [one.tolist() for one in by_size]


def test_epochs_differ_and_repeat() -> None:
    """Another epoch or seed gives another order, the same ones the same order."""
    train, lengths = np.arange(400), np.random.default_rng(0).integers(2, 60, 400)
    orders = {
        (seed, epoch): np.concatenate(epoch_order(train, lengths, 8, seed, epoch)).tolist()
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({tuple(order) for order in orders.values()}) == 4
    assert np.concatenate(epoch_order(train, lengths, 8, 0, 1)).tolist() == orders[0, 1]
    first, second = (
        {tuple(sorted(batch)) for batch in epoch_order(train, lengths, 8, 0, epoch)}
        for epoch in (0, 1)
    )
    assert len(first & second) < 5  # of 50: other neighbours, not only another order of batches


def test_batches_pad_less_and_come_mixed() -> None:
    """Sequences of like length go together, yet batches do not come in order of length."""
    train, lengths = np.arange(256), np.random.default_rng(0).integers(2, 200, 256)
    batches = epoch_order(train, lengths, 8, 0, 0)
    padded = sum(int(lengths[batch].max()) * len(batch) for batch in batches)
    assert padded < 1.15 * lengths.sum()
    longest = [int(lengths[batch].max()) for batch in batches]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


@pytest.mark.parametrize("kind", KINDS)
def test_load_batch_pads_right_and_aligns_targets(tmp_path: Path, kind: str) -> None:
    """Rows in the order asked, zeros behind them, and a target for each valid position."""
    sequences = [[5, 6, 7], [8, 9], [1, 2, 3, 4, 5], [11, 12], [13, 14, 15, 16]]
    store = make_store(tmp_path, sequences, per_shard=2, kind=kind)
    batch = load_batch(store, np.array([4, 1, 2]))
    assert batch.tokens.tolist() == [[13, 14, 15, 16, 0], [8, 9, 0, 0, 0], [1, 2, 3, 4, 5]]
    assert batch.tokens.dtype == torch.int64 and batch.lengths.tolist() == [4, 2, 5]
    assert batch.labels.tolist() == [14, 15, 16, 9, 2, 3, 4, 5]
    _, typed, names = KINDS[kind]
    assert batch.count() == len(batch.targets.best()) == 8 and isinstance(batch.targets, typed)
    for name in names:
        rows = [getattr(store.targets(index), name) for index in (4, 1, 2)]
        assert torch.equal(getattr(batch.targets, name), torch.cat(rows))
        assert not torch.equal(rows[0][:1], rows[1])
    best = BigramTeacher(20, 8, seed=3).answers.argmax(-1)
    assert torch.equal(batch.targets.best(), best[batch.tokens[batch.valid]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_store_gives_the_kept_rows(tmp_path: Path, kind: str) -> None:
    """Labels and targets at kept positions alone, as the whole store has them; opened again."""
    sequences = [[5, 6, 7], [8, 9], [1, 2, 3, 4, 5], [11, 12], [13, 14, 15, 16]]
    rows = [np.array(row, dtype=np.int32) for row in sequences]
    masks = ([0, 1], [1], [1, 0, 0, 1], [1], [0, 1, 1])
    teacher, recipe = BigramTeacher(20, 8, seed=3), KINDS[kind][0]
    keep = [np.array(mask, dtype=np.bool_) for mask in masks]
    made = write_store(tmp_path, teacher, rows, recipe, 2, keep)
    store = SoftTargetStore.create_or_open(tmp_path, made.manifest)
    assert [store.keep(index).tolist() for index in range(5)] == [mask.tolist() for mask in keep]
    assert store.positions() == 7 and store.lengths().tolist() == [3, 2, 5, 2, 4]
    batch = load_batch(store, np.array([4, 0, 2]))
    assert batch.labels.tolist() == [15, 16, 7, 2, 5] and batch.count() == 5
    assert batch.tokens[batch.valid].tolist() == [14, 15, 6, 1, 4]
    best = teacher.answers.argmax(-1)
    assert torch.equal(batch.targets.best(), best[batch.tokens[batch.valid]])
    assert all(len(states) == 5 for states in batch.layers.values())


def test_micro_batches_divide_a_step() -> None:
    """In order, each sequence once, no empty part, sizes apart by one at most."""
    for count, parts in ((8, 1), (8, 4), (7, 3), (2, 5), (1, 1)):
        indices = [3 * place for place in range(count)]
        found = [part.indices for part in micro_batches(indices, parts)]
        assert np.concatenate(found).tolist() == indices, (count, parts)
        assert len(found) == min(count, parts), (count, parts)
        sizes = [len(part) for part in found]
        assert max(sizes) - min(sizes) <= 1, (count, parts)


def test_micro_batches_divide_a_step_among_processes() -> None:
    """Each sequence counts once over all ranks; every rank has equally many micro-batches."""
    steps = ((8, 1), (8, 4), (7, 3), (2, 5), (1, 1), (1, 2))
    for world, (count, parts) in itertools.product((2, 3), steps):
        row = (world, count, parts)
        indices = [3 * place for place in range(count)]
        ranks = [micro_batches(indices, parts, rank, world) for rank in range(world)]
        assert len({len(rank) for rank in ranks}) == 1 and len(ranks[0]) <= parts, row
        found = [part for rank in ranks for part in rank]
        counted = [part for part in found if part.counts]
        assert sorted(index for part in counted for index in part.indices) == indices, row
        assert all(part.indices for part in found), row
        assert sorted(part.number for part in counted) == list(range(len(counted))), row
        assert {part.count for part in found} == {len(counted)}, row
