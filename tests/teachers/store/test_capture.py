"""Corpus → teacher → store: complete, the same bytes however it came about, or refused.

Over 400 lines because every way to interrupt a capture is tried on the same store.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch

from distill.capture.capture import fill_store
from distill.runtime.progress import Console
from teachers.atomic_files import StoreError, exclusive, is_temporary
from teachers.gguf.file import read_gguf
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.machine import host
from teachers.store import store as store_module
from teachers.store.capture import (
    PROBE_TOKENS,
    CaptureError,
    CaptureSummary,
    capture,
    logit_rule,
    probe_text,
    require_causal,
)
from teachers.store.manifest import MANIFEST, TASKS
from teachers.store.shard_records import is_unchanged, task_name, totals
from teachers.store.store import SHARED_CODEC, SoftTargetStore
from teachers.store.tasks import Maker, Tasks
from teachers.store.teacher_record import make_teacher_record
from teachers.targets import fit_codec
from teachers.targets.recipe import Recipe
from teachers.targets.stored_arrays import typed
from tests.support.children.capture_child import (
    LEASE_SECONDS,
    PER_SHARD,
    RECIPE,
    SEQUENCES,
    Source,
    begin,
)
from tests.support.stores import filled, quiet
from tests.support.teachers import Bent, Peeking
from tests.support.tiny_models import Tiny, write_tiny

ROOT = Path(__file__).parents[3]
KINDS = {
    "buckets": Recipe(num_topk=6),
    "sketch": RECIPE,
    "layers": Recipe(num_topk=6, sketch_bytes=10, layers=(0, 1), layer_bytes=8),
    "hidden": Recipe("hidden"),
    "dense": Recipe("dense"),
}
SLOW = 0.03  # seconds that each report of progress takes: there must be time to be killed in
SHARDS = range(-(-SEQUENCES // PER_SHARD))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store but locks and what a killed writer left behind."""
    files = [path for path in folder.iterdir() if path.is_file() and not is_temporary(path)]
    return {path.name: path.read_bytes() for path in files}


