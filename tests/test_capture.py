"""Corpus → teacher → store: complete, byte for byte the same however it came about, and refused where it lies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.capturing import fill_store
from distill.console import Console
from teachers import capture as capture_module
from teachers import example_teacher
from teachers import store as store_module
from teachers.capture import CaptureError, CaptureSummary, capture, require_linear_output
from teachers.files import StoreError, exclusive, is_temporary
from teachers.gguf_teacher import GGUFTeacher
from teachers.manifest import MANIFEST
from teachers.recipe import Recipe
from teachers.records import typed
from teachers.share import Share
from teachers.store import COMPANION, SoftTargetStore
from tests.capture_child import PER_SHARD, RECIPE, SEQUENCES, Source, begin
from tests.conftest import Bent

ROOT = Path(__file__).parent.parent
KINDS = {
    "buckets": Recipe(num_topk=6),
    "sketch": RECIPE,
    "layers": Recipe(num_topk=6, sketch_bytes=10, layers=(0, 1), layer_bytes=8),
    "hidden": Recipe("hidden"),
    "dense": Recipe("dense"),
}
SLOW = 0.03  # seconds that each report of progress takes, so that there is something to be killed in
SHARDS = range(-(-SEQUENCES // PER_SHARD))


def quiet(done: int, words: str) -> None:
    """A report that nobody reads."""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store but locks and what a killed writer left behind."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not is_temporary(path)}


def filled(
    folder: Path, teacher: GGUFTeacher, source: Source, recipe: Recipe = RECIPE
) -> tuple[SoftTargetStore, CaptureSummary]:
    """A captured store, opened afresh."""
    summary = capture(teacher, source, begin(folder, teacher, source, recipe), quiet)
    return begin(folder, teacher, source, recipe), summary


def flip(path: Path, place: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


class Silent:
    """A teacher of whom nothing may be asked but who it is."""

    def __init__(self, teacher: GGUFTeacher) -> None:
        self.info = teacher.info


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spoken", [False, True])
def test_a_store_holds_what_the_teacher_says(
    tmp_path: Path, tiny_teacher: GGUFTeacher, kind: str, spoken: bool
) -> None:
    """Every sequence in order, with the targets that scoring it gives; progress ends at all of them."""
    source, recipe = Source(spoken), KINDS[kind]
    told: list[int] = []
    store = begin(tmp_path / "store", tiny_teacher, source, recipe)
    summary = capture(tiny_teacher, source, store, lambda done, words: told.append(done))
    assert summary == CaptureSummary(reused=0, damaged=(), written=len(SHARDS))
    assert told[-1] == SEQUENCES == len(store) and max(told) == SEQUENCES
    assert all(store.state(shard) == "complete" for shard in SHARDS)
    expected = source.take(tiny_teacher, 0, SEQUENCES, lambda done: None)
    companion = store.companion()
    assert (companion is None) == (kind in ("buckets", "dense"))
    bases = companion.bases if companion else {}
    for index, tokens in enumerate(expected):
        assert np.array_equal(store.tokens(index), tokens)
        arrays = tiny_teacher.score([tokens], recipe, bases)
        head = companion.head if companion else None
        wanted, found = typed(arrays, recipe, 1024, bases.get("final"), head), store.targets(index)
        assert type(found) is type(wanted) and torch.equal(found.best(), wanted.best())
        if kind == "buckets":
            with pytest.raises(ValueError, match="no tail sketch"):
                found.log_probs(2.0)
            assert (found.topk_log_probs(2.0) - wanted.topk_log_probs(2.0)).abs().max() < 2e-3  # type: ignore[union-attr]
        else:
            assert (found.log_probs(2.0).exp() - wanted.log_probs(2.0).exp()).abs().max() < 2e-3
        for layer, states in store.layer_states(index).items() if recipe.layers else ():
            codes: Any = arrays[f"layer{layer}"]
            again = bases[f"layer{layer}"].coordinates(
                codes, arrays[f"layer{layer}_scale"].astype(np.float16)
            )
            assert (states - again).abs().mean() < 1e-3


@pytest.mark.parametrize("spoken", [False, True])
def test_a_capture_is_reproducible(tmp_path: Path, tiny_teacher: GGUFTeacher, spoken: bool) -> None:
    """The same bytes again, and after the teacher has worked on something else in between."""
    first, _ = filled(tmp_path / "first", tiny_teacher, Source(spoken), KINDS["layers"])
    tiny_teacher.logits([np.arange(3, 90, dtype=np.int32)] * 20)
    second, _ = filled(tmp_path / "second", tiny_teacher, Source(spoken), KINDS["layers"])
    assert contents(first.folder) == contents(second.folder)


@pytest.mark.parametrize("kind", ["sketch", "hidden", "layers"])
def test_the_companion_comes_before_any_shard(
    tmp_path: Path, tiny_teacher: GGUFTeacher, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """No shard is ever there without what it takes to read it."""
    written: list[str] = []
    write = store_module.write_whole

    def noted(path: Path, data: bytes) -> None:
        written.append(path.name)
        write(path, data)

    monkeypatch.setattr(store_module, "write_whole", noted)
    filled(tmp_path / "store", tiny_teacher, Source(), KINDS[kind])
    assert written == [MANIFEST, COMPANION, *(f"shard-{shard:05d}.safetensors" for shard in SHARDS)]


def test_nothing_is_asked_of_the_teacher_twice(tmp_path: Path, tiny_teacher: GGUFTeacher) -> None:
    """A complete store is left exactly as it is, and the teacher is left alone."""
    store, _ = filled(tmp_path / "store", tiny_teacher, Source(spoken=True))
    before = {path: path.stat().st_mtime_ns for path in store.folder.iterdir()}
    told: list[int] = []
    summary = capture(Silent(tiny_teacher), Source(spoken=True), store, lambda done, words: told.append(done))  # type: ignore[arg-type]
    assert summary == CaptureSummary(reused=len(SHARDS), damaged=(), written=0) and not told
    assert {path: path.stat().st_mtime_ns for path in store.folder.iterdir()} == before


# --- damage


@pytest.mark.parametrize("kind", ["sketch", "hidden", "layers"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("with_shard", [False, True])
def test_a_damaged_companion_is_made_again(
    tmp_path: Path, tiny_teacher: GGUFTeacher, kind: str, damage: str, with_shard: bool
) -> None:
    """To the same bytes, with the first shard there or not, and without touching any other."""
    store, _ = filled(tmp_path / "store", tiny_teacher, Source(spoken=True), KINDS[kind])
    path, whole = store.folder / COMPANION, contents(store.folder)
    times = {shard: store.shard_path(shard).stat().st_mtime_ns for shard in SHARDS}
    if damage == "flipped":
        flip(path, len(whole[COMPANION]) // 2)
    elif damage == "cut":
        path.write_bytes(whole[COMPANION][:-1])
    else:
        path.unlink()
    if with_shard:
        store.shard_path(0).unlink()
    opened = begin(store.folder, tiny_teacher, Source(spoken=True), KINDS[kind])
    with pytest.raises((StoreError, FileNotFoundError)):
        opened.targets(0)
    again, summary = filled(store.folder, tiny_teacher, Source(spoken=True), KINDS[kind])
    assert contents(again.folder) == whole
    assert summary == CaptureSummary(len(SHARDS) - with_shard, (), int(with_shard))
    kept = list(SHARDS)[int(with_shard) :]
    assert {shard: again.shard_path(shard).stat().st_mtime_ns for shard in kept} == {
        shard: times[shard] for shard in kept
    }


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("spoken", [False, True])
def test_a_damaged_shard_alone_is_captured_again(
    tmp_path: Path,
    tiny_teacher: GGUFTeacher,
    capsys: pytest.CaptureFixture[str],
    shard: int,
    spoken: bool,
) -> None:
    """Byte for byte, and its file is named; no other file is written."""
    source = Source(spoken)
    store, _ = filled(tmp_path / "store", tiny_teacher, source)
    whole, path = contents(store.folder), store.shard_path(shard)
    times = {file.name: file.stat().st_mtime_ns for file in store.folder.iterdir()}
    flip(path, len(whole[path.name]) - 3)
    opened = begin(store.folder, tiny_teacher, source)
    assert not fill_store(tiny_teacher, source, opened, Console())  # type: ignore[arg-type]
    said = "".join(capsys.readouterr().out.split())  # the console breaks lines where it likes
    assert f"1shardscaptured,{len(SHARDS) - 1}reused" in said
    assert f"{path}wasdamagedandhasbeencapturedagain" in said
    assert contents(store.folder) == whole
    changed = {file.name for file in store.folder.iterdir() if times[file.name] != file.stat().st_mtime_ns}
    assert changed == {path.name}
    flip(path, 9)
    assert filled(store.folder, tiny_teacher, source)[1] == CaptureSummary(len(SHARDS) - 1, (shard,), 1)


# --- several processes


@pytest.mark.parametrize("spoken", [False, True])
@pytest.mark.parametrize("world", [2, 3, 9])
def test_shares_together_are_the_whole(
    tmp_path: Path, tiny_teacher: GGUFTeacher, spoken: bool, world: int
) -> None:
    """Any number of ranks, more than there are shards too: the same files as from one process."""
    source = Source(spoken)
    single, _ = filled(tmp_path / "single", tiny_teacher, source)
    written = []
    for rank in range(world):
        shared = begin(tmp_path / "shared", tiny_teacher, source)
        written.append(capture(tiny_teacher, source, shared, quiet, Share(rank, world)).written)
    assert written == [len(SHARDS[rank::world]) for rank in range(world)]
    assert contents(tmp_path / "shared") == contents(single.folder)


def test_other_ranks_wait_for_the_companion(
    tmp_path: Path, tiny_teacher: GGUFTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They make none of their own and write nothing until it is there."""
    monkeypatch.setattr(capture_module, "WAIT_SECONDS", 0.0)
    told: list[str] = []

    def impatient(done: int, words: str) -> None:
        told.append(words)
        if len(told) == 3:
            raise KeyboardInterrupt

    store = begin(tmp_path / "store", tiny_teacher, Source())
    with pytest.raises(KeyboardInterrupt):
        capture(Silent(tiny_teacher), Source(), store, impatient, Share(1, 2))  # type: ignore[arg-type]
    assert told == ["waiting for the first process"] * 3 and set(contents(store.folder)) == {MANIFEST}
    buckets = begin(tmp_path / "buckets", tiny_teacher, Source(), KINDS["buckets"])
    assert capture(tiny_teacher, Source(), buckets, quiet, Share(1, 2)).written == len(SHARDS[1::2])


