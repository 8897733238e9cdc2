"""Several processes learn what one learns: DDP under torchrun, FSDP under accelerate launch, also after a stop.

Each launcher is started once and does all its runs; one process, here, does the same ones for comparison.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate import PartialState

from teachers.recipe import Recipe
from tests import train_child
from tests.conftest import BigramTeacher, write_store

VOCAB, WIDTH = 48, 16
RUN = {
    "epochs": 2,
    "batch_size": 4,
    "evaluations": 4,
    "learning_rate": 0.005,
    "weight_decay": 0.3,
    "precision": "fp32",
}
RUNS = {
    "whole": RUN | {"batch_size": 8, "epochs": 3},
    "micro": RUN | {"batch_size": 8, "epochs": 3, "accumulation": 4},
    "ragged": RUN | {"batch_size": 3, "accumulation": 2},  # in each step a process has one sequence, not two
    "single": RUN | {"batch_size": 1, "epochs": 1},  # one process has none at all
    "heads": RUN | {"batch_size": 8, "heads": True},
    "heads-micro": RUN | {"batch_size": 8, "accumulation": 4, "heads": True},
    "heads-single": RUN | {"batch_size": 1, "epochs": 1, "heads": True},
    "checkpointed": RUN | {"gradient_checkpointing": True},
    "stopped": RUN | {"learning_rate": 0.1, "evaluations": 11, "patience": 2},
}
UNTIED = RUN | {"untied": True}  # where rows of the embedding are left out
CUT = UNTIED | {"stop_at": 5}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--use_fsdp", "--fsdp_version", "2"]
LAUNCHERS = {"ddp": TORCHRUN, "fsdp": [*ACCELERATE, "--main_process_port", "0"]}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets of 24 sequences with the states of two layers."""
    random = np.random.default_rng(0)
    rows = [random.integers(0, VOCAB, size=random.integers(4, 14)).astype(np.int32) for _ in range(24)]
    recipe = Recipe(num_topk=8, layers=(0, 1), layer_bytes=12)
    folder = tmp_path_factory.mktemp("distributed") / "store"
    write_store(folder, BigramTeacher(VOCAB, WIDTH), rows, recipe, 10)
    return folder


@pytest.fixture(scope="module")
def one(store: Path) -> Path:
    """All runs in one process, and one of them cut."""
    PartialState(cpu=True)
    for name, settings in (RUNS | {"plain": UNTIED, "cut": CUT}).items():
        train_child.run(store, store.parent / "one" / name, settings)
    return store.parent / "one"


@pytest.fixture(scope="module", params=LAUNCHERS)
def several(request: pytest.FixtureRequest, store: Path, one: Path) -> Path:
    """All runs in two processes, one of them cut, and one that a single process has begun."""
    folder = store.parent / str(request.param)
    shutil.copytree(one / "cut", folder / "continued")
    settings = folder / "settings.json"
    settings.write_text(json.dumps(RUNS | {"cut": CUT, "continued": UNTIED}))
    arguments = ["-m", "tests.train_child", str(store), str(folder), str(settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *LAUNCHERS[request.param], *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def assert_same_run(folder: Path, expected: Path) -> None:
    """The same losses in every step, the same held-out scores, and the same student in the end."""
    lines, wanted = (
        [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        for place in (folder, expected)
    )
    assert [(line["kind"], line["step"]) for line in lines] == [(w["kind"], w["step"]) for w in wanted]
    for line, reference in zip(lines, wanted, strict=True):
        numbers = {name: value for name, value in reference.items() if name != "kind"}
        found = {name: value for name, value in line.items() if name != "kind"}
        if folder.parent.name == "fsdp" and "update_ratio" in numbers:
            # Estimated from some elements, and where weights are spread, from those that the first process has.
            assert math.isfinite(found.pop("update_ratio")) and numbers.pop("update_ratio") >= 0
        assert found == pytest.approx(numbers, rel=1e-5, abs=1e-7)
    mine, theirs = (safetensors.torch.load_file(place / "final.safetensors") for place in (folder, expected))
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    outcomes = [json.loads((place / "summary.json").read_text()) for place in (folder, expected)]
    assert outcomes[0] | {"continued_from": 0} == outcomes[1] | {"continued_from": 0}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_learn_what_one_does(several: Path, one: Path, name: str) -> None:
    """Losses, scores and weights, with one part per step or several, and where a process has nothing to do."""
    assert_same_run(several / name, one / name)


def test_parts_of_a_step_do_not_matter(several: Path, one: Path) -> None:
    """Eight sequences at once in one process, or one by one in two."""
    assert_same_run(several / "micro", one / "whole")
    assert_same_run(several / "heads-micro", one / "heads")


def test_two_processes_continue_what_one_began(several: Path, one: Path) -> None:
    """From a checkpoint of one process to the end of the uninterrupted run."""
    assert json.loads((several / "continued" / "summary.json").read_text())["continued_from"] == 4
    assert_same_run(several / "continued", one / "plain")


def test_one_process_continues_what_two_began(several: Path, one: Path, store: Path) -> None:
    """From a checkpoint of two processes to the end of the uninterrupted run."""
    train_child.run(store, several / "cut", UNTIED)
    assert json.loads((several / "cut" / "summary.json").read_text())["continued_from"] == 4
    assert_same_run(several / "cut", one / "plain")


def test_the_runs_are_what_they_should_be(one: Path) -> None:
    """The run with patience stops early and does not end with its last weights; others go to the end."""
    stopped = json.loads((one / "stopped" / "summary.json").read_text())
    assert stopped["best"] < stopped["steps"] < 2 * 5
    assert json.loads((one / "whole" / "summary.json").read_text())["steps"] == 3 * 3
