"""Several processes learn what one learns, with DDP and with FSDP.

The launcher is started once and does all trainings; one process, here, does the same ones for
comparison. Trouble in one of two processes: both do the same about it and say what it was.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate import PartialState

from distill.runs.folder import latest_checkpoint
from stability.detectors import Action
from teachers.targets.recipe import Recipe
from tests.support.children import train_child
from tests.support.stores import write_store
from tests.support.teachers import BigramTeacher
from tests.support.training import SKIPPED, STEPS, TRAININGS, UNDONE, WEIGHT, make_store

VOCAB, WIDTH = 48, 16
WIDE = 800
RUN = {
    "epochs": 2,
    "batch_size": 4,
    "evaluations": 4,
    "learning_rate": 0.005,
    "weight_decay": 0.3,
    "precision": "fp32",
}
SHORT = RUN | {"batch_size": 8, "epochs": 1}
RUNS = {
    "whole": SHORT,
    "muon": SHORT | {"optimizer": "muon"},
    "micro": SHORT | {"accumulation": 4},
    "ragged": RUN | {"batch_size": 3, "accumulation": 2},  # a process has one sequence, not two
    "single": RUN | {"batch_size": 1, "epochs": 1},  # one process has none at all
    "heads": SHORT | {"heads": True},
    "heads-micro": SHORT | {"accumulation": 4, "heads": True},
    "heads-single": RUN | {"batch_size": 1, "epochs": 1, "heads": True},
    "checkpointed": SHORT | {"gradient_checkpointing": True},
    "sampled": SHORT | {"store": "../wide", "sample": 150},
    "unsampled": SHORT | {"store": "../wide", "sample": 0},
    "sampled-micro": SHORT | {"store": "../wide", "sample": 150, "accumulation": 4},
    "stopped": RUN | {"learning_rate": 0.05, "epochs": 4, "evaluations": 13, "patience": 2},
}
UNTIED = RUN | {"untied": True, "optimizer": "muon"}  # rows of the embedding are left out
CUT = UNTIED | {"stop_at": 5}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets of 15 sequences with the states of two layers; beside them, in ``wide``, those of a
    vocabulary that a sample can stand for."""
    folder = tmp_path_factory.mktemp("distributed")
    for name, vocab_size, num_topk in (("store", VOCAB, 8), ("wide", WIDE, 2)):
        random = np.random.default_rng(0)
        draws = (random.integers(0, vocab_size, size=random.integers(4, 14)) for _ in range(15))
        rows = [draw.astype(np.int32) for draw in draws]
        recipe = Recipe(num_topk=num_topk, layers=(0, 1), layer_bytes=12)
        write_store(folder / name, BigramTeacher(vocab_size, WIDTH), rows, recipe, 10)
    return folder / "store"


@pytest.fixture(scope="module")
def one(store: Path) -> Path:
    """All runs in one process, and one of them cut."""
    PartialState(cpu=True)
    for name, settings in (RUNS | {"plain": UNTIED, "cut": CUT}).items():
        train_child.run(store, store.parent / "one" / name, settings)
    return store.parent / "one"