class Children:
    """Captures in other processes (``tests.capture_child``)."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.capture_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def tell(self, line: str) -> None:
        """Send one line."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        """Wait for one line."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, folder: Path, **order: Any) -> int:
        """Begin one capture; returns its process id when it holds the folder."""
        self.tell(json.dumps({"folder": str(folder), **order}))
        said: list[str] = []
        while "held" not in said or not any(line.isdigit() for line in said):
            said.append(self.hear())
            assert said[-1], "the child is gone"
        return int(next(line for line in said if line.isdigit()))

    def hear_until(self, words: str) -> None:
        """Wait for a certain line."""
        while (line := self.hear()) != words:
            assert line, "the child is gone"

    def ends(self, count: int = 1) -> list[int]:
        """Wait for all that were started; returns their exit codes, negative for a signal."""
        self.tell("wait")
        found: list[int] = []
        while len(found) < count:
            line = self.hear()
            assert line, "the child is gone"
            found += [int(line.removeprefix("ended "))] if line.startswith("ended ") else []
        return found


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    """The process that captures are forked from."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    forking = Children()
    yield forking
    assert forking.process.stdin is not None
    forking.process.stdin.close()
    assert forking.process.wait(timeout=60) == 0


def test_a_folder_is_held_by_one_process_of_each_rank(tmp_path: Path, children: Children) -> None:
    """A second one of the same rank is refused as long as the first lives, others are not."""
    folder = tmp_path / "store"
    for rank in (0, 1):
        holder = children.start(folder, share=(rank, 3))
        with pytest.raises(StoreError, match=r"store is in use by another process"), exclusive(folder, rank):
            pass
        with exclusive(folder, 2), exclusive(folder, 1 - rank):
            os.kill(holder, signal.SIGKILL)
        assert children.ends() == [-signal.SIGKILL]
        with exclusive(folder, rank):
            pass
    assert all(is_temporary(path) for path in folder.iterdir())


def test_two_processes_side_by_side(
    tmp_path: Path, children: Children, tiny_teacher: GGUFTeacher, tiny_teacher_path: Path
) -> None:
    """Rank 1 begins first and waits; both together write what one process writes."""
    expected, _ = filled(tmp_path / "single", tiny_teacher, Source(spoken=True))
    order = {"teacher": str(tiny_teacher_path), "spoken": True}
    for rank in (1, 0):
        children.start(tmp_path / "shared", share=(rank, 2), **order)
    assert children.ends(2) == [0, 0]
    assert contents(tmp_path / "shared") == contents(expected.folder)


def test_a_killed_capture_is_completed_by_a_rerun(
    tmp_path: Path, children: Children, example_gguf: GGUFTeacher
) -> None:
    """``kill -9`` at random moments: no file counts as damaged, and the rerun ends at the same bytes."""
    expected = {spoken: filled(tmp_path / f"{spoken}", example_gguf, Source(spoken))[0] for spoken in (0, 1)}
    begun = time.perf_counter()
    store = begin(tmp_path / "slow", example_gguf, Source())
    capture(example_gguf, Source(), store, lambda done, words: time.sleep(SLOW))
    lasts = time.perf_counter() - begun
    ends = []
    for place, moment in enumerate(np.random.default_rng(8).uniform(0.0, 1.0, 5)):
        folder, source = tmp_path / f"killed-{place}", Source(place % 2)
        victim = children.start(folder, teacher=str(example_teacher()), slow=SLOW, spoken=place % 2)
        children.hear_until("capturing")
        time.sleep(moment * lasts)
        os.kill(victim, signal.SIGKILL)
        ends += children.ends()
        again = begin(folder, example_gguf, source)
        states = [again.state(shard) for shard in SHARDS]
        done = states.count("complete")
        assert states == ["complete"] * done + ["missing"] * (len(SHARDS) - done)
        with exclusive(folder):
            summary = capture(example_gguf, source, again, quiet)
        assert summary == CaptureSummary(done, (), len(SHARDS) - done)
        assert contents(folder) == contents(expected[place % 2].folder)
    assert -signal.SIGKILL in ends


@pytest.mark.parametrize("sync", [0, 1, 4])
def test_a_capture_killed_while_it_writes(
    tmp_path: Path, children: Children, tiny_teacher: GGUFTeacher, tiny_teacher_path: Path, sync: int
) -> None:
    """Killed with a file half on the disk, the manifest and the companion too: it does not count."""
    expected, _ = filled(tmp_path / "whole", tiny_teacher, Source())
    folder = tmp_path / "killed"
    children.start(folder, teacher=str(tiny_teacher_path), die_at=sync)
    assert children.ends() == [-signal.SIGKILL]
    left = [path.name for path in folder.iterdir() if path.suffix == ".tmp"]
    assert len(left) == 1 and (folder / left[0]).stat().st_size > 0
    again = begin(folder, tiny_teacher, Source())
    done = max(0, sync - 2)
    assert [again.state(shard) for shard in SHARDS] == ["complete"] * done + ["missing"] * (
        len(SHARDS) - done
    )
    assert (again.companion() is None) == (sync < 2)
    assert capture(tiny_teacher, Source(), again, quiet) == CaptureSummary(done, (), len(SHARDS) - done)
    assert contents(folder) == contents(expected.folder)
    assert again.bytes_on_disk() == expected.bytes_on_disk()


# --- teachers whose hidden states say something else than their logits


def test_an_output_that_bends_its_logits_is_refused(
    tmp_path: Path, tiny_teacher: GGUFTeacher, example_gguf: GGUFTeacher
) -> None:
    """Where hidden states are kept; named with what to choose instead, and nothing is written."""
    bent: Any = Bent(example_gguf)
    for teacher in (tiny_teacher, example_gguf):
        require_linear_output(teacher, Source().take(teacher, 0, 1, lambda done: None)[0])
    with pytest.raises(
        CaptureError, match=r"distill example desk \(phi3\).* by \d+%.*targets\.sketch_bytes=0"
    ):
        require_linear_output(bent, Source().take(bent, 0, 1, lambda done: None)[0])
    for kind in ("sketch", "hidden"):
        store = begin(tmp_path / kind, bent, Source(), KINDS[kind])
        with pytest.raises(CaptureError, match=r"targets\.kind=dense"):
            capture(bent, Source(), store, quiet)
        assert set(contents(store.folder)) == {MANIFEST}
    for kind in ("buckets", "dense"):
        store = begin(tmp_path / kind, bent, Source(), KINDS[kind])
        assert capture(bent, Source(), store, quiet).written == len(SHARDS)


def test_a_damaged_teacher_is_not_linear(tiny_teacher: GGUFTeacher) -> None:
    """Answers that are not numbers do not pass for small differences."""
    broken: Any = Bent(tiny_teacher)
    broken.logits = lambda sequences, exact=False: np.full((5, 1024), np.nan, np.float32)
    with pytest.raises(CaptureError):
        require_linear_output(broken, np.arange(3, 9, dtype=np.int32))
