"""One training of ``tools.robustness.guard``: with or without a fault, with or without the
guard, and what came of it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import safetensors.torch
import torch

from distill.capture.ready_store import open_full_store
from distill.config.schema import LossConfig, TrainConfig
from distill.errors import TrainingAborted
from distill.initialization.shape import new_student
from distill.losses.objective import Objective, build_objective
from distill.runs.folder import latest_checkpoint
from distill.training import checkpoint_timer, engine
from distill.training.data import TrainingData, split
from distill.training.engine import TrainingJob, train
from stability import Monitor
from students.model.build import student_config
from students.model.decoder import SO8TForCausalLM
from students.model.shape import StudentSize
from tools.robustness.faults import EXPONENT_BIT, FAULTS, Injector, Place

CHECKPOINT = "checkpoint"
BATCH = 8
AT, SPREAD = 100, 20  # a fault comes after so many steps, and up to so many more
LOSS = LossConfig(temperature=1.0, lambda_safety=0.0)


class Stopped(Exception):
    """Stands for the end of the process."""


@dataclass(frozen=True)
class Job:
    """One training.

    ``fault``: its name, or none; ``guard``: whether there is one; ``rate``: peak learning rate.
    """

    store: str
    size: tuple[int, int]
    seed: int
    epochs: int
    fault: str | None = None
    guard: bool = True
    rate: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a training. ``kl``: of validation, at the end; ``lag``: steps from fault to
    first event; ``named``: whether events name what was wrong; ``events``: how many of each action;
    ``weights``: hash of the student's.
    """

    job: Job
    kl: float
    lag: int | None
    named: bool | None
    first: str
    kind: str
    events: dict[str, int]
    ended: str
    weights: str


class Trial:
    """Store, data, settings and a student of a job; the same job gives the same."""

    def __init__(self, job: Job, batch: int = BATCH, precision: str = "fp32") -> None:
        self.job = job
        self.store, self.kept = open_full_store(Path(job.store))
        self.data = TrainingData(self.store, split(self.store, 0.1, job.seed), job.seed)
        self.config = TrainConfig.model_validate(
            {
                "epochs": job.epochs,
                "batch_size": batch,
                "precision": precision,
                "evaluations": 4,
                "guard": {"enabled": job.guard},
                "learning_rate": job.rate,
            }
        )
        self.plan = self.data.batches(self.config.epochs, batch)
        random = np.random.default_rng([job.seed, 99])
        self.place = Place(AT + int(random.integers(SPREAD)), random)

    def student(self) -> tuple[SO8TForCausalLM, Objective]:
        """A student before training, and its objective."""
        info = self.kept.info
        shape = student_config(
            StudentSize(*self.job.size),
            vocab_size=info.vocab_size,
            context_length=256,
            tie_embeddings=True,
            bos=info.bos,
            eos=info.eos,
        )
        shape.verification_head = True
        student = new_student(shape, self.job.seed, self.kept.embeddings)
        return student, build_objective(LOSS, self.store, student, info.layers)


