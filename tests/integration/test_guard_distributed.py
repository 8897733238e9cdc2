"""Anomaly in one of several processes: the trainings, and what each process keeps of them.

``tests/integration/test_distributed.py`` starts them under DDP and FSDP and looks at what came of
them; what a process saw lies in FOLDER/NAME/process-RANK.json.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import safetensors.torch
import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.optim import Optimizer

from distill.config.schema import GuardConfig
from distill.errors import TrainingAborted
from distill.losses.batch import Batch
from distill.losses.objective import Objective
from distill.training import engine
from distill.training.data import TrainingData, load_batch, split
from distill.training.engine import TrainingJob, train
from stability import Extra, Guard, Hooks
from stability.consensus import root_cause
from stability.detectors import Action, Anomaly
from stability.measures.monitor import NORM_INTERVAL
from stability.measures.tensors import local
from students.model.decoder import SO8TForCausalLM
from students.weights import plain_weights
from teachers.store.manifest import read_manifest
from teachers.store.store import SoftTargetStore
from tests.support.training import LOSS, PROJECTION, TRAIN, WEIGHT, Fault, fresh_student, spoilt
from tools.robustness.faults import EXPONENT_BIT

# Done again at the learning rate it was, training is as if nothing had been.
GUARD = GuardConfig(snapshot_every=5, snapshots=6, probe_every=10, rewarm=0, lower=1.0, rollbacks=5)
CONFIG = TRAIN.model_copy(update={"epochs": 5, "evaluations": 2, "guard": GUARD})
IMPATIENT = CONFIG.model_copy(update={"guard": GUARD.model_copy(update={"rollbacks": 1})})


class Harm:
    """Loads batches in place of the engine, does harm in one process, keeps what is compared."""

    def __init__(self, store: SoftTargetStore, faults: list[Fault]) -> None:
        rank = PartialState().process_index
        self.store, self.faults = store, [fault for fault in faults if fault.rank == rank]
        self.done: set[Fault] = set()
        self.harmed: dict[str, str] = {}
        self.optimizer: Optimizer
        self.guard: Guard
        self.student: SO8TForCausalLM
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.digests: dict[int, str] = {}

    def __call__(self, student: SO8TForCausalLM, indices: list[int], step: int) -> Batch:
        self.student = student
        batch = load_batch(self.store, indices)
        for fault in self.faults:
            due = step >= fault.step if fault.forever else step == fault.step
            if due and fault.kind == "batch":
                batch = spoilt(batch)
            elif due and fault not in self.done:
                self.done.add(fault)
                self._do(fault.kind)
        return batch

    @torch.no_grad()
    def _do(self, kind: str) -> None:
        name = self._in_turn() if kind == "weight in turn" else WEIGHT
        weight = self.student.get_parameter(name)
        self.harmed[kind] = name
        if kind.startswith("weight"):
            local(weight).view(-1)[:1].view(torch.int32).bitwise_xor_(1 << EXPONENT_BIT)
        elif kind == "moment":
            local(self.optimizer.state[weight]["exp_avg"]).view(-1)[0] = torch.nan
        elif kind == "large moment":
            local(self.optimizer.state[weight]["exp_avg"]).mul_(1e4)
        elif kind == "gradient":
            spoil_next_gradient(self.student.get_submodule(PROJECTION))
        else:
            spoil_after_exchange(self.guard, weight)

    def _in_turn(self) -> str:
        """A matrix whose norm is looked at in the next step."""
        monitor = self.guard.monitor
        names = monitor.names[monitor.readings % NORM_INTERVAL :: NORM_INTERVAL]
        return next(name for name in names if name.endswith("_proj.weight"))

    def tell(self, words: str) -> None:
        self.told.append((words, self.state()))

    def state(self) -> dict[str, Any]:
        """All that decisions depend on; norms and updates are those of a process's own part."""
        state = self.guard.state_dict() | {"kept": [one.step for one in self.guard.keeper.kept]}
        return {name: value for name, value in state.items() if name not in ("weights", "updates")}

    def report(self, step: int, _: str) -> None:
        """Keep what this process's part of the weights is after each step."""
        named = self.student.named_parameters()
        self.digests[step] = digest({name: local(weight.detach()) for name, weight in named})

    def build_optimizer(self, *arguments: Any, **options: Any) -> Optimizer:
        self.optimizer = BUILD_OPTIMIZER(*arguments, **options)
        return self.optimizer

    def build_guard(self, *arguments: Any) -> Guard:
        self.guard = BUILD_GUARD(*arguments)
        return self.guard


