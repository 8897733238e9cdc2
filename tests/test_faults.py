"""Faults put into a small training on purpose: each is found soon and named, and each does harm without the guard."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from distill.batches import split
from distill.config import GuardConfig, TrainConfig
from distill.engine import TrainingData, train
from distill.errors import TrainingAborted
from distill.objective import Objective
from students.model import SO8TForCausalLM
from tests.conftest import BigramTeacher, write_store
from tests.test_engine import LOSS, RECIPES, TRAIN, VOCAB, WIDTH, fresh_student, make_data, read_metrics
from tools.faults import FAULTS, POISONS, Injector, Place
from tools.guarded_training import _is_named

GUARDED = TRAIN.model_copy(
    update={"epochs": 10, "schedule": "wsd", "guard": GuardConfig(snapshot_every=10, probe_every=10)}
)
# A collapse can be seen only where there was something to say: that takes longer to learn.
SLOW = TRAIN.model_copy(update={"epochs": 13, "schedule": "wsd"})
AT, SLOW_AT = 33, 64
SEEDS = {"optimizer": (1, 2, 3, 4), "rotation": (1, 2)}  # one for every variant
CASES = [(name, seed) for name in FAULTS for seed in SEEDS.get(name, (0,))]


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


def trained(folder: Path, guarded: bool, name: str = "", seed: int = 0, slow: bool = False) -> Told:
    """A training with a fault, or without."""
    data, student = (
        sequences_that_begin_alike(folder / "store") if slow else make_data(folder),
        fresh_student(),
    )
    config: TrainConfig = SLOW if slow else GUARDED
    if not guarded:
        config = config.model_copy(update={"guard": GuardConfig(enabled=False)})
    place = Place(SLOW_AT if slow else AT, np.random.default_rng(seed))
    plan = data.batches(config.epochs, config.batch_size)
    injector = Injector(data.store, FAULTS[name], place, plan) if name else None
    run, aborted = folder / "run", None
    run.mkdir(parents=True)
    try:
        with nullcontext() if injector is None else injector.installed():
            train(student, data, Objective(LOSS), config, run, lambda step, text: None, injector)
    except TrainingAborted as error:
        aborted = str(error)
    events = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "event"]
    return Told(student, place, events, aborted)


def bytes_of(student: SO8TForCausalLM) -> bytes:
    tensors = {name: one for name, one in student.state_dict().items() if name != "lm_head.weight"}  # is tied
    return safetensors.torch.save(tensors)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, bytes]:
    """The weights of the same trainings without a fault, by whether they are the slow one."""
    folders = {slow: tmp_path_factory.mktemp("clean") for slow in (False, True)}
    return {slow: bytes_of(trained(folder, False, slow=slow).student) for slow, folder in folders.items()}


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_every_fault_is_found_and_named(tmp_path: Path, name: str, seed: int) -> None:
    """Within five steps (a slow collapse: fifty), and training goes on to its end with finite weights."""
    fault = FAULTS[name]
    told = trained(tmp_path, True, name, seed, fault.slow)
    assert told.aborted is None and told.events, told.place.kind
    assert 0 <= told.events[0]["step"] - told.place.step <= (50 if fault.slow else 5), told.events[0]["words"]
    assert _is_named(told.events, told.place, fault.steps), (told.place, told.events)
    assert all(bool(one.isfinite().all()) for one in told.student.state_dict().values())


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_does_harm_without_the_guard(tmp_path: Path, clean: dict[bool, bytes], name: str) -> None:
    """It ends training, or other weights come out of it than of the same training without; and nobody says a word."""
    told = trained(tmp_path, False, name, SEEDS.get(name, (0,))[0], FAULTS[name].slow)
    assert told.events == []
    assert told.aborted is not None or bytes_of(told.student) != clean[FAULTS[name].slow]


def test_every_variant_is_tried(tmp_path: Path) -> None:
    """The seeds above draw each way to poison an optimizer, and both ways off the group."""
    kinds: dict[str, set[str]] = {"optimizer": set(), "rotation": set()}
    for name, seen in kinds.items():
        for seed in SEEDS[name]:
            student, place = fresh_student(), Place(AT, np.random.default_rng(seed))
            optimizer = torch.optim.AdamW(student.parameters())
            for parameter in student.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            state = FAULTS[name].state
            assert state is not None
            state(student, optimizer, place)
            seen.add(place.kind)
            assert place.named
    assert kinds["optimizer"] == set(POISONS) and len(kinds["rotation"]) == 2


def test_a_fault_of_the_state_happens_once(tmp_path: Path) -> None:
    """In its step, and not again where that is done again; batches are the engine's own."""
    data = make_data(tmp_path)
    plan = data.batches(2, 4)
    injector = Injector(data.store, FAULTS["zeroed-layer"], Place(3, np.random.default_rng(0)), plan)
    injector.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    student = fresh_student()
    norms = []
    for step in (0, 1, 2, 3, 3, 4):
        batch = injector(student, plan[step], step)
        assert batch.tokens.shape[0] == len(plan[step])
        norms.append(min(float(layer.mlp.up_proj.weight.detach().norm()) for layer in student.model.layers))
        if step == 3:
            for layer, whole in zip(student.model.layers, fresh_student().model.layers, strict=True):
                layer.load_state_dict(whole.state_dict())
    assert [norm == 0 for norm in norms] == [False, False, False, True, False, False]


def test_data_that_is_not_sound_is_so_again(tmp_path: Path) -> None:
    """A fault of the data goes with its sequences: whenever they are loaded, and with no others."""
    data = make_data(tmp_path)
    plan = data.batches(2, 4)
    injector = Injector(data.store, FAULTS["nan-batch"], Place(3, np.random.default_rng(0)), plan)
    student = fresh_student()

    def is_sound(step: int) -> bool:
        targets = vars(injector(student, plan[step], step).targets).values()
        return all(bool(value.isfinite().all()) for value in targets if isinstance(value, torch.Tensor))

    assert [is_sound(step) for step in (2, 3, 3, 4)] == [True, False, False, True]
    assert injector.place.named == "batch"
