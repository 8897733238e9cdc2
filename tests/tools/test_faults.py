"""Faults put into a small training: each is found soon, and does harm without the guard."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from distill.config.schema import GuardConfig, TrainConfig
from distill.errors import TrainingAborted
from distill.losses.objective import Objective
from distill.training.data import TrainingData, split
from distill.training.engine import TrainingJob, train
from students.model.decoder import SO8TForCausalLM
from tests.support.stores import write_store
from tests.support.teachers import BigramTeacher
from tests.support.training import (
    LOSS,
    RECIPES,
    TRAIN,
    VOCAB,
    WIDTH,
    fresh_student,
    make_data,
    read_metrics,
)
from tools.robustness.faults import FAULTS, POISONS, Injector, Place
from tools.robustness.guarded_training import is_named

GUARD = GuardConfig(snapshot_every=10, probe_every=10)
WSD = {"schedule": "wsd", "min_lr": 0.02}
GUARDED = TRAIN.model_copy(update={"epochs": 10, "guard": GUARD, **WSD})
# A collapse can be seen only where there was something to say: that takes longer to learn.
SLOW = TRAIN.model_copy(update={"epochs": 13, **WSD})
UNGUARDED = TRAIN.model_copy(update={"guard": GuardConfig(enabled=False)})
AT, SLOW_AT, EARLY = 33, 64, 3
SEEDS = {"optimizer": (1, 2, 3, 4), "rotation": (1, 2)}  # one for every variant
every_fault = pytest.mark.parametrize("name", FAULTS)


@dataclass
class Told:
    """What came of a training with a fault."""

    student: SO8TForCausalLM
    place: Place
    events: list[dict[str, Any]]
    aborted: str | None


def sequences_that_begin_alike(folder: Path) -> TrainingData:
    """As those that a tokenizer has put its first token before."""
    random = np.random.default_rng(0)
    bodies = [random.integers(1, VOCAB, size=random.integers(8, 14)) for _ in range(48)]
    rows = [np.concatenate([[0], body]).astype(np.int32) for body in bodies]
    store = write_store(folder, BigramTeacher(VOCAB, WIDTH), rows, RECIPES["buckets"], 10)
    return TrainingData(store, split(store, 0.15, 0), 0)


def trained(
    folder: Path,
    data: TrainingData,
    config: TrainConfig,
    name: str = "",
    seed: int = 0,
    at: int = AT,
) -> Told:
    """A training with a fault at a step, or without."""
    student, place = fresh_student(), Place(at, np.random.default_rng(seed))
    plan = data.batches(config.epochs, config.batch_size)
    injector = Injector(data.store, FAULTS[name], place, plan) if name else None
    run, aborted, quiet = folder / "run", None, lambda step, text: None
    run.mkdir(parents=True)
    try:
        with nullcontext() if injector is None else injector.installed():
            train(TrainingJob(student, data, Objective(LOSS), config, run), quiet, injector)
    except TrainingAborted as error:
        aborted = str(error)
    events = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "event"]
    return Told(student, place, events, aborted)


def bytes_of(student: SO8TForCausalLM) -> bytes:
    state = student.state_dict()
    del state["lm_head.weight"]  # is tied
    return safetensors.torch.save(state)


@every_fault
def test_every_fault_is_found_and_named(tmp_path: Path, name: str) -> None:
    """Within five steps (a slow collapse: fifty), and training goes on with finite weights."""
    fault, seeds, kinds = FAULTS[name], SEEDS.get(name, (0,)), set()
    for seed in seeds:
        folder = tmp_path / str(seed)
        if fault.slow:
            data = sequences_that_begin_alike(folder / "store")
            told = trained(folder, data, SLOW, name, seed, SLOW_AT)
        else:
            told = trained(folder, make_data(folder), GUARDED, name, seed)
        kinds.add(told.place.kind)
        assert told.aborted is None and told.events and told.place.named, told.place
        late = told.events[0]["step"] - told.place.step
        assert 0 <= late <= (50 if fault.slow else 5), (told.place, told.events[0])
        assert is_named(told.events, told.place, fault.steps), (told.place, told.events)
        assert all(bool(one.isfinite().all()) for one in told.student.state_dict().values())
    assert len(kinds) == len(seeds)  # both ways off the group, and each to poison an optimizer
    assert name != "optimizer" or kinds == set(POISONS)


def unguarded(slow: bool) -> TrainConfig:
    """As long as the fault takes."""
    return UNGUARDED.model_copy(update={"epochs": 9 if slow else 2})


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, bytes]:
    """The weights of trainings without a fault, by whether they are the longer one."""
    found = {}
    for slow in (False, True):
        folder = tmp_path_factory.mktemp("clean")
        found[slow] = bytes_of(trained(folder, make_data(folder), unguarded(slow)).student)
    return found


@every_fault
def test_every_fault_does_harm_without_the_guard(
    tmp_path: Path, clean: dict[bool, bytes], name: str
) -> None:
    """It ends training, or other weights come out than without; and nobody says a word."""
    slow, seed = FAULTS[name].slow, SEEDS.get(name, (0,))[0]
    told = trained(tmp_path, make_data(tmp_path), unguarded(slow), name, seed, EARLY)
    assert told.events == []
    assert told.aborted is not None or bytes_of(told.student) != clean[slow]


def test_a_fault_of_the_state_happens_once(tmp_path: Path) -> None:
    """In its step, and not again where that is done again; batches are the engine's own."""
    data = make_data(tmp_path)
    plan = data.batches(2, 4)
    place = Place(3, np.random.default_rng(0))
    injector = Injector(data.store, FAULTS["zeroed-layer"], place, plan)
    injector.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    student = fresh_student()
    norms = []
    for step in (0, 1, 2, 3, 3, 4):
        batch = injector(student, plan[step], step)
        assert batch.tokens.shape[0] == len(plan[step])
        layers = student.model.layers
        norms.append(min(float(one.mlp.up_proj.weight.detach().norm()) for one in layers))
        if step == 3:
            student.load_state_dict(fresh_student().state_dict())
    assert [norm == 0 for norm in norms] == [False, False, False, True, False, False]


def test_data_that_is_not_sound_is_so_again(tmp_path: Path) -> None:
    """A fault of the data goes with its sequences: whenever they are loaded, and with no others."""
    data = make_data(tmp_path)
    plan = data.batches(2, 4)
    injector = Injector(data.store, FAULTS["nan-batch"], Place(3, np.random.default_rng(0)), plan)
    student = fresh_student()

    def is_sound(step: int) -> bool:
        targets = vars(injector(student, plan[step], step).targets).values()
        return all(bool(one.isfinite().all()) for one in filter(torch.is_tensor, targets))

    assert [is_sound(step) for step in (2, 3, 3, 4)] == [True, False, False, True]
    assert injector.place.named == "batch"