BUILD_OPTIMIZER, BUILD_GUARD = engine.build_optimizer, engine.build_guard


def spoil_next_gradient(module: nn.Module) -> None:
    """The next backward pass of this process finds no number for the module's weight."""
    handles: list[Any] = []

    def infinite(gradient: Tensor) -> Tensor:
        handles.pop().remove()
        return torch.full_like(gradient, torch.inf)

    def before(module: Any, _: Any) -> None:  # here FSDP has put the weight together
        handles.pop().remove()
        handles.append(module.weight.register_hook(infinite))

    handles.append(module.register_forward_pre_hook(before))


def spoil_after_exchange(guard: Guard, weight: nn.Parameter) -> None:
    """What this process has got of the gradient is damaged when the next step is to be taken."""
    step = guard.step

    def damaged(*arguments: Any, **named: Any) -> Any:
        guard.step = step  # type: ignore[method-assign]
        assert weight.grad is not None
        local(weight.grad).view(-1)[0] = torch.inf
        return step(*arguments, **named)

    guard.step = damaged  # type: ignore[method-assign, assignment]


def digest(tensors: dict[str, Tensor]) -> str:
    content = {
        name: tensor.contiguous() for name, tensor in tensors.items() if name != "lm_head.weight"
    }
    return hashlib.sha256(safetensors.torch.save(content)).hexdigest()


def run(store_folder: Path, folder: Path, faults: list[Fault]) -> None:
    """One training, and what this process saw of it."""
    folder.mkdir(parents=True, exist_ok=True)
    store = SoftTargetStore(store_folder, read_manifest(store_folder))
    data, student = TrainingData(store, split(store, 0.2, 0), 0), fresh_student()
    harm, ended = Harm(store, faults), "finished"
    config = IMPATIENT if any(fault.forever for fault in faults) else CONFIG
    with patch.multiple(engine, build_optimizer=harm.build_optimizer, build_guard=harm.build_guard):
        try:
            job = TrainingJob(student, data, Objective(LOSS), config, folder)
            train(job, harm.report, harm, harm.tell)
        except TrainingAborted as error:
            ended = str(error)
    found = {
        "ended": ended,
        "told": harm.told,
        "state": harm.state(),
        "digests": harm.digests,
        "student": digest(plain_weights(student)),
        "harmed": harm.harmed,
    }
    (folder / f"process-{PartialState().process_index}.json").write_text(json.dumps(found))


def leave_out(folder: Path) -> None:
    """In the wake of a collapse, with a loss of this process's own: what the guard does then."""
    rank, model = PartialState().process_index, nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(model, optimizer, hooks=Hooks(extra=Extra(dict, lambda saved: None)))
    guard.state.watch_until = 100
    for _ in range(20):
        guard.state.loss.update(1.0)
    actions = []
    for own in ((1.0, 1.6), (1.0, 1.0), (1.6, 1.0)):
        model(torch.ones(2, 4)).square().mean().backward()
        actions.append(int(guard.step(own[rank]).action))
        if actions[-1]:
            guard.state.steps += 1  # the caller's next batch
    content = {"actions": actions, "set_aside": sorted(guard.state.quarantined)}
    (folder / f"left-out-{rank}.json").write_text(json.dumps(content))


def test_what_is_nearest_to_the_cause_is_named() -> None:
    """Going back, damage before what came of it, a batch before a gradient; else the first."""
    unknown = Anomaly(Action.SKIP, "loss", None, None, None, "", suspects_data=True)
    gradient, batch = replace(unknown, tensor="up_proj"), replace(unknown, tensor="batch: tokens")
    collapse = replace(unknown, action=Action.ROLLBACK)
    weight = Anomaly(Action.ROLLBACK, "weight norm", "down_proj", None, None, "")
    for found, wanted in (
        ([None, unknown, gradient], gradient),
        ([gradient, batch, None], batch),
        ([collapse, weight, batch], weight),
        ([batch, collapse], collapse),
    ):
        assert root_cause(found) is root_cause(found[::-1]) is wanted
    first, second = replace(gradient, message="first"), replace(gradient, message="second")
    assert root_cause([first, second]) is first
