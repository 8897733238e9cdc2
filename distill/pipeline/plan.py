"""``distill plan``: what a run will take, before it starts: measured on a short probe, not
guessed."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from rich.table import Table

from distill.base_models.base_model import Base, load_base_student, open_base
from distill.base_models.memory_advice import how_to_fit
from distill.base_models.memory_check import available_memory, describe_base, training_memory
from distill.base_models.memory_estimate import memory_rows
from distill.capture.capture import load_teacher, read_data
from distill.capture.corpus import Corpus
from distill.capture.store_setup import largest_size, recipe_for
from distill.capture.teachers import find_gguf, tokenizer_of
from distill.config.schema import RunConfig
from distill.initialization.shape import (
    describe_parameters,
    snapshot_bytes,
    student_shape,
    with_size,
)
from distill.initialization.start import settle_beginning
from distill.losses.batch import Batch, padded
from distill.losses.objective import Objective
from distill.pipeline.preflight import Inputs, check_plan
from distill.pipeline.resolve import with_checkpointing
from distill.runtime.device import choose_precision
from distill.runtime.format import human_bytes, human_count, human_time
from distill.runtime.progress import Console
from distill.training.optimizer import build_optimizer
from students.model.build import build_student
from students.model.config import SO8TConfig
from students.model.interface import Student
from students.model.sizes import decoder_parameters
from teachers.base import Teacher, TeacherInfo, Tokens
from teachers.store.capture import fit_companion
from teachers.store.shared import Companion
from teachers.targets.recipe import Recipe
from teachers.targets.stored_arrays import typed

PROBE_SEQUENCES = 32
PROBE_STEPS = 3
BEGINNINGS = {
    "teacher": "the teacher's weights",
    "embeddings": "random weights, the teacher's token embeddings",
    "random": "random weights",
}


@dataclass(frozen=True)
class Probe:
    """What was measured: sequence lengths in tokens, seconds per captured token, the teacher's
    memory in bytes."""

    sequences: list[Tokens]
    seconds_per_token: float
    teacher_bytes: int
    batch: Batch


@dataclass(frozen=True)
class Plan:
    """What a run will take; times in seconds, sizes in bytes; parameters as exported.

    ``train_seconds``: not known for a base that this machine has not the memory for.
    """

    tokens: int
    store_bytes: int
    store_limit: int
    capture_seconds: float
    teacher_memory: int
    parameters: int
    steps: int
    train_seconds: float | None
    train_memory: int


def plan_run(
    config: RunConfig, console: Console, memory: int | None = None, inputs: Inputs | None = None
) -> Plan:
    """Measure a little of everything and print what the whole will take; nothing is written.

    ``memory``: bytes that training is to fit into; what would make it fit is said where it does
    not. ``inputs``: what ``check_plan`` has read, if it was called.

    Raises:
        UserError, TeacherFileError, TeacherError, CaptureError: the input cannot be used.
    """
    inputs = inputs or check_plan(config)
    with load_teacher(config, console) as teacher:
        info = teacher.info
        base, shape = None, None
        # What cannot be is refused before anything is measured.
        if config.student.base is not None:
            base = open_base(config, tokenizer_of(config.teacher), info.vocab_size)
            config = with_checkpointing(config, True)
            describe_base(base, config, info.vocab_size, console)
        else:
            config = settle_beginning(
                with_size(config, info), info, find_gguf(config.teacher), console
            )
            shape = student_shape(config, info)
        corpus = read_data(config, teacher, console, inputs.take_entries())
        recipe = recipe_for(config.targets, teacher, console)
        with console.stage("Probe teacher") as stage:
            probe = _probe_teacher(teacher, corpus, recipe)
            stage.finish(f"{1 / probe.seconds_per_token:,.0f} tokens/s")
    if shape is not None:
        parameters = decoder_parameters(shape)
        seconds: float | None = _measure(
            build_student(shape, config.seed), probe.batch, config, console
        )
        trained = psutil.Process().memory_info().rss + snapshot_bytes(config, parameters)
        rows = _rows_of_shape(shape, config, info)
    else:
        assert base is not None
        needed = training_memory(base, config, info.vocab_size)
        parameters, seconds, trained = needed.base_numbers, None, needed.total
        if trained <= available_memory()[0]:
            adapted = load_base_student(base, config, info.vocab_size)
            seconds = _measure(adapted, probe.batch, config, console)
        rows = _rows_of_base(base, config, info)
    plan = _combine(config, corpus, recipe, teacher, probe, parameters, seconds, trained)
    _print(plan, recipe, str(config.student.label), rows, teacher, console)
    if memory is not None:
        _judge_memory(plan, memory, base, config, info, console)
    return plan


def _measure(student: Student, batch: Batch, config: RunConfig, console: Console) -> float:
    """Seconds of an optimizer step."""
    with console.stage("Probe student") as stage:
        seconds = _probe_student(student, batch, config)
        stage.finish(f"{batch.count() / seconds:,.0f} tokens/s")
    return seconds


def _probe_teacher(teacher: Teacher, corpus: Corpus, recipe: Recipe) -> Probe:
    """Capture a few sequences as the run would, and time it."""
    count = min(PROBE_SEQUENCES, len(corpus))
    companion = Companion({}, None)
    if recipe.needs_states or recipe.layers:
        first = corpus.take(teacher, 0, count, lambda done: None)
        companion = fit_companion(teacher, first, recipe)
    begin = time.perf_counter()
    asked = corpus.requests(0, count)
    if asked is not None:
        sequences, arrays = teacher.speak_and_score(*asked, recipe, companion.bases)
    else:
        sequences = corpus.take(teacher, 0, count, lambda done: None)
        arrays = teacher.score(sequences, recipe, companion.bases)
    seconds = time.perf_counter() - begin
    targets = typed(
        arrays, recipe, teacher.info.vocab_size, companion.bases.get("final"), companion.head
    )
    tokens, lengths = padded(sequences)
    return Probe(
        sequences,
        seconds / max(1, int(lengths.sum())),
        teacher.memory(),
        Batch(tokens, lengths, targets),
    )


def _probe_student(student: Student, batch: Batch, config: RunConfig) -> float:
    """Seconds of one optimizer step on a batch of the run's size."""
    rows, device = slice(0, config.train.batch_size), student.device
    count = int((batch.lengths[rows] - 1).sum())
    small = Batch(
        batch.tokens[rows], batch.lengths[rows], batch.targets.select(slice(0, count))
    ).to(device)
    objective = Objective(config.loss)
    optimizer = build_optimizer(student, config.train, student.config.hidden_size)
    narrow = choose_precision(config.train, student.config.hidden_size, device) == "bf16"
    student.checkpoint_activations(bool(config.train.gradient_checkpointing))
    times = []
    for _ in range(PROBE_STEPS):
        begin = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=narrow):
            loss, _ = objective(student, small, total=count, share=1.0, fraction=0.5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        objective.after_step()
        times.append(time.perf_counter() - begin)
    return min(times)


def _combine(
    config: RunConfig,
    corpus: Corpus,
    recipe: Recipe,
    teacher: Teacher,
    probe: Probe,
    parameters: int,
    step_seconds: float | None,
    train_memory: int,
) -> Plan:
    """Scale the probe up to the whole run."""
    average = float(np.mean([len(tokens) for tokens in probe.sequences]))
    written = sum(average if item.speaks else len(item.segments[0]) for item in corpus.items)
    each = recipe.bytes_per_position(teacher.info.vocab_size, teacher.info.width) + 4
    held_out = round(config.data.held_out * len(corpus))
    steps = config.train.epochs * -(-(len(corpus) - held_out) // config.train.batch_size)
    sequences = min(config.train.batch_size, len(probe.sequences))
    return Plan(
        tokens=round(written),
        store_bytes=round(written * each),
        store_limit=largest_size(corpus, recipe, teacher),
        capture_seconds=written * probe.seconds_per_token,
        teacher_memory=probe.teacher_bytes,
        parameters=parameters,
        steps=steps,
        train_seconds=None
        if step_seconds is None
        else steps * step_seconds * config.train.batch_size / sequences,
        train_memory=train_memory,
    )


def _print(
    plan: Plan,
    recipe: Recipe,
    title: str,
    student: list[tuple[str, str]],
    teacher: Teacher,
    console: Console,
) -> None:
    table = Table(
        title=f"{teacher.info.name} → {title} SO8T: what a run takes",
        title_justify="left",
        show_header=False,
    )
    width, vocab_size = teacher.info.width, teacher.info.vocab_size
    training = "not measured: this machine has not the memory"
    if plan.train_seconds is not None:
        training = f"about {human_time(plan.train_seconds)}"
    for name, value in (
        ("tokens", f"about {human_count(plan.tokens)}"),
        (
            "soft targets",
            f"{recipe.kind}, {recipe.bytes_per_position(vocab_size, width)} bytes a token",
        ),
        ("disk", f"about {human_bytes(plan.store_bytes)}, at most {human_bytes(plan.store_limit)}"),
        ("capture", f"about {human_time(plan.capture_seconds)}"),
        ("teacher's memory", human_bytes(plan.teacher_memory)),
        *student,
        ("training", f"{plan.steps:,} steps, {training}"),
        ("training's memory", human_bytes(plan.train_memory)),
    ):
        table.add_row(name, value)
    console.rich.print(table)


def _rows_of_base(base: Base, config: RunConfig, info: TeacherInfo) -> list[tuple[str, str]]:
    """The student that is made of a base, and its memory by what that is for, as rows of a
    table."""
    memory = training_memory(base, config, info.vocab_size)
    kind = "NF4, double quantisation" if base.load_in_4bit else "as it is"
    share = memory.trained_numbers / memory.base_numbers
    return [
        (
            "base",
            f"{base.config.model_type}, {human_count(memory.base_numbers)} parameters, {kind}",
        ),
        ("trained", f"{human_count(memory.trained_numbers)} parameters, {share:.2%}"),
        ("layers checkpointed", "yes" if config.train.gradient_checkpointing else "no"),
        *((f"  {name}", size) for name, size in memory_rows(memory)),
    ]


def _rows_of_shape(
    shape: SO8TConfig, config: RunConfig, info: TeacherInfo
) -> list[tuple[str, str]]:
    """A new student as rows of a table."""
    return [
        ("student", describe_parameters(shape, info)),
        *describe_shape(shape),
        ("begins at", BEGINNINGS[config.student.init]),
    ]


def _judge_memory(
    plan: Plan,
    limit: int,
    base: Base | None,
    config: RunConfig,
    info: TeacherInfo,
    console: Console,
) -> None:
    """Say whether training fits into ``limit`` bytes, and if not, what would make it."""
    if plan.train_memory <= limit:
        console.note(f"training fits into {human_bytes(limit)}")
        return
    console.warn(
        f"training takes {human_bytes(plan.train_memory)}, more than {human_bytes(limit)}; what "
        "would help:"
    )
    for way in _ways(plan, limit, base, config, info):
        console.note(way)


def _ways(
    plan: Plan, limit: int, base: Base | None, config: RunConfig, info: TeacherInfo
) -> list[str]:
    if base is not None:
        return how_to_fit(limit, base.config, config, info.vocab_size)
    ways = []
    one = config.train.guard.model_copy(update={"snapshots": 1})
    fewer = config.model_copy(update={"train": config.train.model_copy(update={"guard": one})})
    saved = snapshot_bytes(config, plan.parameters) - snapshot_bytes(fewer, plan.parameters)
    if saved:
        ways.append(f"train.guard.snapshots=1 saves {human_bytes(saved)}")
    if not config.train.gradient_checkpointing:
        ways.append(
            "train.gradient_checkpointing=true keeps the input of each layer only, for a third "
            "more time"
        )
    if config.train.accumulation < config.train.batch_size:
        ways.append(f"train.accumulation={config.train.batch_size} computes one sequence at a time")
    return [*ways, "a smaller --student-size"]


def describe_shape(shape: SO8TConfig) -> list[tuple[str, str]]:
    """The student's shape in words, as rows of a table."""
    matrices = "one matrix" if shape.tie_word_embeddings else "two matrices"
    return [
        ("width, layers", f"{shape.hidden_size}, {shape.num_hidden_layers}"),
        ("heads", f"{shape.num_attention_heads}"),
        ("key/value heads", f"{shape.num_key_value_heads}"),
        ("head width", f"{shape.head_dim}"),
        ("feed-forward width", f"{shape.intermediate_size}"),
        ("context", f"{shape.max_position_embeddings:,} tokens"),
        ("embedding and output", f"{matrices}, {shape.vocab_size:,} tokens"),
    ]
