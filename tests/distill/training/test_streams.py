"""Training from a store that is larger than memory: windows, what is kept, what is checked when."""

from __future__ import annotations

import itertools
import multiprocessing
import threading
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from distill.losses.batch import Batch
from distill.training import data as data_module
from distill.training import engine
from distill.training.data import ORDER, Plan, StepLoader, TrainingData, load_batch, shuffled, split
from teachers.atomic_files import StoreError
from teachers.base import ProcessRank
from teachers.store.manifest import TASKS, read_manifest
from teachers.store.shard_records import READ_BACK, task_name
from teachers.store.store import SoftTargetStore
from teachers.store.tasks import Tasks
from teachers.targets.recipe import Recipe
from tests.support.stores import write_store
from tests.support.teachers import BigramTeacher
from tests.support.training import Killed, make_data, run_with, save_all_the_time, weights

PER_SHARD = 4


def stored(folder: Path, sequences: int, length: int | None = None) -> SoftTargetStore:
    """A store with four sequences a shard, opened afresh."""
    draw = np.random.default_rng(0)
    lengths = (length or draw.integers(4, 14) for _ in range(sequences))
    rows = [draw.integers(0, 48, size=size).astype(np.int32) for size in lengths]
    write_store(folder, BigramTeacher(48, 16), rows, Recipe(num_topk=4), PER_SHARD)
    return opened(folder)


def opened(folder: Path) -> SoftTargetStore:
    return SoftTargetStore(folder, read_manifest(folder))


def data_of(store: SoftTargetStore, batch_tokens: int | None = None) -> TrainingData:
    return TrainingData(store, split(store, 0.1, 0), 3, batch_tokens=batch_tokens)


def test_a_window_at_a_time(tmp_path: Path) -> None:
    """Every sequence once an epoch, in batches of one window of shards each, whether these are of a
    number or of tokens; another order in every epoch, always the same one."""
    store = stored(tmp_path, 57)
    for tokens in (None, 40):
        data = data_of(store, tokens)
        plan, again = (Plan(data, 2, 3, window=4) for _ in range(2))
        steps = list(plan)
        assert steps == list(plan[:]) == again[::-1][::-1] and steps[-1] == plan[-1]
        assert [list(plan[:n]) for n in (0, 5, -1)] == [steps[:n] for n in (0, 5, -1)]
        assert plan[:5].share(5) == 1.0 and list(plan[:900]) == steps
        orders, place = [], 0
        for _ in range(2):
            seen: list[int] = []
            windows: list[set[int]] = [set()]
            while len(seen) < len(data.split.train):
                shards = {index // PER_SHARD for index in steps[place]}
                if len(windows[-1] | shards) > 4:
                    windows.append(set())
                windows[-1] |= shards
                seen += steps[place]
                place += 1
            assert sorted(seen) == data.split.train.tolist(), tokens
            assert len(windows) == 4, tokens  # of 15 shards
            assert not any(one & other for one, other in itertools.combinations(windows, 2))
            orders.append(seen)
        assert place == len(plan) and orders[0] != orders[1]
        shares = [plan.share(step) for step in range(len(plan) + 1)]
        assert shares[0] == 0.0 and shares[-1] == 1.0
        sizes = [int(store.lengths()[step].sum()) for step in steps]
        assert plan.tokens == sum(sizes)
        assert np.allclose(np.diff(shares) * plan.tokens, sizes)
        if tokens:
            lengths = store.lengths()
            assert max(int(lengths[step].sum()) for step in steps if len(step) > 1) <= tokens


def test_a_store_of_one_window_is_shuffled_as_a_whole(tmp_path: Path) -> None:
    """As by earlier versions, batch by batch."""
    data = data_of(stored(tmp_path, 57))
    lengths = data.store.lengths()
    wanted = [
        batch.tolist()
        for epoch in range(2)
        for batch in shuffled(
            data.split.train, lengths, 3, np.random.default_rng([data.seed, ORDER, epoch])
        )
    ]
    assert list(Plan(data, 2, 3)) == wanted


def test_a_resume_at_the_border_of_a_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the last step of a window, at its border and after it: to the same bytes."""
    save_all_the_time(monkeypatch)
    monkeypatch.setattr(data_module, "WINDOW", 1)
    data = make_data(tmp_path)
    plan = data.batches(2, 4)
    assert isinstance(plan, Plan)
    border = int(plan._steps[1])
    assert 0 < border < len(plan)
    whole, _ = run_with(data, tmp_path / "whole")
    for kill_at in (border - 1, border, border + 1):
        folder = tmp_path / f"killed-{kill_at}"
        with pytest.raises(Killed):
            run_with(data, folder, kill_at=kill_at)
        student, summary = run_with(data, folder)
        assert summary.continued_from == kill_at - 1 and weights(student) == weights(whole)
    assert not [one for one in threading.enumerate() if one.name.startswith("loader")]


def memory_of(folder: Path, sequences: int) -> tuple[int, int]:
    """The peak memory that preparing and reading a whole epoch takes, and how many open shards and
    objects are left."""
    stored(folder, sequences, length=8)
    tracemalloc.start()
    with patch("teachers.store.shard_files.OPEN_SHARDS", 8):
        store = opened(folder)
        data = data_of(store)
        for step in (plan := Plan(data, 1, 4, window=4)):
            load_batch(store, step)
    peak = tracemalloc.get_traced_memory()[1]
    left = sum(stat.count for stat in tracemalloc.take_snapshot().statistics("filename"))
    tracemalloc.stop()
    assert len(plan) >= sequences // 5
    return peak, left


def test_memory_does_not_grow_with_the_store(tmp_path: Path) -> None:
    """By less than 64 bytes a sequence at the peak, and by no object at all; in a process of its
    own, in which nothing else is at work."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        _, small, large = (
            alone.submit(memory_of, tmp_path / f"{count}", count).result()
            for count in (200, 400, 2000)
        )
    assert large[0] - small[0] < 64 * 1600 + 50_000
    assert large[1] - small[1] < 200


