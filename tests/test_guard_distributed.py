"""Trouble in one of two processes: both do the same about it, end with the same weights, and say what it was.

DDP under torchrun and FSDP under accelerate launch, each started once for all trainings, as
``python -m tests.test_guard_distributed STORE FOLDER``; what a process saw lies in FOLDER/NAME/process-RANK.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import safetensors.torch
import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.optim import Optimizer

from distill import engine
from distill.batches import load_batch, split
from distill.checkpoint import latest_checkpoint, plain_weights
from distill.config import GuardConfig
from distill.engine import TrainingData, train
from distill.errors import TrainingAborted
from distill.objective import Batch, Objective
from stability import Extra, Guard
from stability.detectors import Action, Trouble
from stability.monitor import TURNS
from stability.processes import nearest_the_cause
from stability.signals import local
from students.model import SO8TForCausalLM
from teachers.manifest import read_manifest
from teachers.store import SoftTargetStore
from tests.test_distributed import LAUNCHERS
from tests.test_engine import LOSS, TRAIN, fresh_student, make_store
from tests.test_guarded_training import spoilt
from tools.faults import EXPONENT_BIT

# Done again at the learning rate it was, training is as if nothing had been.
GUARD = GuardConfig(snapshot_every=5, snapshots=6, probe_every=10, rewarm=0, lower=1.0, rollbacks=5)
CONFIG = TRAIN.model_copy(update={"epochs": 5, "evaluations": 2, "guard": GUARD})
IMPATIENT = CONFIG.model_copy(update={"guard": GUARD.model_copy(update={"rollbacks": 1})})
STEPS = 25
PROJECTION = "model.layers.1.mlp.up_proj"
WEIGHT = f"{PROJECTION}.weight"
PATIENCE = 60  # seconds that one process waits for the other before it says so


@dataclass(frozen=True)
class Fault:
    """``kind``: see ``Harm``; ``step``: when, and where it is said so, in every step from then on; ``rank``: whose."""

    kind: str
    step: int
    rank: int = 1
    forever: bool = False


SKIPPED = [Fault("batch", 12), Fault("gradient", 14), Fault("exchanged gradient", 16)]
UNDONE = [
    Fault("weight", 13, rank=0),
    Fault("moment", 14),
    Fault("weight in turn", 15),  # found before the step, when the fixed text is looked at too
    Fault("large moment", 21, rank=0),
]
TRAININGS = {
    "clean": [],
    "skipped": SKIPPED,
    "skipped, of the first": [replace(fault, rank=0) for fault in SKIPPED],
    "undone": UNDONE,
    "hopeless": [Fault("batch", 12, forever=True)],
}


# -- what each process does --------------------------------------------------------------------------------


class Harm:
    """Loads batches in place of the engine, does harm in one process, and keeps what is to be compared."""

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
        names = monitor.names[monitor.turn % TURNS :: TURNS]
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

    def build_optimizer(self, *arguments: Any) -> Optimizer:
        self.optimizer = BUILD_OPTIMIZER(*arguments)
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

    def damaged(*arguments: Any) -> Any:
        guard.step = step  # type: ignore[method-assign]
        assert weight.grad is not None
        local(weight.grad).view(-1)[0] = torch.inf
        return step(*arguments)

    guard.step = damaged  # type: ignore[method-assign, assignment]


def digest(tensors: dict[str, Tensor]) -> str:
    content = {name: tensor.contiguous() for name, tensor in tensors.items() if name != "lm_head.weight"}
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
            train(student, data, Objective(LOSS), config, folder, harm.report, harm, harm.tell)
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


def main() -> None:
    """All trainings, one after another."""
    store, folder = map(Path, sys.argv[1:])
    PartialState(cpu=True, timeout=timedelta(seconds=PATIENCE))
    for name, faults in TRAININGS.items():
        run(store, folder / name, faults)


# -- what came of it ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """A training in two processes: what each saw, and what the guard wrote into its log."""

    folder: Path
    first: dict[str, Any]
    second: dict[str, Any]
    events: list[dict[str, Any]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guarded") / "store"
    make_store(folder)
    return folder


@pytest.fixture(scope="module", params=LAUNCHERS)
def outcomes(request: pytest.FixtureRequest, store: Path) -> dict[str, Outcome]:
    """All trainings under one launcher; two processes that wait for each other for ever are ended."""
    folder = store.parent / str(request.param)
    command = [sys.executable, *LAUNCHERS[request.param], "-m", "tests.test_guard_distributed"]
    launch = subprocess.Popen(
        [*command, str(store), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = launch.communicate(timeout=240)
    finally:
        if launch.poll() is None:
            os.killpg(launch.pid, signal.SIGKILL)
    assert launch.returncode == 0, said
    return {name: read_outcome(folder / name) for name in TRAININGS}


def read_outcome(folder: Path) -> Outcome:
    first, second = (json.loads((folder / f"process-{rank}.json").read_text()) for rank in (0, 1))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Outcome(folder, first, second, [line for line in lines if line["kind"] == "event"])


def test_both_processes_do_the_same(outcomes: dict[str, Outcome]) -> None:
    """Every word and everything that decisions depend on, when something happens and in the end; the same student."""
    for name, one in outcomes.items():
        for part in ("ended", "told", "state", "student"):
            assert one.first[part] == one.second[part], (name, part)
        if one.folder.parent.name == "ddp":  # each has all of the weights, after every step
            assert one.first["digests"] == one.second["digests"]
        assert (one.first["ended"] == "finished") == (name != "hopeless")
        assert [words for words, _ in one.first["told"]] and one.events if name != "clean" else not one.events


def test_what_one_process_cannot_use_is_left_out(outcomes: dict[str, Outcome]) -> None:
    """Named, whichever process it is in, which makes no difference to the weights."""
    clean = outcomes["clean"]
    for name in ("skipped", "skipped, of the first"):
        one = outcomes[name]
        assert [(event["step"], event["action"]) for event in one.events] == [
            (fault.step, "skip_step") for fault in SKIPPED
        ]
        assert [event["tensor"] for event in one.events] == ["batch: targets.topk_logits", WEIGHT, WEIGHT]
        assert all(event["tensor"].removeprefix("batch: ") in event["words"] for event in one.events)
        assert all(len(event["batch"]) >= 3 for event in one.events)
        for process in ("first", "second"):
            digests = getattr(one, process)["digests"]
            assert digests == getattr(outcomes["skipped"], process)["digests"]
            missing = {str(fault.step + 1) for fault in SKIPPED}
            assert digests.keys() == {str(step) for step in range(1, STEPS + 1)} - missing
            wanted = getattr(clean, process)["digests"]
            assert digests["12"] == wanted["12"] and digests["14"] != wanted["14"]


def test_what_happened_to_one_process_is_undone_in_both(outcomes: dict[str, Outcome]) -> None:
    """A flipped bit and poisoned moments: named, and training ends with the weights of one without."""
    one, clean = outcomes["undone"], outcomes["clean"]
    assert [event["action"] for event in one.events] == ["rollback"] * len(UNDONE)
    assert [event["step"] for event in one.events] == [fault.step for fault in UNDONE]
    for fault, event in zip(UNDONE, one.events, strict=True):
        harmed = (one.first, one.second)[fault.rank]["harmed"][fault.kind]
        assert harmed in event["tensor"] and harmed in event["words"]
        assert ("exp_avg" in event["tensor"]) == ("moment" in fault.kind)
        assert event["to_step"] < event["step"]
    assert one.events[2]["signal"] == "weight norm"
    assert one.first["state"]["blamed"] == []  # it was no batch's fault
    for process in ("first", "second"):
        ours, theirs = getattr(one, process), getattr(clean, process)
        assert ours["digests"][str(STEPS)] == theirs["digests"][str(STEPS)]
        assert ours["student"] == theirs["student"]


def test_where_one_process_never_has_a_sound_batch_both_give_up(outcomes: dict[str, Outcome]) -> None:
    """With the same words, the tensor named in each event, and a checkpoint that is sound."""
    one = outcomes["hopeless"]
    assert "going back again and again did not help" in one.first["ended"]
    assert "targets.topk_logits" in one.first["ended"]
    assert one.events[-1]["action"] == "abort"
    assert {event["tensor"] for event in one.events if event["action"] != "set_aside"} == {
        "batch: targets.topk_logits"
    }
    saved = latest_checkpoint(one.folder / "checkpoints")
    assert saved is not None and int(saved.name.removeprefix("step-")) == one.events[-1]["to_step"]
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_what_is_nearest_to_the_cause_is_named() -> None:
    """Damage before what came of it, a batch's tensor before a gradient's, the first of equals; going back first."""
    unknown = Trouble(Action.SKIP, "loss", None, None, None, "", blames_data=True)
    gradient, batch = replace(unknown, tensor="up_proj"), replace(unknown, tensor="batch: tokens")
    collapse = replace(unknown, action=Action.ROLLBACK)
    weight = Trouble(Action.ROLLBACK, "weight norm", "down_proj", None, None, "")
    for found, wanted in (
        ([None, unknown, gradient], gradient),
        ([gradient, batch, None], batch),
        ([collapse, weight, batch], weight),
        ([batch, collapse], collapse),
    ):
        assert nearest_the_cause(found) is nearest_the_cause(found[::-1]) is wanted
    first, second = replace(gradient, words="first"), replace(gradient, words="second")
    assert nearest_the_cause([first, second]) is first


if __name__ == "__main__":
    main()


def leaves_out(rank: int, meeting: str, folder: str) -> None:
    """In the wake of a collapse, with a loss of this process's own: what the guard does about the batch."""
    torch.distributed.init_process_group(
        "gloo", meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    model = torch.nn.Linear(4, 4)
    guard = Guard(model, torch.optim.SGD(model.parameters(), lr=0.1), extra=Extra(dict, lambda saved: None))
    guard.careful_until = 100
    for _ in range(20):
        guard.loss.took(1.0)
    actions = []
    for own in ((1.0, 1.6), (1.0, 1.0), (1.6, 1.0)):
        model(torch.ones(2, 4)).square().mean().backward()
        actions.append(int(guard.step(own[rank]).action))
        if actions[-1]:
            guard.steps += 1  # the caller's next batch
    content = {"actions": actions, "set_aside": sorted(guard.set_aside)}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(content))
    torch.distributed.destroy_process_group()


def test_a_batch_is_left_out_by_all_processes_or_by_none(tmp_path: Path) -> None:
    """Though its loss is unlike those before in one of them only."""
    meeting = f"file://{tmp_path / 'meeting'}"
    torch.multiprocessing.spawn(leaves_out, (meeting, str(tmp_path)), nprocs=2)
    for rank in range(2):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told == {"actions": [Action.ROLLBACK, Action.PROCEED, Action.ROLLBACK], "set_aside": [0, 2]}
