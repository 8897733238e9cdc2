"""One training of ``tools.studies.adapter``: a base with LoRA in NF4, with LoRA, or with all its
weights trained."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from distill.base_models.base_model import load_base_student
from distill.capture.ready_store import open_full_store
from distill.capture.temporary_files.tokenizer_only import metadata_entries
from distill.config.loading import load_config
from distill.config.schema import RunConfig
from distill.export.export import Export, export_proved
from distill.heads.prompts import read_safety_prompts
from distill.heads.safety_data import labelled_prompts, safety_data
from distill.losses.objective import build_objective
from distill.pipeline.resolve import resolve
from distill.runs.folder import HeldOut, latest_checkpoint
from distill.runtime.device import training_device
from distill.runtime.progress import Console
from distill.training.data import TrainingData, split
from distill.training.engine import TrainingJob, train
from distill.training.optimizer import peak_learning_rate
from students.adapter.base_model import logical_numbers
from students.gguf.metadata import ExportNames
from students.model.interface import Student
from tools.machine import peak_memory
from tools.models.make_base import Kind, make_base
from tools.studies.full_finetune import load_whole, train_whole

QLORA, LORA, FULL = WAYS = ("qlora", "lora", "full")
# Times the learning rate of ``distill run --student-base``; for all weights what measured best of
# 0.25 to 2 (qwen2).
USUAL_RATES = {QLORA: 1.0, LORA: 1.0, FULL: 1.0}
WARMUP = 5  # steps whose time does not count


@dataclass(frozen=True)
class Job:
    """One training.

    ``rate``: times the usual learning rate; ``settings``: ``section.key=value`` for all ways.
    """

    store: str
    base: str
    kind: Kind
    way: str
    rate: float
    steps: int = 200
    batch: int = 16
    seed: int = 0
    threads: int = 1
    settings: tuple[str, ...] = ()


def state_bytes(module: nn.Module) -> int:
    """Bytes of all weights (of NF4 with its scales), and of gradient and both moments of those
    that are trained."""
    total = 0
    for parameter in module.parameters():
        total += parameter.nbytes * (4 if parameter.requires_grad else 1)
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            total += sum(part.nbytes for part in (state.absmax, state.code))
            state = state.state2
    return total


@dataclass(frozen=True)
class Figures:
    """What came of a training. Bytes: ``state`` of weights, gradients and moments; ``peak`` of the
    process, ``before`` the model was loaded; of a student in NF4 also of the last checkpoint and of
    the F32 file, with that file's largest logit difference from the merged model in PyTorch. KL in
    nats per token."""

    job: Job
    learning_rate: float
    parameters: int
    trained: int
    kl_before: float
    kl_after: float
    tokens_per_second: float
    state_bytes: int
    peak_bytes: int
    before_bytes: int
    logit_difference: float | None = None
    checkpoint_bytes: int | None = None
    file_bytes: int | None = None

    @property
    def fall(self) -> float:
        """Share of the KL that training took away."""
        return 1.0 - self.kl_after / self.kl_before

    def to_json(self) -> dict[str, Any]:
        """Everything, with what follows from it."""
        more = {"share": self.trained / self.parameters, "fall": self.fall}
        return asdict(self) | more | {"extra_bytes": self.peak_bytes - self.before_bytes}


@dataclass(frozen=True)
class FirstSteps(TrainingData):
    """Training data of which so many batches are used."""

    steps: int = 0

    def batches(self, epochs: int, batch_size: int) -> Sequence[list[int]]:
        """See ``TrainingData.batches``."""
        return list(super().batches(epochs, batch_size)[: self.steps])


class Trial:
    """Store, base, data and settings of a job; the same job gives the same."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.store, self.kept = open_full_store(Path(job.store))
        given = {
            "student.base": job.base,
            "student.load_in_4bit": job.way == QLORA,
            "store": job.store,
        }
        given |= {"seed": job.seed, "train.batch_size": job.batch, "train.evaluations": 2}
        settings = load_config(None, given, list(job.settings))
        resolved = resolve(settings, self.kept.info, self.kept.tokenizer, None, Console())
        assert resolved.base is not None
        config, self.base = resolved.config, resolved.base
        parts = split(self.store, config.data.held_out, config.seed)
        self.data = FirstSteps(self.store, parts, config.seed, steps=job.steps)
        an_epoch = -(-len(parts.train) // job.batch)
        rate = job.rate * peak_learning_rate(config.train, self.base.config.hidden_size)
        changes = {"epochs": -(-job.steps // an_epoch), "learning_rate": rate}
        self.config: RunConfig = config.model_copy(
            update={"train": config.train.model_copy(update=changes)}
        )
        self.plan = self.data.batches(self.config.train.epochs, job.batch)
        if job.way != FULL:
            self._add_prompts()

    def _add_prompts(self) -> None:
        """Give the safety head what it learns from, where there is one."""
        prompts = labelled_prompts(
            self.config, read_safety_prompts(self.config), None, self.store, Console(quiet=True)
        )
        result = safety_data(self.config, prompts, self.kept.tokenizer, self.kept.info)
        if result is not None:
            every, together = self.config.safety.rhythm(len(self.plan))
            self.data = replace(
                self.data, prompts=result.train, prompts_every=every, prompts_together=together
            )

    def held_out(self) -> HeldOut:
        """What an exported file is proved on."""
        return HeldOut(
            [self.store.tokens(int(index)) for index in self.data.split.held_out], self.kept.lines
        )

    def speed(self, marks: Sequence[tuple[int, float]]) -> float:
        """Tokens per second, the median of the steps; ``marks``: when which step was done, in
        order."""
        lengths = self.store.lengths()
        speeds = [
            float(lengths[self.plan[step - 1]].sum() - len(self.plan[step - 1])) / (now - then)
            for (before, then), (step, now) in pairwise(marks)
            if step == before + 1  # else the guard went back or skipped a step
        ]
        return statistics.median(speeds[WARMUP:] or speeds)


def measure(job: Job) -> Figures:
    """Do one training, in a process of its own."""
    torch.set_num_threads(job.threads)
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="bench-adapter-") as name:
        folder = Path(name)
        tiny = make_base(folder / "tiny", job.kind, width=64, layers=1, steps=0)
        for place in ("warm", "measured"):
            (folder / place).mkdir()
        warm = Trial(replace(job, base=str(tiny), steps=2))
        run_trial(warm, folder / "warm")  # loads the code that training needs
        trial = Trial(job)
        gc.collect()
        return run_trial(trial, folder / "measured")


def run_trial(trial: Trial, folder: Path) -> Figures:
    """Train in this process; ``folder`` is there and empty."""
    job, config, marks = trial.job, trial.config, list[tuple[int, float]]()

    def report(step: int, words: str) -> None:
        marks.append((step, time.perf_counter()))

    student: Student
    with peak_memory(training_device()) as peak:
        if job.way == FULL:
            student = load_whole(trial.base, trial.kept.info.vocab_size)
            before, after = train_whole(student, trial.data, config, report)
        else:
            student = load_base_student(trial.base, config, trial.kept.info.vocab_size)
            objective = build_objective(config.loss, trial.store, student, trial.kept.info.layers)
            work = TrainingJob(student, trial.data, objective, config.train, folder)
            summary = train(work, report)
            before, after = summary.scores[0][1].kl, summary.scores[-1][1].kl
    rate = config.train.learning_rate
    assert rate is not None
    figures = Figures(
        job,
        rate,
        sum(logical_numbers(one) for one in student.parameters()),
        sum(one.numel() for one in student.parameters() if one.requires_grad),
        before,
        after,
        trial.speed(marks),
        state_bytes(student),
        peak.most,
        peak.before,
    )
    return figures if job.way != QLORA else _exported(trial, student, folder, figures)


def _exported(trial: Trial, student: Student, folder: Path, figures: Figures) -> Figures:
    """The figures with those of the exported file, which is proved, and of the last checkpoint."""
    path, checkpoint = folder / "student.gguf", latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    tokenizer = metadata_entries(trial.kept.tokenizer)
    export = Export(student, tokenizer, ExportNames("benchmark", {}), trial.held_out())
    proof = export_proved(export, {"f32": path}).original
    return replace(
        figures,
        logit_difference=proof.max_logit_difference,
        checkpoint_bytes=sum(file.stat().st_size for file in checkpoint.iterdir()),
        file_bytes=path.stat().st_size,
    )