def flip(path: Path) -> None:
    """Change one byte of a shard's targets."""
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def test_a_shard_is_read_back_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When targets are first read from it, which is remembered in the store as long as the file
    stays as it is; a damaged one is named before its targets are used."""
    store = stored(tmp_path, 12)
    read: list[int] = []
    real = SoftTargetStore.read_shard

    def counted(self: SoftTargetStore, shard: int) -> object:
        read.append(shard)
        return real(self, shard)

    monkeypatch.setattr(SoftTargetStore, "read_shard", counted)
    split(store, 0.1, 0)
    assert read == []
    for _ in range(2):
        load_batch(store, [0, 1, 9])
    load_batch(opened(tmp_path), [2, 10])
    assert read == [0, 2]
    assert Tasks(tmp_path / TASKS).record(task_name(2))[READ_BACK]
    flip(store.shard_path(2))
    flip(store.shard_path(1))
    later = opened(tmp_path)
    load_batch(later, [3])
    for index, name in ((4, "shard-00001"), (11, "shard-00002")):
        with pytest.raises(StoreError, match=rf"1 file damaged \({name}.*run the capture again"):
            load_batch(later, [index])
    assert read == [0, 2, 1, 2]


def test_processes_divide_the_reading_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reads its share of what is needed later, and finds what the other has read."""
    stored(tmp_path, 16)
    read: list[tuple[int, int]] = []
    stores = [opened(tmp_path) for _ in range(2)]
    for rank, store in enumerate(stores):
        real = store.read_shard
        monkeypatch.setattr(
            store,
            "read_shard",
            lambda shard, rank=rank, real=real: (read.append((rank, shard)), real(shard))[1],
        )
        data = TrainingData(store, split(store, 0.1, 0), 0)
        loader = StepLoader(
            data,
            lambda indices, step, store=store: Batch(*([None] * 3)),  # type: ignore[arg-type]
            accumulation=1,
            process=ProcessRank(rank, 2),
            on_gpu=True,
            ahead=True,
        )
        monkeypatch.setattr(Batch, "pinned", lambda batch: batch)
        with loader:
            for step in range(3):
                loader.expect(step, [0], [0, 15, 5, 9])
            loader.take(2, [0])
    assert sorted(read) == [(0, 0), (0, 2), (1, 1), (1, 3)]
    for store, index in itertools.product(stores, (1, 6, 10, 14)):
        store.targets(index)
    assert len(read) == 4


def test_what_goes_wrong_in_the_thread_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the training, which ends, and the thread with it; as on a GPU, which alone gets one."""
    data = make_data(tmp_path)
    bad = set(data.batches(2, 4)[5])
    threads = set()

    def load(store: SoftTargetStore, indices: list[int], pack: bool = False) -> Batch:
        threads.add(threading.current_thread().name)
        if set(indices) == bad:
            raise StoreError("store: 1 file damaged")
        return load_batch(store, indices, pack)

    def on_gpu(*arguments: Any, **options: Any) -> StepLoader:
        return StepLoader(*arguments, **(options | {"on_gpu": True}))

    monkeypatch.setattr(engine, "load_batch", load)
    monkeypatch.setattr(engine, "StepLoader", on_gpu)
    monkeypatch.setattr(Batch, "pinned", lambda batch: batch)
    with pytest.raises(StoreError, match="1 file damaged"):
        run_with(data, tmp_path / "run")
    assert any(name.startswith("loader") for name in threads)
    assert not [one for one in threading.enumerate() if one.name.startswith("loader")]
