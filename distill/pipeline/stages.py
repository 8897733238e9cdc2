"""The stages of a run: ``Source → Prepared → Trained → Published → Evaluated``.

Each takes what the one before has made, and makes the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.base_models.base_model import load_base_student
from distill.capture.teachers import open_teacher
from distill.config.schema import RunConfig
from distill.errors import TrainingAborted
from distill.evaluation.cost import measure_speed
from distill.evaluation.scorers import (
    Evaluation,
    Scorer,
    evaluate,
    evaluate_stored,
    llama_scorer,
    other_weights,
    scored_ahead,
    scorer_with,
    student_scorer,
)
from distill.export.export import Proofs
from distill.export.publish import Publication, publish
from distill.heads.fitting import (
    HeadScores,
    calibrate,
    describe_scores,
    halves,
    heads_results,
    score_heads,
)
from distill.heads.safety_data import SafetyData
from distill.heads.safety_fitting import SafetyFit, with_safety_head
from distill.inference.reasoning import digests
from distill.initialization.start import begin
from distill.losses.objective import build_objective
from distill.metrics.closeness import kl_name
from distill.pipeline.budget.budget import Budget, with_steps
from distill.pipeline.resolve import Resolved
from distill.reports.build import write_run_report
from distill.runs.audit_events import record_capture, record_settings, record_training
from distill.runs.decisions import Decisions
from distill.runs.folder import HeldOut, RunFolder
from distill.runtime.device import release_memory, training_device, why_float32
from distill.runtime.format import human_count
from distill.runtime.launch import Launch
from distill.runtime.progress import Console
from distill.training.data import Plan, TrainingData, split
from distill.training.engine import TrainingJob, train
from distill.training.gradient_check import probe_gradients
from distill.training.on_policy import OnPolicyBatches
from distill.training.optimizer import initial_learning_rate
from distill.training.summary import TrainingSummary
from distill.training.validation import validation_kl
from distill.trimming.for_student import reduced
from distill.trimming.measure import bits_per_byte
from distill.trimming.text import decoded
from students.adapter.adapter import AdaptedStudent
from students.mapped_tensors import MappedTensors
from students.model.interface import Student
from students.weights import plain_weights
from teachers.base import SINGLE_PROCESS, Teacher, TeacherInfo, Tokens
from teachers.llama_cpp.library.kernels import LoadOptions
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.store.store import SoftTargetStore
from teachers.store.teacher_record import TeacherRecord

SAFETY = "safety_head."
INITIALIZATION_SEQUENCES = 512  # of training text that initialization may look at


@dataclass(frozen=True)
class Workspace:
    """Where a run works: its folder, the processes of its launch, the console; what it has decided
    by measuring, and its time, if that is limited."""

    folder: RunFolder
    launch: Launch
    console: Console
    decisions: Decisions | None = None
    budget: Budget | None = None


@dataclass(frozen=True)
class Source:
    """All that a student is made from: a complete store, what it keeps of the teacher, and the
    safety head's prompts.

    ``reused``: nothing had to be captured. ``gguf``: whose weights it can start from. ``teacher``:
    open only where it scores the student's own text.
    """

    resolved: Resolved
    store: SoftTargetStore
    teacher_record: TeacherRecord
    reused: bool
    safety: SafetyData | None
    gguf: Path | None
    teacher: Teacher | None = None

    @property
    def config(self) -> RunConfig:
        return self.resolved.config

    @property
    def info(self) -> TeacherInfo:
        return self.teacher_record.info


@dataclass(frozen=True)
class Prepared:
    """A student about to be trained. ``initial``: the first weights of one made of a base model,
    which are not computed again; ``learning_rate``: the peak, the same in all processes;
    ``gradients``: of the probe batch, where there is a base."""

    source: Source
    data: TrainingData
    held_out: HeldOut
    student: Student
    initial: dict[str, Tensor]
    learning_rate: float
    gradients: dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """``prepared``, whose student has the best weights now."""

    prepared: Prepared
    summary: TrainingSummary


@dataclass(frozen=True)
class Published:
    """The exported student; ``head_sequences`` of the store are left to score its heads on.
    ``fitted``: its safety head, if one was wanted."""

    trained: Trained
    proofs: Proofs
    head_sequences: list[int]
    fitted: SafetyFit | None


@dataclass(frozen=True)
class Evaluated:
    """``speeds``: prompt and generation tokens per second. ``heads``: see
    ``distill.heads.fitting.heads_results``. ``bits_per_byte`` of the exported student and, where it
    is here, the teacher with its whole vocabulary and with the student's; where these are two."""

    published: Published
    evaluation: Evaluation
    speeds: dict[str, tuple[float, float]]
    heads: dict[str, Any]
    bits_per_byte: dict[str, float]