def run_job(job: Job) -> Outcome:
    """Do one training, in a process of its own."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as name:
        return _run(Trial(job), Path(name))


def _run(trial: Trial, folder: Path) -> Outcome:
    job, place, ended = trial.job, trial.place, "finished"
    fault = FAULTS.get(job.fault or "")
    if job.fault == CHECKPOINT:
        _poison_checkpoint(trial, folder)
    student, objective = trial.student()
    injector = None if fault is None else Injector(trial.store, fault, place, trial.plan)
    try:
        with nullcontext() if injector is None else injector.installed():
            training = TrainingJob(student, trial.data, objective, trial.config, folder)
            train(training, _quiet, injector)
    except TrainingAborted as error:
        ended = f"aborted: {error}"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    events = [line for line in lines if line["kind"] == "event"]
    mine = [one for one in events if one["step"] >= place.step or job.fault == CHECKPOINT]
    lag = None
    if mine and job.fault is not None:
        lag = 0 if job.fault == CHECKPOINT else mine[0]["step"] - place.step
    actions = [one["action"] for one in events]
    return Outcome(
        job,
        _last_kl(lines),
        lag,
        None if lag is None else is_named(mine, place, 1 if fault is None else fault.steps),
        mine[0]["words"] if mine else "",
        place.kind,
        {action: actions.count(action) for action in dict.fromkeys(actions)},
        ended,
        _digest(student),
    )


def weighing_seconds(job: Job) -> float:
    """Seconds of the deep figures of every weight, which are taken at each evaluation."""
    student, _ = Trial(job).student()
    monitor = Monitor(student, torch.optim.AdamW(student.parameters()))
    monitor.weigh()
    begin = time.perf_counter()
    monitor.weigh()
    return time.perf_counter() - begin


def _quiet(step: int, words: str) -> None:
    """Say nothing."""


def _last_kl(lines: list[dict[str, Any]]) -> float:
    """Validation KL of the last evaluation; not a number where it was none."""
    result = [line["kl"] for line in lines if line["kind"] == "held_out"][-1]
    return math.nan if result is None else float(result)


def is_named(events: list[dict[str, Any]], place: Place, steps: int) -> bool:
    """Whether the first event names the tensor that the fault was put into, or the batch.

    Where many batches are spoilt, those set aside must be most of them and hardly any other.
    """
    if place.named != "batch":
        return place.named in f"{events[0]['tensor']} {events[0]['words']}"
    if steps == 1:
        return bool(events[0]["batch"])
    spoilt = set(range(place.step, place.step + steps))
    named = {int(one["value"]) for one in events if one["action"] == "set_aside"}
    return len(named & spoilt) >= steps / 2 and len(named & spoilt) >= 0.8 * len(named)


def _digest(student: SO8TForCausalLM) -> str:
    weights = {
        name: one.contiguous()
        for name, one in student.state_dict().items()
        if name != "lm_head.weight"
    }
    return hashlib.sha256(safetensors.torch.save(weights)).hexdigest()


def _poison_checkpoint(trial: Trial, folder: Path) -> None:
    """Train to the place of the fault with checkpoints on the way, stop, and damage the newest
    of them."""
    place = trial.place

    def stop(step: int, words: str) -> None:
        if step == place.step:
            raise Stopped

    student, objective = trial.student()
    with (
        patch.multiple(checkpoint_timer, CHECKPOINT_SECONDS=0.2, SAVING_SHARE=1.0),
        suppress(Stopped),
    ):
        train(TrainingJob(student, trial.data, objective, trial.config, folder), stop)
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    kinds = ("weight not finite", "bit flipped in a weight", "moment not finite")
    place.kind = kinds[int(place.random.integers(len(kinds)))]
    file = newest / ("training.safetensors" if place.kind == kinds[2] else "model.safetensors")
    tensors = safetensors.torch.load_file(file)
    ends = ("_proj.weight", ".exp_avg")
    names = sorted(name for name, one in tensors.items() if name.endswith(ends) and one.dim() == 2)
    place.named = names[int(place.random.integers(len(names)))]
    flat = tensors[place.named].view(-1)
    if place.kind == kinds[1]:
        flat[:1].view(torch.int32).bitwise_xor_(1 << EXPONENT_BIT)
    else:
        flat[0] = torch.nan
    safetensors.torch.save_file(tensors, file)


@dataclass(frozen=True)
class Times:
    """Seconds of some steps: ``wall`` by the clock, ``processor`` of this process's processor time,
    and ``update``, by the clock, from the gradient to the stepped weights: with a guard, all that
    it does."""

    wall: float
    processor: float
    update: float


def timed(job: Job, steps: int, batch: int) -> Times:
    """Time so many steps; evaluations are not among them."""
    first = Trial(job, batch, "auto")
    epochs = -(-(steps + 2) // len(first.plan))
    trial = Trial(Job(job.store, job.size, job.seed, epochs, guard=job.guard), batch, "auto")
    config = trial.config.model_copy(update={"evaluations": 2})
    marks: dict[int, Times] = {}
    spent = 0.0

    def watched(update: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal spent
            begin = time.perf_counter()
            result = update(*arguments)
            spent += time.perf_counter() - begin
            return result

        return call

    def stop(step: int, words: str) -> None:
        marks[step] = Times(time.perf_counter(), time.process_time(), spent)
        if step == steps + 1:
            raise Stopped

    student, objective = trial.student()
    updates = patch.multiple(
        engine,
        _plain_update=watched(engine._plain_update),
        _guarded_update=watched(engine._guarded_update),
    )
    with updates, tempfile.TemporaryDirectory() as name, suppress(Stopped):
        train(TrainingJob(student, trial.data, objective, config, Path(name)), stop)
    first_step, last = marks[1], marks[steps + 1]
    return Times(
        last.wall - first_step.wall,
        last.processor - first_step.processor,
        last.update - first_step.update,
    )
