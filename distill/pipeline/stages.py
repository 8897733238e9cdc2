"""The stages of a run, in order: student, training, export, evaluation, results."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.base_models.base_model import Base, load_base_student
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
    scorer_with,
    student_scorer,
)
from distill.export.publish import Publication, publish
from distill.heads.fitting import calibrate, describe_scores, halves, heads_results, score_heads
from distill.heads.safety_data import SafetyData
from distill.inference.reasoning import digests
from distill.initialization.start import begin
from distill.losses.objective import build_objective
from distill.pipeline.results import Outcome, build_results
from distill.reports.build import write_run_report
from distill.reports.card.card import is_ours, write_card
from distill.runs.audit_events import anchor, record_capture, record_finish, record_training
from distill.runs.folder import HeldOut, RunFolder
from distill.runtime.format import human_count
from distill.runtime.launch import Launch
from distill.runtime.progress import Console
from distill.training.data import TrainingData, split
from distill.training.engine import train
from distill.training.gradient_check import probe_gradients
from distill.training.on_policy import OwnWords
from distill.training.optimizer import with_learning_rate
from distill.training.summary import TrainingSummary
from students.adapter.adapter import AdaptedStudent
from students.model.interface import Student
from students.weights import plain_weights
from teachers.base import WHOLE, Teacher
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.store.store import SoftTargetStore
from teachers.store.teacher_record import Inheritance

BEGINNING_SEQUENCES = 512  # of training text that a head start may look at


@dataclass(frozen=True)
class Source:
    """All that a student is made from: a complete store, what it keeps of the teacher, and prompts
    to decide on.

    ``reused``: nothing had to be captured. ``gguf``: whose weights it can begin at. ``teacher``:
    open only where the student's own words are scored. ``base``: the model that it is made of, if
    it is not a new one.
    """

    config: RunConfig
    store: SoftTargetStore
    inheritance: Inheritance
    reused: bool
    safety: SafetyData | None
    gguf: Path | None
    teacher: Teacher | None = None
    base: Base | None = None


def _make_student(source: Source, folder: RunFolder, launch: Launch, console: Console) -> None:
    """Train in all processes; export, prove, evaluate and write down in the first."""
    config, info, store = source.config, source.inheritance.info, source.store
    if launch.first:
        kept = [digest for text in source.inheritance.lines.texts for digest in digests(text)]
        record_capture(folder.path, store, source.reused, kept)
    parts = split(store, config.data.held_out, config.seed)
    data = TrainingData(store, parts, config.seed)
    if source.safety is not None:
        steps = len(data.batches(config.train.epochs, config.train.batch_size))
        every, together = config.safety.rhythm(steps)
        prompts = source.safety.train
        data = replace(data, prompts=prompts, prompts_every=every, prompts_together=together)
    held_out = HeldOut(
        [store.tokens(int(index)) for index in data.split.held_out], source.inheritance.lines
    )
    student = _begin(source, data, folder, launch, console)
    first = (
        {name: weight.clone() for name, weight in plain_weights(student).items()}
        if source.base
        else {}
    )
    source = _with_learning_rate(source, data, student, launch)
    gradients: dict[str, Any] = {}
    if isinstance(student, AdaptedStudent):
        gradients = probe_gradients(student, data, source.config, info.layers, console)
    summary = _train(source, data, student, folder, console)
    if not launch.first:
        return
    figures = {
        "learning_rate": source.config.train.learning_rate,
        "held_out_kl": [[s, score.kl] for s, score in summary.scores],
    }
    record_training(folder.path, {**summary.to_json(), **figures})
    for_calibration, for_scores = halves(parts.held_out.tolist())
    calibrate(student, source.safety, store, for_calibration)
    publication = Publication(
        student, config, source.inheritance, store, data.split.train, held_out, source.base
    )
    proofs = publish(publication, folder, console)
    if source.base is not None:
        before = scorer_with(student, first)
    else:
        before = student_scorer(_begin(source, data, folder, Launch(WHOLE), console))
    scorers = {"before": before, "after": student_scorer(student)}
    evaluation, speeds = _evaluate(source, data, folder, scorers, console)
    heads = _score_heads(source, folder, student, for_scores, console)
    outcome = Outcome(
        source.config,
        info,
        student,
        store,
        source.reused,
        summary,
        proofs,
        evaluation,
        speeds,
        heads,
        gradients,
    )
    folder.report.unlink(missing_ok=True)  # of an attempt that was given up
    if is_ours(folder):
        folder.card.unlink()
    results = build_results(outcome, folder.gguf.stat().st_size, console.seconds)
    folder.write_results(results | {"audit": anchor(folder.path)})
    _round_off(folder, console)


def _round_off(folder: RunFolder, console: Console) -> None:
    """What is done last, and again if the process was killed there: the log's last line, the
    report, the model card, and no more file of first weights."""
    record_finish(folder)
    if not folder.report.exists():
        write_run_report(folder, console)
    if not folder.card.exists():
        write_card(folder)
    folder.beginning.unlink(missing_ok=True)


def _begin(
    source: Source, data: TrainingData, folder: RunFolder, launch: Launch, console: Console
) -> Student:
    """The student as training begins: made of its base, or from the teacher's weights on some of
    the training text."""
    if source.base is not None:
        with console.stage("Load base") as stage:
            adapted = load_base_student(
                source.base, source.config, source.inheritance.info.vocab_size
            )
            stage.finish(f"{human_count(adapted.trainable_parameters())} parameters are trained")
        return adapted
    train = data.split.train
    some = train[np.linspace(0, len(train) - 1, min(len(train), BEGINNING_SEQUENCES)).astype(int)]
    sequences = [source.store.tokens(int(index)) for index in some]
    return begin(
        source.config, source.inheritance, source.gguf, sequences, folder.beginning, launch, console
    )


def _with_learning_rate(
    source: Source, data: TrainingData, student: Student, launch: Launch
) -> Source:
    """The source with a peak learning rate in its settings, the same in all processes."""
    config = source.config
    held_out = data.held_out(config.train.batch_size, torch.device("cpu"))
    train = with_learning_rate(config.train, student, config.student.init, held_out)
    rate = launch.agreed(train.learning_rate)
    train = train.model_copy(update={"learning_rate": rate})
    return replace(source, config=config.model_copy(update={"train": train}))


def _train(
    source: Source, data: TrainingData, student: Student, folder: RunFolder, console: Console
) -> TrainingSummary:
    config, info = source.config, source.inheritance.info
    objective = build_objective(config.loss, data.store, student, info.layers, config.seed)
    own_words = None
    if config.train.on_policy:
        assert source.teacher is not None
        share, temperature = config.train.on_policy, config.train.on_policy_temperature
        own_words = OwnWords(source.teacher, data.store, share, temperature, config.seed, info.eos)
    steps = len(data.batches(config.train.epochs, config.train.batch_size))
    with console.stage("Train", total=steps) as stage:
        try:
            summary = train(
                student,
                data,
                objective,
                config.train,
                folder.path,
                stage.update,
                own_words,
                console.warn,
            )
        except TrainingAborted:
            write_run_report(folder, console)
            raise
        stage.finish(_describe_training(summary))
    if source.teacher is not None:
        source.teacher.close()
    if summary.continued_from:
        console.note(f"training was continued from step {summary.continued_from}")
    return summary


def _describe_training(summary: TrainingSummary) -> str:
    scores = dict(summary.scores)
    words = f"{summary.steps} steps, {human_count(summary.tokens_seen)} tokens; held-out KL "
    words += f"{scores[0].kl:.3f} → {scores[summary.best].kl:.3f}"
    if summary.steps < summary.planned:
        words += f"; stopped early, {summary.planned} steps were planned"
    if summary.best < summary.steps:
        words += f"; the best weights are those of step {summary.best}"
    return words


def _evaluate(
    source: Source,
    data: TrainingData,
    folder: RunFolder,
    students: dict[str, Scorer],
    console: Console,
) -> tuple[Evaluation, dict[str, tuple[float, float]]]:
    """Score ``students`` and the exported file against the teacher, or where the run has none
    against its stored targets; time the files that are there."""
    config = source.config
    indices = data.split.held_out.tolist()
    with (
        console.stage("Evaluate", total=len(indices)) as stage,
        GGUFTeacher(folder.gguf, gpu_layers=config.teacher.gpu_layers) as exported,
    ):
        models = students | {"exported": llama_scorer(exported)}
        speeds = {}
        if config.store is None:
            with open_teacher(config.teacher) as teacher:
                sequences = [source.store.tokens(index) for index in indices]
                evaluation = evaluate(teacher, sequences, models, stage.update)
                speeds["teacher"] = measure_speed(teacher)
        else:
            evaluation = evaluate_stored(source.store, indices, models, stage.update)
        speeds["student"] = measure_speed(exported)
        score = evaluation.models["exported"]
        stage.finish(
            f"KL {score.kl:.3f}, agreement {score.agreement:.1%} over {evaluation.positions} "
            "positions"
        )
    return evaluation, speeds


def _score_heads(
    source: Source, folder: RunFolder, student: Student, sequences: list[int], console: Console
) -> dict[str, Any]:
    """What the exported file's safety and verification head are worth, as ``results.json`` says
    it."""
    heads = student.heads()
    if heads.safety is None and heads.verification is None:
        return {}
    with (
        console.stage("Score heads") as stage,
        GGUFTeacher(folder.gguf, gpu_layers=source.config.teacher.gpu_layers) as exported,
    ):
        scores = score_heads(exported, heads, source.safety, source.store, sequences)
        stage.finish(describe_scores(scores))
    return heads_results(scores, heads, source.safety)
