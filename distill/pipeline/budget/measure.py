"""A little of everything that a run does, measured before it starts: the teacher, the student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from distill.base_models.base_model import load_base_student
from distill.base_models.memory_check import describe_base, memory_rows
from distill.base_models.memory_estimate import TrainingMemory, memory_of
from distill.base_models.new_student_memory import memory_of_new
from distill.capture.capture import load_teacher, read_data
from distill.capture.corpus import Corpus
from distill.capture.data_rows import DataRows
from distill.capture.store_setup import recipe_for
from distill.capture.teachers import gguf_of, tokenizer_of, weights_of
from distill.config.schema import RunConfig
from distill.heads.prompts import SafetyPrompt, request_tokens
from distill.initialization.from_teacher import fit_work
from distill.initialization.shape import describe_parameters
from distill.pipeline.disk import StudentNumbers, TeacherFiles, teacher_files
from distill.pipeline.memory import own_memory
from distill.pipeline.probes import (
    STUDENT_SECONDS,
    TEACHER_SECONDS,
    TeacherProbe,
    probe_teacher,
    reading_seconds,
    scoring_seconds,
    step_seconds,
)
from distill.pipeline.resolve import Resolved, resolve
from distill.runtime.device import device_memory, free_device_memory, training_device
from distill.runtime.format import human_count
from distill.runtime.progress import Console
from distill.trimming.for_student import fitted, with_cut_base
from students.model.build import build_student
from students.model.config import SO8TConfig
from students.model.interface import Student
from teachers.base import TeacherInfo
from teachers.gguf.file import read_gguf
from teachers.reduced import cut_of
from teachers.targets.recipe import Recipe

PROMPTS_APART = 97  # every so many-th of the safety head's prompts is measured
PROBE_SHARE = 0.03  # of a budget may go into each probe
INITIALIZATIONS = {
    "teacher": "the teacher's weights",
    "embeddings": "random weights, the teacher's token embeddings",
    "random": "random weights",
}


@dataclass(frozen=True)
class TrainingProbe:
    """The student's numbers, the memory that training takes, seconds of a token in an optimizer
    step, in a scoring, and where only the layers compute.

    These are not known of a student that does not fit where it would train. ``rows``: the student
    as rows of a table.
    """

    numbers: StudentNumbers
    memory: TrainingMemory
    step_seconds: float | None
    scoring_seconds: float | None
    reading_seconds: float | None
    rows: list[tuple[str, str]]


@dataclass(frozen=True)
class Measured:
    """What the probes found. ``fit_work``: operations of the first weights, where they are the
    teacher's; ``process``: this process's memory without a student, ``on_device``: the teacher's on
    the device. ``prompt_length``: tokens of one of the safety head's prompts, on average."""

    resolved: Resolved
    info: TeacherInfo
    fit_work: float
    corpus: Corpus
    recipe: Recipe
    probe: TeacherProbe
    files: TeacherFiles
    student: TrainingProbe
    process: int
    on_device: int
    prompt_length: float

    @property
    def config(self) -> RunConfig:
        return self.resolved.config


def measure(
    config: RunConfig,
    data: DataRows | None,
    console: Console,
    budget: float | None = None,
    prompts: Sequence[SafetyPrompt] | None = None,
) -> Measured:
    """Probe teacher and student; ``budget``: seconds of which only a part may go into that;
    ``prompts``: of the safety head, whose length is then known.

    Raises:
        UserError, TeacherFileError, TeacherError, CaptureError: the input cannot be used.
    """
    share = None if budget is None else PROBE_SHARE * budget
    free = free_device_memory(device := training_device())
    with TemporaryDirectory() as folder:  # a base that was cut is read from it at the end
        with (
            load_teacher(config, console) as whole,
            fitted(whole, config, data, Path(folder), console) as teacher,
        ):
            info, gguf = teacher.info, gguf_of(teacher)
            # What cannot be is refused before anything is measured.
            tokenizer = {}
            if config.student.base is not None:
                assert gguf is not None, "see require_gguf"
                tokenizer = tokenizer_of(config.teacher, gguf)
                config = with_cut_base(config, cut_of(teacher), Path(folder))
            corpus = read_data(config, teacher, console, data)
            resolved = resolve(config, info, tokenizer, weights_of(teacher), console)
            resolved = resolved.with_length(corpus.sampling.max_length)
            config = resolved.config
            if resolved.base is not None:
                describe_base(resolved.base, config, info.vocab_size, console)
            recipe = recipe_for(config.targets, teacher, corpus, console)
            work, weights = 0.0, weights_of(teacher)
            if config.student.init == "teacher" and resolved.shape is not None:
                assert weights is not None
                work = fit_work(resolved.shape, read_gguf(weights))
            with console.stage("Probe teacher", total=100) as stage:
                most = TEACHER_SECONDS if share is None else min(share, TEACHER_SECONDS)
                probe = probe_teacher(teacher, corpus, recipe, stage, most)
                files = teacher_files(teacher, gguf, probe, len(corpus))
                stage.finish(f"{1 / probe.seconds_per_token:,.0f} tokens/s")
            on_device = max(0, free - free_device_memory(device))
            some = [prompt.text for prompt in (prompts or [])[::PROMPTS_APART]]
            lengths = [len(tokens) for tokens in request_tokens(teacher, some)] if some else [0]
        process = own_memory()
        most = STUDENT_SECONDS if share is None else min(share, STUDENT_SECONDS)
        student = _probe_student(resolved, info, probe, console, most)
    return Measured(
        resolved=resolved,
        info=info,
        fit_work=work,
        corpus=corpus,
        recipe=recipe,
        probe=probe,
        files=files,
        student=student,
        process=process,
        on_device=on_device,
        prompt_length=sum(lengths) / len(lengths),
    )


def _probe_student(
    resolved: Resolved, info: TeacherInfo, probe: TeacherProbe, console: Console, most: float
) -> TrainingProbe:
    """``most``: seconds that it may take, about."""
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
        return TrainingProbe(numbers, memory, None, None, None, rows)
    student: Student
    if base is not None:
        student = load_base_student(base, config, info.vocab_size)
    else:
        assert shape is not None
        student = build_student(shape, config.seed).to(device)
    with console.stage("Probe student") as stage:
        reading = scoring_seconds(student, probe.batch)
        layers = reading_seconds(student)
        seconds = step_seconds(student, probe.batch, config, most)
        stage.finish(f"{1 / seconds:,.0f} tokens/s")
    return TrainingProbe(numbers, memory, seconds, reading, layers, rows)


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
