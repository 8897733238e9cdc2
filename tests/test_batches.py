"""From a store to batches: a clean split, every sequence once per epoch, padding, and the learning rate."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.batches import MAX_HELD_OUT, epoch_order, load_batch, micro_batches, split
from distill.config import TrainConfig
from distill.errors import UserError
from distill.schedule import build_optimizer, build_schedule, peak_learning_rate
from teachers.recipe import Recipe
from teachers.soft_targets import CompactTargets, DenseTargets, HiddenTargets
from teachers.store import SoftTargetStore
from tests.conftest import BigramTeacher, make_student, write_store

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


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.4])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_held_out_sequence_occurs_in_training(
    tmp_path: Path, copies: int, share: float, seed: int
) -> None:
    """Not by index and not by content; held-out ones are all different; all copies of others are trained."""
    sequences = varied(30, copies)
    parts = split(make_store(tmp_path, sequences), share, seed)
    held_out = [tuple(sequences[index]) for index in parts.held_out]
    trained = [tuple(sequences[index]) for index in parts.train]
    assert not set(held_out) & set(trained)
    assert len(set(held_out)) == len(held_out) == max(1, round(share * 30))
    assert len(set(trained)) == 30 - len(held_out) and len(trained) == copies * len(set(trained))
    assert len(set(parts.train.tolist())) == len(parts.train)


def test_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    """The same seed gives the same split, another seed another one; both sides come sorted."""
    store = make_store(tmp_path, varied(40))
    first, again, other = split(store, 0.25, 5), split(store, 0.25, 5), split(store, 0.25, 6)
    assert np.array_equal(first.train, again.train) and np.array_equal(first.held_out, again.held_out)
    assert not np.array_equal(first.held_out, other.held_out)
    assert sorted(first.train.tolist()) == first.train.tolist()
    assert sorted([*first.train, *first.held_out]) == list(range(40))


def test_held_out_is_limited(tmp_path: Path) -> None:
    """128 sequences at most."""
    parts = split(make_store(tmp_path, varied(300), per_shard=300), 0.9, 0)
    assert len(parts.held_out) == MAX_HELD_OUT == 128 and len(parts.train) == 172


def test_too_little_variety_is_refused(tmp_path: Path) -> None:
    """Copies of one sequence cannot be both trained on and held out; two different ones can."""
    with pytest.raises(UserError, match="only 1 different"):
        split(make_store(tmp_path / "one", [[1, 2, 3]] * 5), 0.1, 0)
    parts = split(make_store(tmp_path / "two", [[1, 2], [3, 4]]), 0.1, 0)
    assert len(parts.train) == len(parts.held_out) == 1


@pytest.mark.parametrize(("count", "share"), [(2, 0.8), (3, 0.9)])
def test_training_always_keeps_a_sequence(tmp_path: Path, count: int, share: float) -> None:
    """Whatever share is held out, something remains to learn from."""
    parts = split(make_store(tmp_path, varied(count)), share, 0)
    assert len(parts.train) >= 1


@pytest.mark.parametrize("batch_size", [1, 4, 7, 200])
def test_an_epoch_covers_every_sequence_once(batch_size: int) -> None:
    """No sequence twice, none left out, no foreign one, no batch too large and at most one smaller."""
    train = np.arange(3, 150, 2)
    lengths = np.random.default_rng(0).integers(2, 60, 200)
    batches = epoch_order(train, lengths, batch_size, seed=0, epoch=0)
    assert sorted(np.concatenate(batches).tolist()) == train.tolist()
    sizes = sorted(len(batch) for batch in batches)
    assert set(sizes[1:]) <= {batch_size} and len(batches) == math.ceil(len(train) / batch_size)


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
    batches = [{tuple(sorted(b)) for b in epoch_order(train, lengths, 8, 0, epoch)} for epoch in (0, 1)]
    assert len(batches[0] & batches[1]) < 5  # of 50: other neighbours, not only another order of batches


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
    """Rows in the order asked, zeros behind them, and one target for each valid position, row by row."""
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
    assert torch.equal(
        batch.targets.best(), BigramTeacher(20, 8, seed=3).answers.argmax(-1)[batch.tokens[batch.valid]]
    )


@pytest.mark.parametrize(("count", "parts"), [(8, 1), (8, 4), (7, 3), (2, 5), (1, 1)])
def test_micro_batches_divide_a_step(count: int, parts: int) -> None:
    """In order, each sequence once, no empty part, sizes apart by one at most."""
    indices = np.arange(count) * 3
    found = [part.indices for part in micro_batches(indices.tolist(), parts)]
    assert np.concatenate(found).tolist() == indices.tolist()
    assert len(found) == min(count, parts)
    assert max(len(part) for part in found) - min(len(part) for part in found) <= 1


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("count", "parts"), [(8, 1), (8, 4), (7, 3), (2, 5), (1, 1), (1, 2)])
def test_micro_batches_divide_a_step_among_processes(count: int, parts: int, world: int) -> None:
    """Each sequence counts once over all ranks, and every rank has equally many micro-batches."""
    indices = [3 * place for place in range(count)]
    found = [micro_batches(indices, parts, rank, world) for rank in range(world)]
    counted = [index for rank in found for part in rank if part.counts for index in part.indices]
    assert sorted(counted) == indices
    assert len({len(rank) for rank in found}) == 1 and len(found[0]) <= parts
    assert all(part.indices for rank in found for part in rank)
    places = sorted(part.place for rank in found for part in rank if part.counts)
    assert places == list(range(len(places)))
    assert {part.places for rank in found for part in rank} == {len(places)}


def rates(config: TrainConfig, steps: int) -> list[float]:
    """The learning rate of every step, and of the one after the last."""
    optimizer = build_optimizer(make_student(), config, make_student().config.hidden_size)
    schedule = build_schedule(optimizer, config, steps)
    found = [float(schedule.get_last_lr()[0])]
    for _ in range(steps):
        optimizer.step()
        schedule.step()
        found.append(float(schedule.get_last_lr()[0]))
    return found


def test_learning_rate_start_peak_and_end() -> None:
    """Up from 0 in a line to the peak after the warm-up, then down a cosine to min_lr of the peak."""
    config = TrainConfig(learning_rate=0.01, warmup=0.1, min_lr=0.02)
    found = rates(config, 100)
    for step in range(11):
        assert found[step] == pytest.approx(0.01 * step / 10)
    for step in range(10, 101):
        cosine = (1 + math.cos(math.pi * (step - 10) / 90)) / 2
        assert found[step] == pytest.approx(0.01 * (0.02 + 0.98 * cosine))
    assert found[100] == pytest.approx(0.0002) and max(found) == found[10] == pytest.approx(0.01)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_short_runs_have_a_learning_rate(steps: int) -> None:
    """Without a whole step of warm-up the first step learns at the peak."""
    assert rates(TrainConfig(learning_rate=0.01), steps)[0] == pytest.approx(0.01)


def test_peak_learning_rate() -> None:
    """As configured, or 0.5 / width."""
    assert peak_learning_rate(TrainConfig(learning_rate=0.5), 256) == 0.5
    assert peak_learning_rate(TrainConfig(), 64) == pytest.approx(0.5 / 64)
    assert peak_learning_rate(TrainConfig(), 512) == pytest.approx(0.5 / 512)


def test_weight_decay_on_projections_only() -> None:
    """Every parameter is in one group; rotations, norms and embeddings do not decay."""
    student = make_student()
    decayed, others = build_optimizer(student, TrainConfig(weight_decay=0.1), 16).param_groups
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    assert len(decayed["params"]) == 2 * 7 and all("_proj" in names[id(p)] for p in decayed["params"])
    assert {id(p) for group in (decayed, others) for p in group["params"]} == set(names)
    assert any("gate.safety" in names[id(p)] for p in others["params"])
