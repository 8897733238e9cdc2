"""What tests of training share: tiny data, settings, a run that is killed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distill.config.schema import GuardConfig, LossConfig, TrainConfig
from distill.losses.batch import Batch
from distill.losses.objective import Objective
from distill.training import checkpoint_timer
from distill.training.data import TrainingData, split
from distill.training.engine import TrainingJob, train
from distill.training.summary import TrainingSummary
from stability import Event, Extra, Guard, GuardSettings, Hooks, Verdict
from students.model.decoder import SO8TForCausalLM
from teachers.store.store import SoftTargetStore
from teachers.targets.recipe import Recipe
from tests.support.stores import write_store
from tests.support.students import make_student
from tests.support.teachers import BigramTeacher

VOCAB, WIDTH = 48, 16
RECIPES = {
    "buckets": Recipe(num_topk=8),
    "sketch": Recipe(num_topk=8, sketch_bytes=10),
    "hidden": Recipe("hidden"),
    "dense": Recipe("dense"),
}
LOSS = LossConfig(temperature=2.0)
TRAIN = TrainConfig(epochs=2, batch_size=4, evaluations=4, learning_rate=0.01, precision="fp32")
Weights = dict[str, torch.Tensor]
Result = tuple[SO8TForCausalLM, TrainingSummary]
UNGUARDED = TRAIN.model_copy(update={"guard": GuardConfig(enabled=False)})


def read_metrics(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged_steps(folder: Path) -> list[int]:
    """The steps in a run's log, in its order."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [line["step"] for line in lines if line["kind"] == "train"]


def make_store(
    folder: Path, seed: int = 0, sequences: int = 24, kind: str = "buckets"
) -> SoftTargetStore:
    """A store with the answers of a fixed random bigram teacher."""
    draw = np.random.default_rng(seed)
    lengths = (draw.integers(4, 14) for _ in range(sequences))
    rows = [draw.integers(0, VOCAB, size=length).astype(np.int32) for length in lengths]
    teacher = BigramTeacher(VOCAB, WIDTH, seed=seed)
    return write_store(folder, teacher, rows, RECIPES[kind], 10, seed=seed)


def make_data(tmp_path: Path, seed: int = 0, kind: str = "buckets") -> TrainingData:
    store = make_store(tmp_path / f"store-{seed}-{kind}", seed, kind=kind)
    return TrainingData(store, split(store, 0.2, 0), 0)


def fresh_student() -> SO8TForCausalLM:
    return make_student(16, 2, VOCAB)


def weights(student: SO8TForCausalLM) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in student.state_dict().items()}


class Killed(BaseException):
    """Stands for a signal that ends the process."""


def killer(kill_at: int = -1) -> Callable[[int, str], None]:
    """A report of progress that ends the training after a step."""

    def report(step: int, text: str) -> None:
        if step == kill_at:
            raise Killed

    return report


def save_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint before every step, with no wait for the disk."""
    monkeypatch.setattr(checkpoint_timer, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint_timer, "SAVING_SHARE", float("inf"))
    monkeypatch.setattr("os.fsync", lambda file: None)


def copied(student: SO8TForCausalLM) -> Weights:
    return {name: tensor.clone() for name, tensor in student.state_dict().items()}


def run_with(
    data: TrainingData,
    folder: Path,
    config: TrainConfig = TRAIN,
    loss: LossConfig = LOSS,
    kill_at: int = -1,
    seen: dict[int, Weights] | None = None,
) -> Result:
    """A fresh student's training, killed after a step; ``seen`` gets its weights after each."""
    student = fresh_student()
    folder.mkdir(exist_ok=True)

    def report(step: int, text: str) -> None:
        if seen is not None:
            seen[step] = copied(student)
        killer(kill_at)(step, text)

    return student, train(TrainingJob(student, data, Objective(loss), config, folder), report)


# On this little data the validation KL is lowest somewhere in the middle.
GREEDY = TRAIN.model_copy(
    update={
        "learning_rate": 0.08,
        "schedule": "wsd",
        "min_lr": 0.02,
        "epochs": 3,
        "evaluations": 16,
    }
)
PATIENT = GREEDY.model_copy(update={"patience": 3})


def assert_equal(mine: Weights, theirs: Weights) -> None:
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


Harm = Callable[["Plain"], None]
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3),
}


def make_model(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(16, 16),
        nn.Tanh(),
        nn.Linear(16, 4),
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The same for the same step, and something to learn."""
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(1000 + step))
    return inputs, torch.sin(inputs[:, :4])


@dataclass
class Plain:
    """A guarded loop. ``harm`` gets the loop after each backward pass, whenever a step is tried."""

    optimizer: str = "AdamW"
    settings: GuardSettings | None = None
    harm: Harm = lambda loop: None
    scale: float = 1.0  # of the loss
    dropout: float = 0.0
    extra: Extra | None = None
    events: list[Event] = field(default_factory=list)
    tried: list[int] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = make_model(self.dropout)
        self.optim = OPTIMIZERS[self.optimizer](self.model)
        hooks = Hooks(extra=self.extra, on_event=self.events.append)
        self.guard = Guard(self.model, self.optim, settings=self.settings, hooks=hooks)
        self.loss = torch.zeros(())

    def run(self, until: int) -> Plain:
        while self.guard.state.steps < until:
            self.tried.append(self.guard.state.steps)
            inputs, wanted = batch(self.guard.state.steps)
            self.loss = self.scale * (self.model(inputs) - wanted).square().mean()
            self.loss.backward()
            self.harm(self)
            self.verdicts.append(
                self.guard.step(self.loss.detach(), batch=[self.guard.state.steps])
            )
            self.optim.zero_grad()
        return self


def is_finite(model: nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


STEPS = 25
PROJECTION = "model.layers.1.mlp.up_proj"
WEIGHT = f"{PROJECTION}.weight"


@dataclass(frozen=True)
class Fault:
    """``kind``: see ``Harm``; ``forever``: in every step from ``step`` on; ``rank``: whose."""

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


def spoilt(batch: Batch) -> Batch:
    """One number of the teacher's answers is none."""
    logits = batch.targets.topk_logits.clone()
    logits[1, 0] = math.nan
    return replace(batch, targets=replace(batch.targets, topk_logits=logits))
