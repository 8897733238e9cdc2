"""``distill plan``: what a run will take, measured on a short probe before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from rich.table import Table

from distill.base_models.base_model import load_base_student
from distill.base_models.memory_advice import how_to_fit, how_to_fit_new
from distill.base_models.memory_check import available_memory, describe_base
from distill.base_models.memory_estimate import (
    AdapterMemory,
    memory_of,
    memory_rows,
    snapshot_bytes,
)
from distill.capture.capture import load_teacher, read_data
from distill.capture.corpus import Corpus
from distill.capture.store_setup import largest_size, recipe_for
from distill.capture.teachers import find_gguf, tokenizer_of
from distill.config.schema import RunConfig
from distill.initialization.shape import describe_parameters
from distill.losses.batch import Batch, arrange, padded
from distill.losses.objective import Objective
from distill.pipeline.preflight import Inputs, check_plan
from distill.pipeline.resolve import Resolved, resolve
from distill.runtime.device import choose_precision
from distill.runtime.format import human_bytes, human_count, human_time
from distill.runtime.printable import markup
from distill.runtime.progress import Console
from distill.training.optimizer import build_optimizer
from students.model.build import build_student
from students.model.config import SO8TConfig
from students.model.interface import Student
from students.model.sizes import decoder_parameters
from teachers.base import Teacher, TeacherInfo, whole_masks
from teachers.store.capture import fit_shared_codec
from teachers.store.shared import SharedCodec
from teachers.targets.recipe import Recipe
from teachers.targets.stored_arrays import typed

PROBE_SEQUENCES = 32
PROBE_STEPS = 3
INITIALIZATIONS = {
    "teacher": "the teacher's weights",
    "embeddings": "random weights, the teacher's token embeddings",
    "random": "random weights",
}


@dataclass(frozen=True)
class TeacherProbe:
    """What was measured of the teacher on the sequences of a batch, and what its store takes: bytes
    of a position, and of the whole at most; the share of positions that is kept."""

    batch: Batch
    seconds_per_token: float
    memory_bytes: int
    position_bytes: int
    store_limit: int
    kept_share: float


@dataclass(frozen=True)
class TrainingProbe:
    """Parameters as exported, the memory that training takes, seconds of an optimizer step.

    ``step_seconds``: not known for a base that this machine has not the memory for. ``rows``: the
    student as rows of a table.
    """

    parameters: int
    memory_bytes: int
    step_seconds: float | None
    rows: list[tuple[str, str]]


@dataclass(frozen=True)
class Plan:
    """What a run will take; times in seconds, sizes in bytes; parameters as exported.

    ``train_seconds``: see ``TrainingProbe.step_seconds``.
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

    ``memory``: bytes that training is to fit into; where it does not, what would help is printed.
    ``inputs``: what ``check_plan`` has read, if it was called.

    Raises:
        UserError, TeacherFileError, TeacherError, CaptureError: the input cannot be used.
    """
    inputs = inputs or check_plan(config)
    with load_teacher(config, console) as teacher:
        info = teacher.info
        # What cannot be is refused before anything is measured.
        tokenizer = {} if config.student.base is None else tokenizer_of(config.teacher)
        resolved = resolve(config, info, tokenizer, find_gguf(config.teacher), console)
        corpus = read_data(config, teacher, console, inputs.take_data())
        resolved = resolved.with_length(corpus.sampling.max_length)
        config = resolved.config
        if resolved.base is not None:
            describe_base(resolved.base, config, info.vocab_size, console)
        recipe = recipe_for(config.targets, teacher, corpus, console)
        with console.stage("Probe teacher") as stage:
            probe = _probe_teacher(teacher, corpus, recipe)
            stage.finish(f"{1 / probe.seconds_per_token:,.0f} tokens/s")
    student = _probe_student(resolved, info, probe.batch, console)
    plan = _combine(config, corpus, probe, student)
    title = f"{info.name} → {config.student.label} SO8T: what a run takes"
    targets = f"{recipe.kind}, {probe.position_bytes} bytes a token"
    _print(plan, title, targets, student.rows, console)
    if memory is not None:
        _judge_memory(plan, memory, resolved, info, console)
    return plan


def _probe_student(
    resolved: Resolved, info: TeacherInfo, batch: Batch, console: Console
) -> TrainingProbe:
    config, base, shape = resolved.config, resolved.base, resolved.shape
    if base is None:
        assert shape is not None
        parameters = decoder_parameters(shape)
        seconds = _time_steps(build_student(shape, config.seed), batch, config, console)
        memory = psutil.Process().memory_info().rss + snapshot_bytes(config, parameters)
        rows = _rows_of_shape(shape, info)
        rows.append(("starts from", INITIALIZATIONS[config.student.init]))
        return TrainingProbe(parameters, memory, seconds, rows)
    needed = memory_of(base.config, config, info.vocab_size)
    rows = _rows_of_base(resolved, needed)
    if needed.total > available_memory()[0]:
        return TrainingProbe(needed.base_numbers, needed.total, None, rows)
    adapted = load_base_student(base, config, info.vocab_size)
    seconds = _time_steps(adapted, batch, config, console)
    return TrainingProbe(needed.base_numbers, needed.total, seconds, rows)


def _time_steps(student: Student, batch: Batch, config: RunConfig, console: Console) -> float:
    """Seconds of an optimizer step."""
    with console.stage("Probe student") as stage:
        seconds = _fastest_step(student, batch, config)
        stage.finish(f"{batch.count() / seconds:,.0f} tokens/s")
    return seconds


def _probe_teacher(teacher: Teacher, corpus: Corpus, recipe: Recipe) -> TeacherProbe:
    """Capture a few sequences as the run would, and time it."""
    count = min(PROBE_SEQUENCES, len(corpus))
    shared_codec = SharedCodec({}, None)
    keep = corpus.keep(0, count)
    if recipe.needs_states or recipe.layers:
        first = corpus.take(teacher, 0, count, lambda done: None)
        shared_codec = fit_shared_codec(teacher, first, recipe, keep)
    start = time.perf_counter()
    request = corpus.generation_request(0, count)
    if request is not None:
        sequences, arrays = teacher.generate_and_score(request, recipe, shared_codec.bases)
    else:
        sequences = corpus.take(teacher, 0, count, lambda done: None)
        arrays = teacher.score(sequences, recipe, shared_codec.bases, keep=keep)
    seconds = time.perf_counter() - start
    targets = typed(
        arrays, recipe, teacher.info.vocab_size, shared_codec.bases.get("final"), shared_codec.head
    )
    tokens, lengths = padded(sequences)
    masks = None if keep is None else np.concatenate(whole_masks(sequences, keep))
    kept = None if masks is None else torch.from_numpy(masks)
    batch = Batch(tokens, lengths, targets, keep=kept)
    return TeacherProbe(
        batch,
        seconds / max(1, int(lengths.sum())),
        teacher.memory(),
        recipe.bytes_per_position(teacher.info.vocab_size, teacher.info.width),
        largest_size(corpus, recipe, teacher),
        batch.count() / int((lengths - 1).sum()),
    )


def _fastest_step(student: Student, batch: Batch, config: RunConfig) -> float:
    """Seconds of one optimizer step on a batch of the run's size."""
    device, lengths = student.device, batch.lengths[: _sequences_together(config, batch)].tolist()
    rows = [row[:length].numpy() for row, length in zip(batch.tokens, lengths, strict=False)]
    count = sum(lengths) - len(lengths)
    keep = None if batch.keep is None else batch.keep[:count]
    count = count if keep is None else int(keep.sum())
    tokens, sizes, rooms = arrange(rows, student.packs)
    targets = batch.targets.select(slice(0, count))
    small = Batch(tokens, sizes, targets, rooms=rooms, keep=keep).to(device)
    objective = Objective(config.loss)
    optimizer = build_optimizer(student, config.train, student.config.hidden_size)
    narrow = choose_precision(config.train, student.config.hidden_size, device) == "bf16"
    student.checkpoint_activations(bool(config.train.gradient_checkpointing))
    times = []
    for _ in range(PROBE_STEPS):
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=narrow):
            loss, _ = objective(student, small, total=count, share=1.0, fraction=0.5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        objective.after_step()
        times.append(time.perf_counter() - start)
    return min(times)


def _sequences_together(config: RunConfig, batch: Batch) -> int:
    """How many sequences an optimizer step learns from, if they are as long as the batch's."""
    if config.train.batch_tokens is None:
        return config.train.batch_size
    return max(1, round(config.train.batch_tokens * len(batch.lengths) / int(batch.lengths.sum())))


def _combine(
    config: RunConfig, corpus: Corpus, teacher: TeacherProbe, student: TrainingProbe
) -> Plan:
    """Scale the probes up to the whole run."""
    lengths = teacher.batch.lengths
    average = float(np.mean(lengths.numpy()))
    tokens = sum(average if item.speaks else len(item.segments[0]) for item in corpus.items)
    batch_size = _sequences_together(config, teacher.batch)
    validation = round(config.data.held_out * len(corpus))
    steps = config.train.epochs * -(-(len(corpus) - validation) // batch_size)
    seconds = student.step_seconds
    if seconds is not None:
        seconds = steps * seconds * batch_size / min(batch_size, len(lengths))
    return Plan(
        tokens=round(tokens),
        store_bytes=round(tokens * (teacher.kept_share * teacher.position_bytes + 4)),
        store_limit=teacher.store_limit,
        capture_seconds=tokens * teacher.seconds_per_token,
        teacher_memory=teacher.memory_bytes,
        parameters=student.parameters,
        steps=steps,
        train_seconds=seconds,
        train_memory=student.memory_bytes,
    )


def _print(
    plan: Plan, title: str, targets: str, student: list[tuple[str, str]], console: Console
) -> None:
    table = Table(title=markup(title), title_justify="left", show_header=False)
    training = "not measured: this machine has not the memory"
    if plan.train_seconds is not None:
        training = f"about {human_time(plan.train_seconds)}"
    for name, value in (
        ("tokens", f"about {human_count(plan.tokens)}"),
        ("soft targets", targets),
        ("disk", f"about {human_bytes(plan.store_bytes)}, at most {human_bytes(plan.store_limit)}"),
        ("capture", f"about {human_time(plan.capture_seconds)}"),
        ("teacher's memory", human_bytes(plan.teacher_memory)),
        *student,
        ("training", f"{plan.steps:,} steps, {training}"),
        ("training's memory", human_bytes(plan.train_memory)),
    ):
        table.add_row(name, markup(value))
    console.rich.print(table)


def _rows_of_shape(shape: SO8TConfig, info: TeacherInfo) -> list[tuple[str, str]]:
    """A new student as rows of a table."""
    matrices = "one matrix" if shape.tie_word_embeddings else "two matrices"
    return [
        ("student", describe_parameters(shape, info)),
        ("width, layers", f"{shape.hidden_size}, {shape.num_hidden_layers}"),
        ("heads", f"{shape.num_attention_heads}"),
        ("key/value heads", f"{shape.num_key_value_heads}"),
        ("head width", f"{shape.head_dim}"),
        ("feed-forward width", f"{shape.intermediate_size}"),
        ("context", f"{shape.max_position_embeddings:,} tokens"),
        ("embedding and output", f"{matrices}, {shape.vocab_size:,} tokens"),
    ]


def _rows_of_base(resolved: Resolved, memory: AdapterMemory) -> list[tuple[str, str]]:
    """The student that is made of a base, and its memory by purpose, as rows of a table."""
    base, config = resolved.base, resolved.config
    assert base is not None
    kind = "NF4, double quantization" if base.load_in_4bit else "as it is"
    numbers, share = memory.base_numbers, memory.trained_numbers / memory.base_numbers
    return [
        ("base", f"{base.config.model_type}, {human_count(numbers)} parameters, {kind}"),
        ("trained", f"{human_count(memory.trained_numbers)} parameters, {share:.2%}"),
        ("layers checkpointed", "yes" if config.train.gradient_checkpointing else "no"),
        *((f"  {name}", size) for name, size in memory_rows(memory)),
    ]


def _judge_memory(
    plan: Plan, limit: int, resolved: Resolved, info: TeacherInfo, console: Console
) -> None:
    """Print whether training fits into ``limit`` bytes, and if not, what would make it."""
    if plan.train_memory <= limit:
        console.note(f"training fits into {human_bytes(limit)}")
        return
    console.warn(
        f"training takes {human_bytes(plan.train_memory)}, more than {human_bytes(limit)}; what "
        "would help:"
    )
    if resolved.base is not None:
        ways = how_to_fit(limit, resolved.base.config, resolved.config, info.vocab_size)
    else:
        ways = how_to_fit_new(resolved.config, plan.parameters)
    for way in ways:
        console.note(way)
