"""``distill run`` and ``distill train``: from a teacher, or from its soft targets, to a proved GGUF student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.audit import anchor, record_capture, record_finish, record_start, record_training
from distill.base_student import Base, judge_base, load_base_student, open_base, with_checkpointing
from distill.batches import split
from distill.beginning import begin, find_teacher, settle_beginning, with_learning_rate
from distill.capturing import (
    StorePlace,
    fill_store,
    keep_inheritance,
    load_teacher,
    open_store,
    read_data,
    recipe_for,
    text_of,
)
from distill.card import is_ours, write_card
from distill.checkpoint import plain_weights
from distill.config import RunConfig
from distill.console import Console, human_count
from distill.engine import TrainingData, TrainingSummary, train
from distill.errors import TrainingAborted, UserError
from distill.evaluation.scores import (
    Evaluation,
    Scorer,
    evaluate,
    evaluate_stored,
    llama_scorer,
    scorer_with,
    student_scorer,
)
from distill.full_store import open_full_store, require_complete, without_capture
from distill.heads import calibrate, describe_scores, halves, heads_results, score_heads
from distill.hidden_loss import pair_layers
from distill.launch import Launch
from distill.launched import fsdp_is_asked_for
from distill.new_student import judge_size, student_shape, with_size
from distill.objective import build_objective
from distill.on_policy import OwnWords
from distill.preflight import Inputs, check_run, check_train
from distill.probe_gradients import probe_gradients
from distill.prove import measure_speed
from distill.publishing import Publication, publish
from distill.reports.html import write_run_report
from distill.results import Outcome, build_results, environment, print_table
from distill.run_folder import HeldOut, Places, RunFolder, choose_folder
from distill.safety_data import SafetyData, labelled_prompts, safety_data
from distill.safety_prompts import SafetyPrompt, digest
from distill.teacher_source import find_gguf, open_teacher, teacher_stem, tokenizer_of
from students.adapter import AdaptedStudent
from students.student import Student
from teachers.base import Teacher, TeacherInfo
from teachers.files import exclusive
from teachers.gguf_file import Field
from teachers.gguf_teacher import GGUFTeacher
from teachers.inheritance import Inheritance, need_inheritance
from teachers.share import WHOLE
from teachers.store import SoftTargetStore

BEGINNING_SEQUENCES = 512  # of training text that a head start may look at


@dataclass(frozen=True)
class Source:
    """All that a student is made from: a complete store, what it keeps of the teacher, and prompts to decide on.

    ``reused``: nothing had to be captured. ``gguf``: whose weights it can begin at. ``teacher``: open only
    where the student's own words are scored. ``base``: the model that it is made of, if it is not a new one.
    """

    config: RunConfig
    store: SoftTargetStore
    inheritance: Inheritance
    reused: bool
    safety: SafetyData | None
    gguf: Path | None
    teacher: Teacher | None = None
    base: Base | None = None


def run(
    config: RunConfig,
    places: Places,
    console: Console,
    inputs: Inputs | None = None,
) -> RunFolder:
    """Do a whole run, or what is left of it, and return its folder.

    ``inputs``: what ``check_run`` has read, if it was called.

    Raises:
        UserError, StoreError, TeacherFileError, TeacherError: the input cannot be used.
        TrainingAborted, ProofFailed: training or export went wrong.
        OSError: the disk refuses.
    """
    inputs = inputs or check_run(config, places)
    prompts = inputs.prompts
    launch = Launch.join()
    with load_teacher(config, console) as teacher:
        gguf = find_gguf(config.teacher)
        config, base = _settle(config, tokenizer_of(config.teacher), teacher.info, gguf, console)
        stem = teacher_stem(config.teacher)
        folder = _choose(places.out, config, stem, launch)
        corpus = read_data(config, teacher, console, inputs.take_entries())
        recipe = recipe_for(config.targets, teacher, console)
        layers = base.layers if base else student_shape(config, teacher.info).num_hidden_layers
        pair_layers(config.loss.layer_map, recipe.layers, layers, teacher.info.layers)
        store = open_store(teacher, corpus, recipe, StorePlace(places.store, folder.path.parent, stem))

        def capture() -> Source:
            words, info = tokenizer_of(config.teacher), teacher.info
            # Now, not after hours, a prompt is found to be too long.
            safety = safety_data(config, prompts, words, info)
            with exclusive(store.folder, launch.share.rank):
                reused = fill_store(teacher, corpus, store, console, launch.share)
                if launch.first:
                    text = text_of(config, info)
                    keep_inheritance(teacher, gguf, store, console, launch.share, text)
                    labelled_prompts(config, prompts, teacher, store, console)
                launch.wait()
            if not config.train.on_policy:
                teacher.close()  # it is out of memory while the student trains
            labelled = labelled_prompts(config, prompts, None, store, console)
            if labelled is not prompts:
                safety = safety_data(config, labelled, words, info)
            return Source(config, store, need_inheritance(store), reused, safety, gguf, teacher, base)

        _work_in(folder, config, _identity(teacher.info, store, prompts, base), capture, launch, console)
    return folder


def train_from_store(
    config: RunConfig, out: Path | None, console: Console, inputs: Inputs | None = None
) -> RunFolder:
    """Make a student from the store that ``config`` names, or what is left to do of it; no teacher is needed.

    ``inputs``: what ``check_train`` has read, if it was called.

    Raises:
        UserError, StoreError: the input cannot be used.
        TrainingAborted, ProofFailed: training or export went wrong.
        OSError: the disk refuses.
    """
    assert config.store is not None
    prompts = (inputs or check_train(config, out)).prompts
    launch = Launch.join()
    store, inheritance = open_full_store(Path(config.store))
    info = inheritance.info
    config = without_capture(config, store.manifest.recipe, console)
    gguf = find_teacher(config.teacher.path, info)
    console.note(
        f"soft targets of {info.name}: {info.architecture}, {human_count(info.parameters)} parameters"
    )
    longest = None if config.student.base is None else int(store.lengths().max())
    config, base = _settle(config, inheritance.tokenizer, info, gguf, console, longest)
    folder = _choose(out, config, store.folder.resolve().name, launch)
    if not folder.finished:
        require_complete(store, console)

    def prepare() -> Source:
        labelled = labelled_prompts(config, prompts, None, store, console)
        safety = safety_data(config, labelled, inheritance.tokenizer, info)
        return Source(config, store, inheritance, True, safety, gguf, base=base)

    _work_in(folder, config, _identity(info, store, prompts, base), prepare, launch, console)
    return folder


def _settle(
    config: RunConfig,
    tokenizer: Mapping[str, Field],
    info: TeacherInfo,
    gguf: Path | None,
    console: Console,
    longest: int | None = None,
) -> tuple[RunConfig, Base | None]:
    """The settings with what depends on the teacher, and the base that the student is made of, if it is not a new one;
    says how large it will be, and sees that it can be trained here. ``longest``: tokens of a sequence, where known."""
    if config.student.base is None:
        config = settle_beginning(with_size(config, info), info, gguf, console)
        judge_size(config, student_shape(config, info), info, console)
        return with_checkpointing(config, False), None
    base = open_base(config, tokenizer, info.vocab_size)
    if fsdp_is_asked_for():
        raise UserError(
            "--student-base cannot be spread over processes by FSDP: its frozen weights are there whole in each; leave "
            "out --use_fsdp"
        )
    config = with_checkpointing(config, True)
    judge_base(base, config, info.vocab_size, longest or config.data.max_length, console)
    return config, base


def _choose(out: Path | None, config: RunConfig, stem: str, launch: Launch) -> RunFolder:
    """The run's folder, which is or can become its own; nothing in it is touched."""
    folder = RunFolder(out or launch.agreed(choose_folder(config, stem).path))
    folder.check(config)
    return folder