def prepare(source: Source, work: Workspace) -> Prepared:
    """Divide the data, initialize the student, choose its learning rate."""
    config, store, lines = source.config, source.store, source.teacher_record.lines
    if work.launch.first:
        kept = [digest for text in lines.texts for digest in digests(text)]
        record_capture(work.folder.path, store, source.reused, kept)
    parts = split(store, config.data.held_out, config.seed)
    data = TrainingData(store, parts, config.seed, batch_tokens=config.train.batch_tokens)
    student = _initialize(source, data, work)
    if work.budget is not None and config.train.steps is None:
        about = (student, data, source.safety)
        resolved = with_steps(work.budget, source.resolved, *about, work.console)
        source, config = replace(source, resolved=resolved), resolved.config
        work.folder.write_json(work.folder.config_file, config.model_dump(mode="json"))
        record_settings(work.folder)
    plan = _batches(config, data)
    steps, points = len(plan), config.train.evaluations
    data = data.watching(plan.tokens, points)
    if source.safety is not None:
        every, together = config.safety.rhythm(steps)
        prompts = source.safety.train
        data = replace(data, prompts=prompts, prompts_every=every, prompts_together=together)
    indices = data.split.held_out.tolist()
    keep = [store.keep(index) for index in indices] if store.manifest.masked else None
    held_out = HeldOut([store.tokens(index) for index in indices], lines, keep)
    initial: dict[str, Tensor] = {}
    if source.resolved.base is not None:
        initial = {
            name: weight.to("cpu", copy=True)
            for name, weight in plain_weights(student).items()
            if not name.startswith(SAFETY)  # which gets another shape once training is over
        }
    validation = data.held_out(config.train.batch_size, torch.device("cpu"), student.packs)
    init = config.student.init if source.resolved.base is None else "base"
    rate = initial_learning_rate(config.train, student, init, validation, steps)
    rate = work.launch.agreed(rate)
    gradients: dict[str, Any] = {}
    if isinstance(student, AdaptedStudent):
        gradients = probe_gradients(student, data, config, source.info.layers, work.console)
    return Prepared(source, data, held_out, student, initial, rate, gradients)


def _batches(config: RunConfig, data: TrainingData) -> Plan:
    plan = Plan(data, config.train.epochs, config.train.batch_size)
    return plan.first(config.train.steps)


def _initialize(source: Source, data: TrainingData, work: Workspace) -> Student:
    """The base model with adapters, or a new student, from the teacher's weights on some of the
    training text."""
    base = source.resolved.base
    if base is not None:
        with work.console.stage("Load base") as stage:
            adapted = load_base_student(base, source.config, source.info.vocab_size)
            stage.finish(f"{human_count(adapted.trainable_parameters())} parameters are trained")
        return adapted
    indices = data.split.train
    count = min(len(indices), INITIALIZATION_SEQUENCES)
    some = indices[np.linspace(0, len(indices) - 1, count).astype(int)]
    return begin(
        source.config,
        source.teacher_record,
        source.gguf,
        [source.store.tokens(int(index)) for index in some],
        work.folder.beginning,
        work.launch,
        work.console,
    )


def train_student(prepared: Prepared, work: Workspace) -> Trained:
    """Train in all processes.

    Raises:
        TrainingAborted: training went wrong; the report shows how.
    """
    source, data, student = prepared.source, prepared.data, prepared.student
    config, info = source.config, source.info
    compared = data.store.manifest.recipe.layers if config.loss.gamma else ()
    with work.console.stage("Match layers") if compared else nullcontext() as stage:
        objective = build_objective(config.loss, data.store, student, info.layers)
        if stage is not None:
            stage.finish(f"{len(compared)} of the teacher's")
    on_policy = None
    if config.train.on_policy:
        assert source.teacher is not None
        share, temperature = config.train.on_policy, config.train.on_policy_temperature
        on_policy = OnPolicyBatches(
            source.teacher, data.store, share, temperature, config.seed, info.eos
        )
    settings = config.train.model_copy(update={"learning_rate": prepared.learning_rate})
    job = TrainingJob(student, data, objective, settings, work.folder.path)
    plan = _batches(config, data)
    if slower := why_float32(settings, training_device()):
        work.console.note(slower)
    with work.console.stage("Train", total=len(plan)) as stage:

        def report(step: int, note: str) -> None:
            stage.update(step, note, plan.share(step))

        try:
            summary = train(job, report, on_policy, work.console.warn)
        except TrainingAborted:
            write_run_report(work.folder, work.console)
            raise
        stage.finish(summary.in_words(validation_kl(data.store.manifest.recipe)))
    release_memory(student.device)
    if source.teacher is not None:
        source.teacher.close()
    if summary.continued_from:
        work.console.note(f"training was continued from step {summary.continued_from}")
    if work.launch.first:
        stats = {
            "learning_rate": prepared.learning_rate,
            "held_out_kl": [[step, score.kl] for step, score in summary.scores],
        }
        record_training(work.folder.path, {**summary.to_json(), **stats})
    return Trained(prepared, summary)


