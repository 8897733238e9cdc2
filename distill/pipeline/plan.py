"""``distill plan``: what a run will take, measured on a short probe before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.table import Table

from distill.base_models.base_model import load_base_student
from distill.base_models.memory_advice import how_to_fit
from distill.base_models.memory_check import describe_base, memory_rows
from distill.base_models.memory_estimate import TrainingMemory, memory_of
from distill.base_models.new_student_memory import memory_of_new
from distill.capture.capture import load_teacher, read_data
from distill.capture.corpus import Corpus
from distill.capture.store_setup import recipe_for
from distill.capture.teachers import gguf_of, tokenizer_of, weights_of
from distill.config.schema import RunConfig
from distill.errors import UserError
from distill.initialization.shape import describe_parameters
from distill.metrics.closeness import BOUNDS
from distill.pipeline.disk import (
    Disk,
    StudentNumbers,
    TeacherFiles,
    checkpoint_bytes,
    run_files,
    teacher_files,
)
from distill.pipeline.memory import TRAINING, WORKER_BYTES, Models, Peak, own_memory, stage_peaks
from distill.pipeline.preflight import Inputs, check_plan
from distill.pipeline.probes import (
    TeacherProbe,
    probe_teacher,
    sequences_together,
    step_seconds,
)
from distill.pipeline.resolve import Resolved, resolve
from distill.reports.verdict import expected_words
from distill.runs.folder import RUNS
from distill.runs.records import read_records
from distill.runtime.device import device_memory, free_device_memory, training_device
from distill.runtime.format import human_bytes, human_count, human_time
from distill.runtime.printable import markup
from distill.runtime.progress import Console
from distill.trimming.for_student import fitted
from students.model.build import build_student
from students.model.config import SO8TConfig
from students.model.interface import Student
from teachers.base import TeacherInfo

INITIALIZATIONS = {
    "teacher": "the teacher's weights",
    "embeddings": "random weights, the teacher's token embeddings",
    "random": "random weights",
}


@dataclass(frozen=True)
class TrainingProbe:
    """The student's numbers, the memory that training takes, seconds of an optimizer step on the
    first sequences of the teacher's probe.

    ``step_seconds``: not known of a student that does not fit where it would train. ``rows``: the
    student as rows of a table.
    """

    numbers: StudentNumbers
    memory: TrainingMemory
    step_seconds: float | None
    rows: list[tuple[str, str]]


@dataclass(frozen=True)
class Plan:
    """What a run will take; times in seconds, sizes in bytes; parameters as exported.

    ``trained_share``: of the tokens; ``trained_tokens``: over all epochs. ``disk``: what it leaves,
    of which ``store_bytes`` soft targets, ``store_limit`` at most. ``peaks``: memory by stage.
    ``train_seconds``: see ``TrainingProbe.step_seconds``.
    """

    tokens: int
    trained_share: float
    trained_tokens: float
    store_bytes: int
    store_limit: int
    disk: Disk
    capture_seconds: float
    peaks: dict[str, Peak]
    parameters: int
    steps: int
    train_seconds: float | None


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
    device = training_device()
    free = free_device_memory(device)
    data = inputs.take_data()
    with (
        TemporaryDirectory() as folder,
        load_teacher(config, console) as whole,
        fitted(whole, config, data, Path(folder), console) as teacher,
    ):
        info, gguf = teacher.info, gguf_of(teacher)
        # What cannot be is refused before anything is measured.
        tokenizer = {}
        if config.student.base is not None:
            assert gguf is not None, "see require_gguf"
            tokenizer = tokenizer_of(config.teacher, gguf)
        resolved = resolve(config, info, tokenizer, weights_of(teacher), console)
        corpus = read_data(config, teacher, console, data)
        resolved = resolved.with_length(corpus.sampling.max_length)
        config = resolved.config
        if resolved.base is not None:
            describe_base(resolved.base, config, info.vocab_size, console)
        recipe = recipe_for(config.targets, teacher, corpus, console)
        with console.stage("Probe teacher", total=100) as stage:
            probe = probe_teacher(teacher, corpus, recipe, stage)
            files = teacher_files(teacher, gguf, probe, len(corpus))
            stage.finish(f"{1 / probe.seconds_per_token:,.0f} tokens/s")
        on_device = max(0, free - free_device_memory(device))
    process = own_memory()
    student = _probe_student(resolved, info, probe, console)
    weights = 0 if on_device else info.file_bytes
    models = Models(
        process=process,
        teacher=probe.memory_bytes,
        on_device=on_device,
        worker=max(WORKER_BYTES, probe.memory_bytes - weights),
        training=student.memory,
        exported=student.numbers.exported,
        vocab_size=info.vocab_size,
        longest=corpus.sampling.max_length,
        scored=round(config.data.held_out * len(corpus)) * corpus.sampling.max_length,
    )
    plan = _combine(config, corpus, probe, files, student, stage_peaks(models, config))
    title = f"{info.name} → {config.student.label} SO8T: what a run takes"
    targets = f"{recipe.kind}, {probe.position_bytes} bytes a token trained on"
    _print(plan, title, targets, student.rows, console)
    for words in _closeness(config, info, plan, console):
        console.note(words)
    if memory is not None:
        _judge_memory(plan, memory, resolved, info, console)
    return plan


def _probe_student(
    resolved: Resolved, info: TeacherInfo, probe: TeacherProbe, console: Console
) -> TrainingProbe:
    config, base, shape = resolved.config, resolved.base, resolved.shape
    if base is None:
        assert shape is not None
        memory = memory_of_new(shape, config)
        numbers = StudentNumbers(memory.base_numbers, memory.trained_numbers)
        rows = _rows_of_shape(shape, info)
        rows.append(("starts from", INITIALIZATIONS[config.student.init]))
    else:
        memory = memory_of(base.config, config, info.vocab_size)
        numbers = StudentNumbers(memory.base_numbers, memory.trained_numbers, base.dtype.itemsize)
        rows = _rows_of_base(resolved, memory)
    rows += [(f"  {name}", size) for name, size in memory_rows(memory)]
    device = training_device()
    if memory.total > device_memory(device)[0]:
        return TrainingProbe(numbers, memory, None, rows)
    student: Student
    if base is not None:
        student = load_base_student(base, config, info.vocab_size)
    else:
        assert shape is not None
        student = build_student(shape, config.seed).to(device)
    return TrainingProbe(numbers, memory, _time_steps(student, probe, config, console), rows)


def _time_steps(
    student: Student, probe: TeacherProbe, config: RunConfig, console: Console
) -> float:
    """Seconds of an optimizer step."""
    with console.stage("Probe student") as stage:
        seconds = step_seconds(student, probe, config)
        count = probe.batch.lengths[: config.train.batch_size].sum().item()
        stage.finish(f"{count / seconds:,.0f} tokens/s")
    return seconds


def _combine(
    config: RunConfig,
    corpus: Corpus,
    probe: TeacherProbe,
    files: TeacherFiles,
    student: TrainingProbe,
    peaks: dict[str, Peak],
) -> Plan:
    """Scale the probes up to the whole run."""
    tokens = probe.length * corpus.spoken + corpus.tally.tokens
    learnt = probe.kept_share * (tokens - len(corpus))  # no sequence's first token
    batch_size = sequences_together(config, probe)
    validation = round(config.data.held_out * len(corpus))
    steps = config.train.epochs * -(-(len(corpus) - validation) // batch_size)
    seconds = student.step_seconds
    if seconds is not None:  # of a step on the probe's sequences, which may be fewer or shorter
        measured = probe.batch.lengths[:batch_size].sum().item()
        seconds *= steps * batch_size * tokens / len(corpus) / measured
    targets = round(tokens * (probe.kept_share * probe.position_bytes + 4))
    exports, records = run_files(config, files, student.numbers, steps, tokens)
    checkpoints = checkpoint_bytes(config, student.numbers, steps, seconds)
    return Plan(
        tokens=round(tokens),
        trained_share=learnt / tokens,
        trained_tokens=config.train.epochs * learnt * (1 - config.data.held_out),
        store_bytes=targets,
        store_limit=probe.store_limit,
        disk=Disk(targets, files.kept, checkpoints, exports, records),
        capture_seconds=tokens * probe.seconds_per_token,
        peaks=peaks,
        parameters=student.numbers.exported,
        steps=steps,
        train_seconds=seconds,
    )


def _closeness(config: RunConfig, info: TeacherInfo, plan: Plan, console: Console) -> list[str]:
    """How close the student may come, by the newest finished run of this teacher and size here; and
    the levels' bounds."""
    bounds = f"levels: {BOUNDS} (docs/verdict.md)"
    for path in sorted(RUNS.glob("*/results.json"), key=lambda one: -one.stat().st_mtime):
        try:
            records = read_records(path.parent)
        except UserError as error:
            console.note(f"{error}; not looked at for a forecast")
            continue
        chosen, theirs = config.student, records.config.get("student", {})
        same = (theirs.get("size"), theirs.get("base")) == (chosen.size, chosen.base)
        if records.identity.get("teacher_sha256") != info.sha256 or not same:
            continue
        if (words := expected_words(records, plan.trained_tokens)) is not None:
            return [f"closeness: {words} (by the curve of {path.parent})", bounds]
    none = f"no finished run of this teacher and {config.student.label} with a curve in {RUNS}/"
    return [f"closeness: not known, {none}", bounds]