def _identity(
    info: TeacherInfo,
    store: SoftTargetStore,
    prompts: list[SafetyPrompt] | None,
    base: Base | None,
) -> dict[str, str]:
    """What a run's folder must not be continued without."""
    of_base = (
        {} if base is None else {"base_name": base.folder.path.resolve().name, "base_sha256": base.sha256}
    )
    return of_base | {
        "teacher_name": info.name,
        "teacher_sha256": info.sha256,
        "soft_targets": store.manifest.key,
        "safety_prompts": "none" if prompts is None else digest(prompts),
    }


def _work_in(
    folder: RunFolder,
    config: RunConfig,
    identity: dict[str, str],
    prepare: Callable[[], Source],
    launch: Launch,
    console: Console,
) -> None:
    """Make the student in ``folder`` unless it is there already, and show what came of it."""
    with exclusive(folder.path, launch.share.rank):
        if launch.first:
            folder.claim(config, identity)
            record_start(folder, config.model_dump(mode="json"), identity, environment())
        launch.wait()
        if folder.finished:
            console.note(f"{folder.path} already holds this run, finished; nothing was done again")
            if launch.first:
                _round_off(folder, console)
        else:
            _make_student(prepare(), folder, launch, console)
    if launch.first:
        print_table(folder, console)


def _make_student(source: Source, folder: RunFolder, launch: Launch, console: Console) -> None:
    """Train in all processes; export, prove, evaluate and write down in the first."""
    config, info, store = source.config, source.inheritance.info, source.store
    if launch.first:
        record_capture(folder.path, store, source.reused, source.inheritance.lines.texts)
    parts = split(store, config.data.held_out, config.seed)
    data = TrainingData(store, parts, config.seed)
    if source.safety is not None:
        steps = len(data.batches(config.train.epochs, config.train.batch_size))
        every, together = config.safety.rhythm(steps)
        prompts = source.safety.train
        data = replace(data, prompts=prompts, prompts_every=every, prompts_together=together)
    held_out = HeldOut([store.tokens(int(index)) for index in data.split.held_out], source.inheritance.lines)
    student = _begin(source, data, folder, launch, console)
    first = {name: weight.clone() for name, weight in plain_weights(student).items()} if source.base else {}
    source = _with_learning_rate(source, data, student, launch)
    gradients: dict[str, Any] = {}
    if isinstance(student, AdaptedStudent):
        gradients = probe_gradients(student, data, source.config, info.layers, console)
    summary = _train(source, data, student, folder, console)
    if not launch.first:
        return
    record_training(folder.path, summary, source.config.train.learning_rate)
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
    """What is done last, and again if the process was killed there: the log's last line, the report, the model card,
    and no more file of first weights."""
    record_finish(folder)
    if not folder.report.exists():
        write_run_report(folder, console)
    if not folder.card.exists():
        write_card(folder)
    folder.beginning.unlink(missing_ok=True)