def publish_student(trained: Trained, work: Workspace) -> Published:
    """Fit the heads, export the student and prove its file.

    Raises:
        ProofFailed, ExportError: the file is not the trained model.
    """
    prepared = trained.prepared
    source, data = prepared.source, prepared.data
    for_calibration, for_scores = halves(data.split.held_out.tolist())
    calibrate(prepared.student, source.store, for_calibration)
    fitted = with_safety_head(
        prepared.student, source.safety, source.config.safety.most_read, work.console
    )
    publication = Publication(
        prepared.student,
        source.config,
        source.teacher_record,
        source.store,
        data.split.train,
        prepared.held_out,
        source.resolved.base,
    )
    proofs = publish(publication, work.folder, work.console)
    return Published(trained, proofs, for_scores, fitted)


def evaluate_student(published: Published, work: Workspace) -> Evaluated:
    """Score the student before and after training and as exported, against the teacher, or where
    the run has none against its stored targets; time the files that are there."""
    prepared = published.trained.prepared
    source, console = prepared.source, work.console
    indices = prepared.data.split.held_out.tolist()
    sequences = [source.store.tokens(index) for index in indices]
    positions = sum(map(len, sequences)) - len(indices)
    speeds, bits = {}, {}
    cut = source.teacher_record.cut
    with MappedTensors(work.folder.path) as kept:
        models = _student_scorers(prepared, sequences, kept, work)
        with console.stage("Evaluate", total=positions) as stage, _exported(source, work) as file:
            models["exported"] = llama_scorer(file)
            if source.config.store is None and not source.store.manifest.truncation:
                asked = source.config.teacher.model_copy(update={"weights_as": None})
                with (
                    open_teacher(asked) as whole,  # the file itself, as its users run it
                    reduced(whole, cut, source.gguf) as teacher,
                ):
                    keep = [source.store.keep(index) for index in indices]
                    evaluation = evaluate(teacher, sequences, models, stage.update, keep)
                    speeds["teacher"] = measure_speed(teacher)
                    if cut is not None:
                        text = decoded(teacher, sequences)
                        bits["teacher"] = bits_per_byte(whole, text)
                        bits["reduced_teacher"] = bits_per_byte(teacher, text)
            else:
                evaluation = evaluate_stored(source.store, indices, models, stage.update)
            speeds["student"] = measure_speed(file)
            if cut is not None:
                bits["student"] = bits_per_byte(file, decoded(file, sequences))
            score = evaluation.models["exported"]
            stage.finish(
                f"{kl_name(evaluation.kl_over)} {score.kl:.3f}, agreement {score.agreement:.1%} "
                f"over {evaluation.positions} positions"
            )
    return Evaluated(published, evaluation, speeds, _score_heads(published, work), bits)


def _student_scorers(
    prepared: Prepared, sequences: Sequence[Tokens], kept: MappedTensors, work: Workspace
) -> dict[str, Scorer]:
    """The student before and after training. On a GPU both compute all but their logits now, and
    the student moves to main memory: the GPU is then llama.cpp's alone."""
    source, student = prepared.source, prepared.student
    device, has_base = student.device, source.resolved.base is not None
    if not has_base:
        alone = replace(work, launch=Launch(SINGLE_PROCESS))
        first = _initialize(source, prepared.data, alone)
    if device.type == "cpu":
        before = scorer_with(student, prepared.initial) if has_base else student_scorer(first)
        return {"before": before, "after": student_scorer(student)}
    if has_base:
        with other_weights(student, prepared.initial):
            before = scored_ahead(student, sequences, kept)
    else:
        before = scored_ahead(first.to(device), sequences, kept)
        del first
    models = {"before": before, "after": scored_ahead(student, sequences, kept)}
    student.to("cpu")
    release_memory(device)
    return models


def _exported(source: Source, work: Workspace) -> GGUFTeacher:
    """The exported student where the teacher runs, beside whose its speed stands."""
    teacher = source.config.teacher
    options = LoadOptions(gpu_layers=teacher.gpu_layers, main_gpu=teacher.main_gpu)
    return GGUFTeacher(work.folder.gguf, options)


def _score_heads(published: Published, work: Workspace) -> dict[str, Any]:
    """How good the exported file's safety and verification head are."""
    source, heads = published.trained.prepared.source, published.trained.prepared.student.heads()
    fitted = published.fitted
    if heads.safety is None and heads.verification is None:
        return heads_results(HeadScores(None, {}, None), heads, source.safety, fitted)
    with work.console.stage("Score heads") as stage, GGUFTeacher(work.folder.gguf) as file:
        scores = score_heads(file, heads, source.safety, source.store, published.head_sequences)
        stage.finish(describe_scores(scores))
    return heads_results(scores, heads, source.safety, fitted)