def flip(path: Path, place: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


class Silent:
    """A teacher of whom nothing may be asked but who it is."""

    def __init__(self, teacher: GGUFTeacher) -> None:
        self.info = teacher.info


def times(folder: Path) -> dict[str, int]:
    """When each file was last written."""
    return {name: (folder / name).stat().st_mtime_ns for name in contents(folder)}


def changed(folder: Path, before: dict[str, int]) -> set[str]:
    """The files that have been written since."""
    return {name for name, time in times(folder).items() if before.get(name) != time}


class Made(NamedTuple):
    """A whole capture: what came of it, the progress told, its files in the order of writing."""

    folder: Path
    summary: CaptureSummary
    told: list[int]
    written: list[str]


Stored = Callable[[bool, str], Made]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: GGUFTeacher) -> Stored:
    """The captures of each kind, made once; a test that changes one copies it."""
    write = store_module.write_whole

    @functools.cache
    def made(spoken: bool, kind: str) -> Made:
        folder, source, told, written = tmp_path_factory.mktemp(kind), Source(spoken), [], []
        with pytest.MonkeyPatch.context() as patch:
            noted = lambda path, data: (written.append(path.name), write(path, data))  # noqa: E731
            patch.setattr(store_module, "write_whole", noted)
            store = begin(folder, tiny_teacher, source, KINDS[kind])
            summary = capture(tiny_teacher, source, store, lambda done, words: told.append(done))
        return Made(folder, summary, told, written)

    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_holds_the_answers(tiny_teacher: GGUFTeacher, stored: Stored, kind: str) -> None:
    """Every sequence in order, with the targets that scoring it gives; progress ends at all.

    The companion is written before any shard: none is ever there without what it takes to read it.
    """
    for spoken in (False, True):
        source, recipe, made = Source(spoken), KINDS[kind], stored(spoken, kind)
        store = begin(made.folder, tiny_teacher, source, recipe)
        shared_codec = store.shared_codec()
        assert (shared_codec is None) == (kind in ("buckets", "dense"))
        shards = [store.shard_path(shard).name for shard in SHARDS]
        assert made.written == [MANIFEST, *([SHARED_CODEC] if shared_codec else []), *shards]
        assert made.summary == CaptureSummary(reused=0, damaged=(), written=len(SHARDS))
        assert made.told[-1] == SEQUENCES == len(store) and made.told == sorted(made.told)
        assert any(0 < done < store.span(0)[1] for done in made.told), "nothing of the first shard"
        assert all(store.state(shard) == "complete" for shard in SHARDS)
        expected = source.take(tiny_teacher, 0, SEQUENCES, lambda done: None)
        bases, head = (shared_codec.bases, shared_codec.head) if shared_codec else ({}, None)
        for index, tokens in enumerate(expected):
            assert np.array_equal(store.tokens(index), tokens), (spoken, index)
            arrays: Any = tiny_teacher.score([tokens], recipe, bases)
            wanted: Any = typed(arrays, recipe, 1024, bases.get("final"), head)
            found: Any = store.targets(index)
            assert type(found) is type(wanted) and torch.equal(found.best(), wanted.best())
            if kind == "buckets":
                with pytest.raises(ValueError, match="no tail sketch"):
                    found.log_probs(2.0)
                error = found.topk_log_probs(2.0) - wanted.topk_log_probs(2.0)
            else:
                error = found.log_probs(2.0).exp() - wanted.log_probs(2.0).exp()
            assert error.abs().max() < 2e-3, (spoken, index)
            layers = store.layer_states(index) if recipe.layers else {}
            assert tuple(layers) == recipe.layers
            for layer, states in layers.items():
                codes, scales = arrays[f"layer{layer}"], arrays[f"layer{layer}_scale"]
                again = bases[f"layer{layer}"].coordinates(codes, scales.astype(np.float16))
                assert (states - again).abs().mean() < 1e-3, (spoken, index, layer)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_predictions_are_not_kept(
    tmp_path: Path, tiny_teacher: GGUFTeacher, kind: str
) -> None:
    """The other rows are, to the last bit, those of asking for all; the file is smaller."""
    recipe = KINDS[kind]
    for spoken in (False, True):
        source = Source(spoken, masked=True)
        store, _ = filled(tmp_path / f"{spoken}", tiny_teacher, source, recipe)
        codec = store.shared_codec()
        bases = {} if codec is None else codec.bases
        for shard in SHARDS:
            start, stop = store.span(shard)
            sequences = source.take(tiny_teacher, start, stop, lambda done: None)
            kept = [
                [place >= 1 + n % 9 or place % 3 == 0 for place in range(len(tokens) - 1)]
                for n, tokens in zip(range(start, stop), sequences, strict=True)
            ]
            request = source.generation_request(start, stop)
            if request is not None and (shard or not store.needs_shared_codec):
                request = replace(request, keep=None)
                everything = tiny_teacher.generate_and_score(request, recipe, bases)[1]
            else:
                everything = tiny_teacher.score(sequences, recipe, bases)
            found = store.read_file(store.shard_path(shard).name)
            assert found is not None and found["keep"].nbytes == -(-sum(map(len, kept)) // 8)
            for name, rows in everything.items():
                assert np.array_equal(found[name], rows[np.concatenate(kept)]), (spoken, name)
            for index, mask in zip(range(start, stop), kept, strict=True):
                assert store.keep(index).tolist() == mask, (spoken, index)
                assert len(store.targets(index).best()) == sum(mask), (spoken, index)
        assert store.positions() == sum(int(store.keep(n).sum()) for n in range(SEQUENCES))


def test_a_capture_repeats(tmp_path: Path, tiny_teacher: GGUFTeacher, stored: Stored) -> None:
    """The same bytes again, and after the teacher has worked on something else in between."""
    for spoken in (False, True):
        first = stored(spoken, "layers").folder
        tiny_teacher.logits([np.arange(3, 90, dtype=np.int32)] * 20)
        second, _ = filled(tmp_path / f"{spoken}", tiny_teacher, Source(spoken), KINDS["layers"])
        assert contents(first) == contents(second.folder), spoken


def test_nothing_is_asked_of_the_teacher_twice(tiny_teacher: GGUFTeacher, stored: Stored) -> None:
    """A complete store is left exactly as it is, and the teacher is left alone."""
    folder, source, told = stored(True, "sketch").folder, Source(spoken=True), []
    silent: Any = Silent(tiny_teacher)
    before = times(folder)
    store = begin(folder, tiny_teacher, source)
    summary = capture(silent, source, store, lambda done, words: told.append(done))
    assert summary == CaptureSummary(reused=len(SHARDS), damaged=(), written=0) and not told
    assert times(folder) == before


# --- damage


@pytest.mark.parametrize("kind", ["sketch", "hidden", "layers"])
def test_a_damaged_companion_is_made_again(
    tmp_path: Path, tiny_teacher: GGUFTeacher, stored: Stored, kind: str
) -> None:
    """To the same bytes, with the first shard there or not, and without touching any other."""
    source, recipe = Source(spoken=True), KINDS[kind]
    whole = contents(stored(True, kind).folder)
    size = len(whole[SHARED_CODEC])
    for damage, missing in itertools.product(("flipped", "cut", "gone"), ([], [0])):
        row = (kind, damage, missing)
        folder = shutil.copytree(stored(True, kind).folder, tmp_path / f"{row}")
        before, shared_codec = times(folder), folder / SHARED_CODEC
        if damage == "flipped":
            flip(shared_codec, size // 2)
        elif damage == "cut":
            shared_codec.write_bytes(whole[SHARED_CODEC][:-1])
        else:
            shared_codec.unlink()
        opened = begin(folder, tiny_teacher, source, recipe)
        for shard in missing:
            opened.shard_path(shard).unlink()
        with pytest.raises((StoreError, FileNotFoundError)):
            opened.targets(0)
            pytest.fail(f"{row} is read")
        _, summary = filled(folder, tiny_teacher, source, recipe)
        assert contents(folder) == whole, row
        reused = len(SHARDS) - len(missing)
        assert summary == CaptureSummary(reused, (), len(missing)), row
        rewritten = {SHARED_CODEC, *(opened.shard_path(shard).name for shard in missing)}
        assert changed(folder, before) == rewritten, row


def test_a_lost_companion_that_comes_out_otherwise_is_refused(
    tmp_path: Path,
    tiny_teacher: GGUFTeacher,
    stored: Stored,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On another machine, say: nothing is written, and what to do is said. Where no shard is there
    it is as good as any."""
    source = Source(spoken=True)
    folder = shutil.copytree(stored(True, "sketch").folder, tmp_path / "store")
    (folder / SHARED_CODEC).unlink()
    before = times(folder)
    monkeypatch.setattr(fit_codec, "METRIC_POSITIONS", 2)
    with pytest.raises(StoreError, match=f"{SHARED_CODEC} is lost") as told:
        filled(folder, tiny_teacher, source)
    assert "shard-00000" in str(told.value) and "another --store folder" in str(told.value)
    assert times(folder) == before
    for shard in SHARDS:
        begin(folder, tiny_teacher, source).shard_path(shard).unlink()
    assert filled(folder, tiny_teacher, source)[1] == CaptureSummary(0, (), len(SHARDS))


def test_a_damaged_shard_alone_is_captured_again(
    tmp_path: Path, tiny_teacher: GGUFTeacher, stored: Stored, capsys: pytest.CaptureFixture[str]
) -> None:
    """Byte for byte, and its file is named; no other file is written."""
    for spoken, shard in itertools.product((False, True), SHARDS):
        source, row = Source(spoken), (spoken, shard)
        folder = shutil.copytree(stored(spoken, "sketch").folder, tmp_path / f"{row}")
        whole, before = contents(folder), times(folder)
        opened = begin(folder, tiny_teacher, source)
        path = opened.shard_path(shard)
        flip(path, len(whole[path.name]) - 3)
        assert not fill_store(tiny_teacher, source, opened, Console())  # type: ignore[arg-type]
        said = "".join(capsys.readouterr().out.split())  # the console breaks lines where it likes
        assert f"1shardscaptured,{len(SHARDS) - 1}reused" in said, row
        assert f"{path}wasdamagedandhasbeencapturedagain".replace(" ", "") in said, row
        assert contents(folder) == whole, row
        assert changed(folder, before) == {path.name}, row
        flip(path, 9)
        summary = filled(folder, tiny_teacher, source)[1]
        assert summary == CaptureSummary(len(SHARDS) - 1, (shard,), 1), row


def test_what_is_remembered_is_not_trusted_blindly(
    tmp_path: Path, tiny_teacher: GGUFTeacher, stored: Stored
) -> None:
    """A shard that is not as it was is looked at again, and so is one whose record is damaged or
    lost; one that is as it was is not read."""
    whole = stored(False, "sketch").folder
    for damage in ("nonsense", "older", "gone", "all gone", "shard gone"):
        folder = shutil.copytree(whole, tmp_path / damage)
        store = begin(folder, tiny_teacher, Source())
        record, shard = folder / TASKS / f"{task_name(1)}.done", store.shard_path(1)
        if damage == "nonsense":
            record.write_bytes(b"{")
        elif damage == "older":
            os.utime(shard, (1, 1))
        elif damage == "gone":
            record.unlink()
        elif damage == "all gone":
            shutil.rmtree(folder / TASKS)
        else:
            record.write_bytes(b"\xff")
            shard.unlink()
        written = int(damage == "shard gone")
        with patch.object(store, "read_shard", wraps=store.read_shard) as reading:
            summary = capture(tiny_teacher, Source(), store, quiet)
        assert summary == CaptureSummary(len(SHARDS) - written, (), written), damage
        read = [call.args[0] for call in reading.call_args_list]
        assert read == (list(SHARDS) if damage == "all gone" else [1]), damage
        assert contents(folder) == contents(whole), damage
        records = Tasks(folder / TASKS).records()
        assert all(
            is_unchanged(store.shard_path(one), records[task_name(one)]) for one in SHARDS
        ), damage


# --- several processes


def note(told: list[str], done: float, words: str, most: int = 1 << 20) -> None:
    """A report that is kept; one too many is answered with Ctrl-C."""
    told.append(words)
    if len(told) > most:
        raise KeyboardInterrupt


def test_what_another_process_does_is_waited_for(
    tmp_path: Path, tiny_teacher: GGUFTeacher, stored: Stored
) -> None:
    """Also the companion; a process that takes the rest makes the same files, and one that dies
    loses the shard it is at."""
    for spoken, task in itertools.product((False, True), (SHARED_CODEC, task_name(1))):
        source, row = Source(spoken), f"{spoken}{task}"
        store = begin(tmp_path / row, tiny_teacher, source)
        other = Tasks(store.folder / TASKS, Maker(machine="elsewhere"), seconds=LEASE_SECONDS)
        lease = other.claim([task])
        assert lease is not None
        told: list[str] = []
        if task == SHARED_CODEC:
            silent: Any = Silent(tiny_teacher)
            with pytest.raises(KeyboardInterrupt):
                capture(silent, source, store, partial(note, told, most=3))
            assert set(contents(store.folder)) == {MANIFEST}, row
        lease._ended.set()  # no more signs of life
        told = []
        summary = capture(tiny_teacher, source, store, partial(note, told))
        assert any("codec" in words or "other processes" in words for words in told), row
        assert summary == CaptureSummary(0, (), len(SHARDS)), row
        assert contents(store.folder) == contents(stored(spoken, "sketch").folder), row


class Children:
    """Captures in other processes (``tests.support.children.capture_child``)."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.support.children.capture_child"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process: Any = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    def tell(self, line: str) -> None:
        """Send one line."""
        print(line, file=self.process.stdin, flush=True)

    def hear(self) -> str:
        """Wait for one line."""
        line: str = self.process.stdout.readline().strip()
        assert line, "the child is gone"
        return line

    def start(self, folder: Path, **order: Any) -> int:
        """Begin one capture; returns its process id when it holds the folder."""
        self.tell(json.dumps({"folder": str(folder), **order}))
        said = [self.hear(), self.hear()]
        while "held" not in said or not any(map(str.isdigit, said)):
            said.append(self.hear())
        return int(next(filter(str.isdigit, said)))

    def ends(self, count: int = 1) -> list[int]:
        """Wait for all that were started; returns their exit codes, negative for a signal."""
        self.tell("wait")
        found: list[int] = []
        while len(found) < count:
            word, *code = self.hear().split()
            found += map(int, code) if word == "ended" else []
        return found


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    """The process that captures are forked from."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    forking = Children()
    yield forking
    forking.process.stdin.close()
    assert forking.process.wait(timeout=60) == 0


def test_a_folder_is_held_by_one_process_of_each_rank(tmp_path: Path, children: Children) -> None:
    """A second one of the same rank is refused as long as the first lives, others are not."""
    folder = tmp_path / "store"
    for rank in (0, 1):
        holder = children.start(folder, rank=rank)
        refused = pytest.raises(StoreError, match="store is in use by another process")
        with refused, exclusive(folder, rank):
            pass
        with exclusive(folder, 2), exclusive(folder, 1 - rank):
            os.kill(holder, signal.SIGKILL)
        assert children.ends() == [-signal.SIGKILL]
        with exclusive(folder, rank):
            pass
    assert all(is_temporary(path) for path in folder.iterdir())


def test_two_processes_side_by_side(
    tmp_path: Path, children: Children, tiny_teacher: GGUFTeacher, stored: Stored
) -> None:
    """Both together write what one process writes, and it is known who wrote what."""
    order = {"teacher": str(tiny_teacher.file.path), "spoken": True, "slow": SLOW}
    for _ in range(2):
        children.start(tmp_path / "shared", **order)
    assert children.ends(2) == [0, 0]
    assert contents(tmp_path / "shared") == contents(stored(True, "sketch").folder)
    store = begin(tmp_path / "shared", tiny_teacher, Source(True))
    records = Tasks(store.folder / TASKS).records()
    assert list(records) == [task_name(shard) for shard in SHARDS]
    makers = {record["maker"]["process"] for record in records.values()}
    assert len(makers) == 2, "one process did everything"
    for shard, record in enumerate(records.values()):
        assert is_unchanged(store.shard_path(shard), record) and record["maker"]["host"] == host()
    whole = totals(records, store.manifest)
    assert whole["sequences"] == SEQUENCES and whole["positions"] == store.positions()
    assert whole["tokens"] == store.lengths().sum()


def test_random_kills_and_stalls(
    tmp_path: Path, children: Children, tiny_teacher: GGUFTeacher, stored: Stored
) -> None:
    """Eight processes, of which some are killed, some sleep beyond their lease and one is slow:
    every byte is as from one process, and no shard is open."""
    chance = random.Random(4)
    folder, expected = tmp_path / "store", contents(stored(False, "sketch").folder)
    for round_ in range(2):
        gate = tmp_path / f"gate-{round_}"  # none is done before the last is there
        order = {"teacher": str(tiny_teacher.file.path), "gate": str(gate)}
        victims = [
            children.start(folder, slow=0.1 * (1 + 2 * (number == 7)), **order)
            for number in range(8)
        ]
        gate.touch()
        time.sleep(chance.uniform(0.05, 0.2))
        stalled = victims[:2]
        for victim in stalled:
            os.kill(victim, signal.SIGSTOP)
        for victim in victims[2:4] if round_ else victims[2:]:
            os.kill(victim, signal.SIGKILL)
        time.sleep(1.5 * LEASE_SECONDS)
        for victim in stalled:
            os.kill(victim, signal.SIGCONT)
        ends = children.ends(8)
        assert set(ends) == {0, -signal.SIGKILL}, ends
        assert contents(folder) == expected, round_
        store, tasks = begin(folder, tiny_teacher, Source()), Tasks(folder / TASKS)
        assert len(tasks.records()) == len(SHARDS) and not tasks.leases(), round_
        for shard in SHARDS[round_:]:
            store.shard_path(shard).unlink()


def test_a_killed_capture_is_completed_by_a_rerun(
    tmp_path: Path, children: Children, tiny_teacher: GGUFTeacher, stored: Stored
) -> None:
    """``kill -9`` at random moments: no file counts as damaged, a rerun ends at the same bytes."""
    begun = time.perf_counter()
    store = begin(tmp_path / "slow", tiny_teacher, Source())
    capture(tiny_teacher, Source(), store, lambda done, words: time.sleep(SLOW))
    lasts = time.perf_counter() - begun
    ends = []
    for place, moment in enumerate(np.random.default_rng(8).uniform(0.0, 1.0, 3)):
        folder, spoken = tmp_path / f"killed-{place}", bool(place % 2)
        order = {"teacher": str(tiny_teacher.file.path), "slow": SLOW, "spoken": spoken}
        victim = children.start(folder, **order)
        while children.hear() != "capturing":
            pass
        time.sleep(moment * lasts)
        os.kill(victim, signal.SIGKILL)
        ends += children.ends()
        again = begin(folder, tiny_teacher, Source(spoken))
        done = completed(again)
        summary = capture(tiny_teacher, Source(spoken), again, quiet)
        assert summary == CaptureSummary(done, (), len(SHARDS) - done), place
        assert contents(folder) == contents(stored(spoken, "sketch").folder), place
    assert -signal.SIGKILL in ends


def completed(store: SoftTargetStore) -> int:
    """How many shards are complete: the first ones, with all others missing."""
    states = [store.state(shard) for shard in SHARDS]
    done = states.count("complete")
    assert states == ["complete"] * done + ["missing"] * (len(SHARDS) - done)
    return done


def test_a_capture_killed_while_it_writes(
    tmp_path: Path, children: Children, tiny_teacher: GGUFTeacher, stored: Stored
) -> None:
    """Killed with a file half on the disk, manifest or companion too: it does not count."""
    expected = begin(stored(False, "sketch").folder, tiny_teacher, Source())
    for sync in (0, 1, 4):
        folder = tmp_path / f"{sync}"
        children.start(folder, teacher=str(tiny_teacher.file.path), die_at=sync)
        assert children.ends() == [-signal.SIGKILL], sync
        (left,) = folder.glob(".*.tmp")
        assert left.stat().st_size > 0
        again = begin(folder, tiny_teacher, Source())
        done = max(0, sync - 2)
        assert completed(again) == done, sync
        assert (again.shared_codec() is None) == (sync < 2)
        summary = capture(tiny_teacher, Source(), again, quiet)
        assert summary == CaptureSummary(done, (), len(SHARDS) - done), sync
        assert contents(folder) == contents(expected.folder), sync
        assert again.bytes_on_disk() == expected.bytes_on_disk(), sync


# --- teachers whose hidden states say something else than their logits


def test_an_output_that_bends_its_logits_is_refused(
    tmp_path: Path, tiny_teacher: GGUFTeacher, example_gguf: GGUFTeacher
) -> None:
    """Where hidden states are kept; named with what to choose instead, and nothing is written."""
    bent: Any = Bent(example_gguf)
    for teacher in (tiny_teacher, example_gguf):
        logit_rule(teacher, Source().take(teacher, 0, 1, lambda done: None)[0])
    message = r"distill example desk \(phi3\).* by \d+%.*targets\.sketch_bytes=0"
    with pytest.raises(CaptureError, match=message):
        logit_rule(bent, Source().take(bent, 0, 1, lambda done: None)[0])
    for kind in ("sketch", "hidden"):
        store = begin(tmp_path / kind, bent, Source(), KINDS[kind])
        with pytest.raises(CaptureError, match=r"targets\.kind=dense"):
            capture(bent, Source(), store, quiet)
        assert set(contents(store.folder)) == {MANIFEST}
    for kind in ("buckets", "dense"):
        store = begin(tmp_path / kind, bent, Source(), KINDS[kind])
        assert capture(bent, Source(), store, quiet).written == len(SHARDS)


def test_answers_that_depend_on_later_tokens_are_refused(
    tiny_teacher: GGUFTeacher, example_gguf: GGUFTeacher
) -> None:
    """Whatever the file says of itself; also on texts of a few tokens."""
    peeking: Any = Peeking(tiny_teacher)
    for spoken in (False, True):
        text = probe_text(tiny_teacher, Source(spoken))
        assert len(text) == PROBE_TOKENS
        for size in (3, 9, len(text)):
            for teacher in (tiny_teacher, example_gguf):
                require_causal(teacher, text[:size])
            with pytest.raises(CaptureError, match=r"no causal language model.* \d+%"):
                require_causal(peeking, text[:size])


# --- a teacher in several files


def test_a_split_teacher_is_captured_as_the_whole_one(tmp_path: Path) -> None:
    """The same arrays and facts, whichever part is named; nothing of the split goes further."""
    made = []
    whole = write_tiny(tmp_path / "whole.gguf", Tiny())
    parts = read_gguf(write_tiny(tmp_path / "tiny.gguf", Tiny(), per_part=9)).parts
    assert len(parts) == 4
    for path in (whole, parts[2]):
        with GGUFTeacher(path, threads=1) as teacher:
            store, _ = filled(tmp_path / path.stem, teacher, Source())
            record = make_teacher_record(teacher, teacher.file, [])
        names = [SHARED_CODEC, *(store.shard_path(shard).name for shard in SHARDS)]
        made.append((teacher.info, record, [store.read_file(name) for name in names]))
    (one, first, arrays), (two, second, others) = made
    assert one.sha256 != two.sha256 and (one.name, two.name) == ("whole", "tiny")
    same = {"sha256": "", "name": "", "file_bytes": 0}
    assert replace(one, **same) == replace(two, **same)  # type: ignore[arg-type]
    assert two.file_bytes == sum(part.stat().st_size for part in parts)
    for ours, theirs in zip([first.arrays(), *arrays], [second.arrays(), *others], strict=True):
        assert ours and theirs and ours.keys() == theirs.keys()
        for name in ours.keys() - {"card"}:
            assert np.array_equal(ours[name], theirs[name]), name
    assert second.tokenizer == first.tokenizer and second.about == first.about


def test_a_damaged_teacher_is_not_linear(tiny_teacher: GGUFTeacher) -> None:
    """Answers that are not numbers do not pass for small differences."""
    broken: Any = Bent(tiny_teacher)
    broken.logits = lambda sequences, exact=False: np.full((5, 1024), np.nan, np.float32)
    with pytest.raises(CaptureError):
        logit_rule(broken, np.arange(3, 9, dtype=np.int32))
