"""Several workers, however they are started, fill one store; one command shows how far they are."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from distill.pipeline.status import status_of
from teachers.store.manifest import MANIFEST, SEQUENCES, TASKS
from teachers.store.sequence_index import INDEX
from teachers.store.task_files import TaskFiles
from teachers.store.tasks import Maker, Tasks
from tests.conftest import command, refuses, says
from tests.support.tiny_models import Tiny, write_tiny

SHARDS = 3
needs_datatrove = pytest.mark.skipif(
    importlib.util.find_spec("datatrove") is None,
    reason="datatrove is not installed (pip install 'so8t-distill[workers]')",
)


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small teacher and texts of three shards, as a command takes them."""
    folder, chance = tmp_path_factory.mktemp("given"), random.Random(0)
    teacher = write_tiny(folder / "tiny.gguf", Tiny())
    words = [chance.choice(("order", "tank", "room")) for _ in range(20)]
    lines = [" ".join(chance.sample(words, 5)) + f" {number}" for number in range(600)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return ["--teacher", str(teacher), "--data", str(data)]


@pytest.fixture(scope="module")
def whole(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of one worker, with as many threads as each of two on two cores has."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    given = [sys.executable, "-m", "distill", "capture", *flags, "--store", str(folder)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(given, check=True, stdout=subprocess.DEVNULL, env=one_thread)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store but what says who does what."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    own = [path for path in files if TASKS not in path.relative_to(folder).parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in own}


@needs_datatrove
def test_local_workers(flags: list[str], whole: Path, tmp_path: Path) -> None:
    """The same bytes as from one, who was at work is known, and a second time nothing is done."""
    store = tmp_path / "store"
    for words in ("2 workers", "2 workers"):
        given = ["--store", store, "--executor", "local", "--workers", 2]
        assert words in says("capture", *flags, *given)
        assert contents(store) == contents(whole)
    logs = [log.read_text() for log in sorted((store / TASKS / "engine").glob("worker-*.log"))]
    assert len(logs) == 2 and all("skipped" in log for log in logs)
    status = json.loads(says("status", store, "--json"))
    assert (status["done"], status["claimed"], status["open"]) == (SHARDS, 0, 0)
    assert status["seconds_left"] == 0 and not status["failures"]
    failing = ["--store", tmp_path / "bad", "--executor", "local", "--workers", 2]
    (bad := tmp_path / "bad.jsonl").write_text('{"text": "a"}\n[3]\n')
    complaint = refuses_after("capture", *flags[:2], "--data", bad, *failing)
    assert "2 of 2 workers failed" in complaint and "bad.jsonl" in complaint


@needs_datatrove
def test_local_workers_end_with_their_command(flags: list[str], tmp_path: Path) -> None:
    """Also where it is killed and can tell them nothing; what is saved counts."""
    store = tmp_path / "a store of its own"
    given = ["--store", str(store), "--executor", "local", "--workers", "2"]
    started = subprocess.Popen(
        [sys.executable, "-m", "distill", "capture", *flags, *given], stdout=subprocess.DEVNULL
    )

    def workers() -> list[psutil.Process]:
        found = psutil.process_iter(["cmdline"])
        own = {str(store), "--config"}  # the command's own settings are not in a file
        return [one for one in found if own <= set(one.info["cmdline"] or ())]

    def until(over: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not over():
            assert time.monotonic() < end, workers()
            time.sleep(0.05)

    until(lambda: len(list(store.glob(f"{TASKS}/engine/worker-*.log"))) == 2)
    started.kill()
    started.wait()
    until(lambda: not workers())
    assert status_of(store).done < SHARDS


def refuses_after(*words: object) -> str:
    """Why a command exits with 2 after it has begun, in one line."""
    ended = command(*words)
    assert ended.code == 2 and ended.complaint.count("\n") == 1, ended
    return ended.complaint


@needs_datatrove
def test_workers_through_slurm(
    flags: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is given to ``sbatch`` starts a worker that fills the store."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, said in (("sbatch", "Submitted batch job 1"), ("scontrol", "localhost")):
        (tools / name).write_text(f"#!/bin/sh\necho {said}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    store = tmp_path / "store"
    given = ["--store", store, "--executor", "slurm", "--workers", 1]
    assert "needs --engine time=VALUE" in refuses_after("capture", *flags, *given)
    engine = ["--engine", "time=1:00:00", "--engine", "partition=cpu"]
    assert "workers queued: 1" in says("capture", *flags, *given, *engine)
    folder = store / TASKS / "engine"
    script = (folder / "launch_script.slurm").read_text()
    assert "launch_pickled_pipeline" in script and "#SBATCH --partition=cpu" in script
    inside = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_NODELIST": "localhost"}
    code = "from datatrove.tools.launch_pickled_pipeline import main; main()"
    subprocess.run(
        [sys.executable, "-c", code, str(folder / "executor.pik")],
        check=True,
        env=os.environ | inside,
        stderr=subprocess.DEVNULL,
    )
    assert contents(store) == contents(whole)


def test_what_cannot_be_started_is_refused(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, before anything is read or written."""
    store = tmp_path / "store"
    monkeypatch.setenv("PATH", str(tmp_path))
    find = importlib.util.find_spec
    missing = lambda name, *_: None if name in ("datatrove", "ray") else find(name)  # noqa: E731
    for without, given, words in (
        (False, ["--executor", "kubernetes", "--store", store], "there are local, slurm, ray"),
        (False, ["--executor", "local"], "needs --store"),
        (False, ["--workers", 3, "--store", store], "--workers and --engine are for --executor"),
        (False, ["--executor", "local", "--store", store, "--workers", 0], "give at least 1"),
        (True, ["--executor", "local", "--store", store], "datatrove, which is not installed"),
    ):
        with monkeypatch.context() as patch:
            if without:
                patch.setattr("distill.pipeline.executors.find_spec", missing)
            assert words in refuses("capture", *flags, *given), given
        assert not store.exists()
    if find("datatrove") is not None:
        for given, words in (
            (["--executor", "slurm"], "there is no sbatch here"),
            (["--executor", "local", "--engine", "gpus=3"], "local has start_method"),
        ):
            assert words in refuses_after("capture", *flags, "--store", store, *given), given


def test_the_status_of_a_store(whole: Path, tmp_path: Path) -> None:
    """Who works on it and how fast, what failed with which last words; damaged files are no
    trouble; what is no store is refused."""
    assert "is no store" in refuses("status", tmp_path)
    store = shutil.copytree(whole, tmp_path / "store")
    (store / "shard-00002.safetensors").unlink()
    tasks = Tasks(store / TASKS, Maker("Some processor", 8, "0", "box", "box.0", 7))
    tasks.reopen("shard-00002")
    for number in (0, 1):
        lease = tasks.claim([f"again-{number}"])
        assert lease is not None
        with lease:
            lease.finish({"tokens": 5000})
    lease = tasks.claim(["shard-00002"])
    assert lease is not None
    lease._begun -= 60
    tasks.files.write("shard-00001.failed", b'{"words": "Killed: by hand"}')
    tasks.files.write("shard-00000.failed", b"{")
    status = json.loads(says("status", store, "--json"))
    assert (status["done"], status["claimed"], status["open"]) == (2, 1, 0)
    (worker,) = status["workers"]
    assert (worker["host"], worker["threads"], worker["task"]) == ("box", 8, "shard-00002")
    assert worker["speed"] > 0 and status["tokens_per_second"] == worker["speed"]
    assert status["seconds_left"] > 0
    (failure,) = status["failures"]
    assert failure["done"] and failure["words"] == "Killed: by hand"
    said = " ".join(says("status", store).split())
    assert "2 of 3 shards done (66.7%), 1 at work, 0 open" in said and "by hand" in said
    lease.release()
    tasks.files.write("shard-00002.0003.lease", b'{"seconds": 60.0}')
    tasks.files.write("shard-00002.failed", b'{"words": "4 have died", "given_up": true}')
    said = " ".join(says("status", store).split())
    assert "0 at work, 0 open, 1 given up" in said and "4 have died" in said
    assert "tokens/s on average" in says("status", whole)


def test_a_store_that_cannot_be_worked_on(
    flags: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another recipe or teacher, damaged tokens, a disk that cannot be written to: one line, and
    nothing is changed. A full store needs no writing."""
    store = shutil.copytree(whole, tmp_path / "store")
    before = contents(store)
    other = write_tiny(tmp_path / "other.gguf", Tiny(seed=9))
    given = ["--store", store, "--safety-labels", "none"]
    for changed, words in (
        ([*flags, "--set", "targets.num_topk=3"], "was made with recipe"),
        (["--teacher", str(other), *flags[2:]], "was made with corpus_sha256|teacher_sha256"),
    ):
        complaint = refuses_after("capture", *changed, *given)
        assert any(word in complaint for word in words.split("|")), complaint
        assert contents(store) == before, changed

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(store))

    with monkeypatch.context() as patch:
        patch.setattr(TaskFiles, "create", refuse)
        assert "skipped" in says("capture", *flags, *given)
        (store / "shard-00001.safetensors").unlink()
        complaint = refuses_after("capture", *flags, *given)
        assert "Read-only file system" in complaint and "can be written to" in complaint
    (store / SEQUENCES / "part-00000.safetensors").write_bytes(b"")
    assert "part-00000" in refuses_after("capture", *flags, *given)
    (store / SEQUENCES / INDEX).write_text("{")
    assert "sequences.json is damaged" in refuses("capture", *flags, *given)
    (store / MANIFEST).write_text("{")
    assert "manifest.json is damaged" in refuses("status", store)
    monkeypatch.setenv("DISTILL_LEASE_SECONDS", "soon")
    assert "DISTILL_LEASE_SECONDS='soon'" in refuses("status", store)