def _print(
    plan: Plan, title: str, targets: str, student: list[tuple[str, str]], console: Console
) -> None:
    table = Table(title=markup(title), title_justify="left", show_header=False)
    training = "not measured: this machine has not the memory"
    if plan.train_seconds is not None:
        training = f"about {human_time(plan.train_seconds)}"
    for name, value in (
        ("tokens", f"about {human_count(plan.tokens)}, {plan.trained_share:.0%} trained on"),
        ("soft targets", targets),
        ("disk", f"about {human_bytes(plan.disk.total)}, of that:"),
        (
            "  store",
            f"soft targets {human_bytes(plan.store_bytes)} (at most "
            f"{human_bytes(plan.store_limit)}), the teacher's own {human_bytes(plan.disk.teacher)}",
        ),
        (
            "  run",
            f"checkpoints {human_bytes(plan.disk.checkpoints)}, the student "
            f"{human_bytes(plan.disk.exports)}, report and logs {human_bytes(plan.disk.records)}",
        ),
        ("capture", f"about {human_time(plan.capture_seconds)}"),
        *student,
        ("training", f"{plan.steps:,} steps, {training}"),
        *_memory_rows(plan.peaks),
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


def _rows_of_base(resolved: Resolved, memory: TrainingMemory) -> list[tuple[str, str]]:
    """The student that is made of a base, and its memory by purpose, as rows of a table."""
    base, config = resolved.base, resolved.config
    assert base is not None
    kind = "NF4, double quantization" if base.load_in_4bit else "as it is"
    numbers, share = memory.base_numbers, memory.trained_numbers / memory.base_numbers
    return [
        ("base", f"{base.config.model_type}, {human_count(numbers)} parameters, {kind}"),
        ("trained", f"{human_count(memory.trained_numbers)} parameters, {share:.2%}"),
        ("layers checkpointed", "yes" if config.train.gradient_checkpointing else "no"),
    ]


def _memory_rows(peaks: dict[str, Peak]) -> list[tuple[str, str]]:
    """The memory of each stage as rows of a table."""
    rows = []
    for name, peak in peaks.items():
        text = human_bytes(peak.main)
        if peak.device:
            text = f"{human_bytes(peak.device)} on the device, {text} of main memory"
        if peak.mapped:
            text += f"; reads {human_bytes(peak.mapped)} of temporary files again and again"
        rows.append((f"  {name}", text))
    return [("memory at most", ""), *rows]


def _judge_memory(
    plan: Plan, limit: int, resolved: Resolved, info: TeacherInfo, console: Console
) -> None:
    """Print whether training fits into ``limit`` bytes where it computes, and if not, what would
    make it."""
    peak, base, shape = plan.peaks[TRAINING], resolved.base, resolved.shape
    needed = peak.device or peak.main
    if needed <= limit:
        console.note(f"training fits into {human_bytes(limit)}")
        return
    console.warn(
        f"training takes {human_bytes(needed)}, more than {human_bytes(limit)}; what would help:"
    )

    def total(config: RunConfig) -> int:
        if base is not None:
            return memory_of(base.config, config, info.vocab_size).total
        assert shape is not None
        return memory_of_new(shape, config).total

    beside = needed - total(resolved.config)  # this process, a teacher that stays open
    for way in how_to_fit(limit, resolved.config, lambda config: total(config) + beside):
        console.note(way)