def _begin(
    source: Source, data: TrainingData, folder: RunFolder, launch: Launch, console: Console
) -> Student:
    """The student as training begins: made of its base, or from the teacher's weights on some of the training text."""
    if source.base is not None:
        with console.stage("Load base") as stage:
            adapted = load_base_student(source.base, source.config, source.inheritance.info.vocab_size)
            stage.finish(f"{human_count(adapted.trainable_parameters())} parameters are trained")
        return adapted
    train = data.split.train
    some = train[np.linspace(0, len(train) - 1, min(len(train), BEGINNING_SEQUENCES)).astype(int)]
    sequences = [source.store.tokens(int(index)) for index in some]
    return begin(source.config, source.inheritance, source.gguf, sequences, folder.beginning, launch, console)


def _with_learning_rate(source: Source, data: TrainingData, student: Student, launch: Launch) -> Source:
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
                student, data, objective, config.train, folder.path, stage.update, own_words, console.warn
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
    """Score ``students`` and the exported file against the teacher, or where the run has none against its stored
    targets; time the files that are there."""
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
            f"KL {score.kl:.3f}, agreement {score.agreement:.1%} over {evaluation.positions} positions"
        )
    return evaluation, speeds


def _score_heads(
    source: Source, folder: RunFolder, student: Student, sequences: list[int], console: Console
) -> dict[str, Any]:
    """What the exported file's safety and verification head are worth, as ``results.json`` says it."""
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