@pytest.fixture(scope="module")
def launched(store: Path, one: Path) -> Path:
    """All runs in two processes, one of them cut, and one that a single process has begun.

    Also the trainings with trouble; processes that wait for each other for ever are ended.
    """
    folder, guarded_store = store.parent, store.parent / "guarded"
    make_store(guarded_store)
    for kind in ("ddp", "fsdp"):
        shutil.copytree(one / "cut", folder / kind / "continued")
    settings = folder / "settings.json"
    torn = SHORT | {"precision": "auto"}
    settings.write_text(json.dumps(RUNS | {"cut": CUT, "continued": UNTIED, "torn": torn}))
    arguments = map(str, (store, guarded_store, folder, settings))
    launch = subprocess.Popen(
        [sys.executable, "-m", train_child.__name__, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = launch.communicate(timeout=600)
    finally:
        if launch.poll() is None:
            os.killpg(launch.pid, signal.SIGKILL)
    assert launch.returncode == 0, said
    return folder


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def several(request: pytest.FixtureRequest, launched: Path) -> Path:
    return launched / str(request.param)


# -- without trouble


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def assert_same_run(folder: Path, expected: Path) -> None:
    """The same losses in every step, the same held-out scores, and the same student in the end."""
    for line, wanted in zip(metrics_of(folder), metrics_of(expected), strict=True):
        assert line.pop("kind") == wanted.pop("kind") and line["step"] == wanted["step"], folder
        line.pop("padding", None), wanted.pop("padding", None)  # of each part of a step
        if folder.parent.name == "fsdp" and "update_ratio" in wanted:
            # Estimated from some elements; where weights are spread, from the first process's.
            assert math.isfinite(line.pop("update_ratio")) and wanted.pop("update_ratio") >= 0
        # Nothing but rounding, whose last bit depends on the order of sums.
        errors = [values.pop("rotation_error", 0.0) for values in (line, wanted)]
        assert all(0.0 <= error < 1e-6 for error in errors), (folder, errors)
        assert line == pytest.approx(wanted, rel=1e-5, abs=1e-7), folder
    mine, theirs = (
        safetensors.torch.load_file(place / "final.safetensors") for place in (folder, expected)
    )
    assert mine.keys() == theirs.keys(), folder
    for name, tensor in theirs.items():
        where = f"{name} in {folder}"
        torch.testing.assert_close(mine[name], tensor, rtol=1e-5, atol=1e-5, msg=where)
    outcomes = [summary_of(place) | {"continued_from": 0} for place in (folder, expected)]
    assert outcomes[0] == outcomes[1], folder


def test_several_processes_learn_what_one_does(several: Path, one: Path, store: Path) -> None:
    """Losses, scores and weights, with one part per step or several, or none for a process.

    Eight sequences at once in one process are eight one by one in two. Each continues from the
    other's checkpoint to the end of the uninterrupted run.
    """
    for name in RUNS:
        assert_same_run(several / name, one / name)
    assert_same_run(several / "micro", one / "whole")
    assert_same_run(several / "heads-micro", one / "heads")
    assert_same_run(several / "sampled-micro", one / "sampled")
    losses = [
        next(line["loss"] for line in metrics_of(one / name) if line["kind"] == "train")
        for name in ("sampled", "unsampled")
    ]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.2)
    train_child.run(store, several / "cut", UNTIED)
    for name in ("continued", "cut"):
        assert summary_of(several / name)["continued_from"] == 4, name
        assert_same_run(several / name, one / "plain")


def test_each_process_reads_its_own_part(several: Path, one: Path) -> None:
    """Of the soft targets that are trained on, in an epoch: no sequence is read by both."""
    (whole,) = (json.loads(path.read_text()) for path in (one / "whole").glob("read-*.json"))
    for name in ("whole", "micro"):
        first, second = (
            json.loads((several / name / f"read-{rank}.json").read_text()) for rank in (0, 1)
        )
        assert first and second and sorted(first + second) == whole, name


def test_all_processes_compute_in_what_the_first_one_measures(several: Path) -> None:
    """Where machines differ, or a clock."""
    found = [(several / "torn" / f"precision-{rank}.txt").read_text() for rank in (0, 1)]
    assert found == ["bf16", "bf16"]


def test_the_runs_are_what_they_should_be(one: Path) -> None:
    """The run with patience stops early, before its last weights; others go to the end."""
    stopped = summary_of(one / "stopped")
    assert stopped["best"] < stopped["steps"] < 4 * 3
    assert summary_of(one / "whole")["steps"] == 2


# -- with trouble in one of the processes (tests/integration/test_guard_distributed.py)


SPOILT = "batch: targets.topk_logits"


@dataclass(frozen=True)
class Outcome:
    """A training in two processes: what each saw, and what the guard wrote into its log."""

    folder: Path
    first: dict[str, Any]
    second: dict[str, Any]
    events: list[dict[str, Any]]


@pytest.fixture(scope="module")
def outcomes(several: Path) -> dict[str, Outcome]:
    return {name: read_outcome(several / name) for name in TRAININGS}


def read_outcome(folder: Path) -> Outcome:
    first, second = (json.loads((folder / f"process-{n}.json").read_text()) for n in (0, 1))
    events = [line for line in metrics_of(folder) if line["kind"] == "event"]
    return Outcome(folder, first, second, events)


def test_both_processes_do_the_same(outcomes: dict[str, Outcome]) -> None:
    """Every word and all that decisions depend on, in the end and before; the same student."""
    for name, one in outcomes.items():
        for part in ("ended", "told", "state", "student"):
            assert one.first[part] == one.second[part], (name, part)
        if one.folder.parent.name == "ddp":  # each has all of the weights, after every step
            assert one.first["digests"] == one.second["digests"]
        assert (one.first["ended"] == "finished") == (name != "hopeless")
        assert bool(one.first["told"]) == bool(one.events) == (name != "clean")


def test_what_one_process_cannot_use_is_left_out(outcomes: dict[str, Outcome]) -> None:
    """Named, whichever process it is in, which makes no difference to the weights."""
    clean = outcomes["clean"]
    for name in ("skipped", "skipped, of the first"):
        one = outcomes[name]
        assert [event["step"] for event in one.events] == [fault.step for fault in SKIPPED]
        assert {event["action"] for event in one.events} == {"skip_step"}
        assert [event["tensor"] for event in one.events] == [SPOILT, WEIGHT, WEIGHT]
        for event in one.events:
            assert event["tensor"].removeprefix("batch: ") in event["words"], (name, event)
            assert len(event["batch"]) >= 3, (name, event)
        for process in ("first", "second"):
            digests = getattr(one, process)["digests"]
            assert digests == getattr(outcomes["skipped"], process)["digests"]
            missing = {str(fault.step + 1) for fault in SKIPPED}
            assert digests.keys() == {str(step) for step in range(1, STEPS + 1)} - missing
            wanted = getattr(clean, process)["digests"]
            assert digests["12"] == wanted["12"] and digests["14"] != wanted["14"]


def test_what_happened_to_one_process_is_undone_in_both(outcomes: dict[str, Outcome]) -> None:
    """A flipped bit and poisoned moments: named; training ends with the weights of one without."""
    one, clean = outcomes["undone"], outcomes["clean"]
    assert [event["action"] for event in one.events] == ["rollback"] * len(UNDONE)
    assert [event["step"] for event in one.events] == [fault.step for fault in UNDONE]
    for fault, event in zip(UNDONE, one.events, strict=True):
        harmed = (one.first, one.second)[fault.rank]["harmed"][fault.kind]
        assert harmed in event["tensor"] and harmed in event["words"], fault
        assert ("exp_avg" in event["tensor"]) == ("moment" in fault.kind), fault
        assert event["to_step"] < event["step"], fault
    assert one.events[2]["signal"] == "weight norm"
    assert one.first["state"]["blamed"] == []  # it was no batch's fault
    for process in ("first", "second"):
        ours, theirs = getattr(one, process), getattr(clean, process)
        assert ours["digests"][str(STEPS)] == theirs["digests"][str(STEPS)]
        assert ours["student"] == theirs["student"]


def test_without_a_sound_batch_in_one_process_both_give_up(outcomes: dict[str, Outcome]) -> None:
    """With the same words, the tensor named in each event, and a checkpoint that is sound."""
    one = outcomes["hopeless"]
    assert "repeated rollbacks did not help" in one.first["ended"]
    assert "targets.topk_logits" in one.first["ended"]
    assert one.events[-1]["action"] == "abort"
    named = {event["tensor"] for event in one.events if event["action"] != "set_aside"}
    assert named == {SPOILT}
    saved = latest_checkpoint(one.folder / "checkpoints")
    assert saved is not None and int(saved.name.removeprefix("step-")) == one.events[-1]["to_step"]
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_a_batch_is_left_out_by_all_processes_or_by_none(several: Path) -> None:
    """Though its loss is unlike those before in one of them only."""
    for rank in range(2):
        told = json.loads((several / f"left-out-{rank}.json").read_text())
        assert told["actions"] == [Action.ROLLBACK, Action.PROCEED, Action.ROLLBACK], rank
        assert told["set_aside"] == [0, 2], rank
