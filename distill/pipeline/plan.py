"""``distill plan``: what a run will take, measured on a short probe before it starts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from rich.table import Table

from distill.base_models.memory_advice import how_to_fit
from distill.base_models.memory_estimate import memory_of
from distill.base_models.new_student_memory import memory_of_new
from distill.capture.corpus import Corpus
from distill.config.schema import RunConfig
from distill.errors import UserError
from distill.heads.prompts import SafetyPrompt
from distill.metrics.closeness import BOUNDS
from distill.pipeline.budget.budget import budget_table, recommend, with_allocation
from distill.pipeline.budget.measure import Measured, TrainingProbe, measure
from distill.pipeline.budget.teacher_copy import TeacherCopy, faster_copy, with_copy
from distill.pipeline.disk import Disk, TeacherFiles, checkpoint_bytes, run_files
from distill.pipeline.memory import TRAINING, WORKER_BYTES, Models, Peak, stage_peaks
from distill.pipeline.preflight import Inputs, check_plan
from distill.pipeline.probes import TeacherProbe, sequences_together
from distill.pipeline.resolve import Resolved
from distill.reports.verdict import expected_words
from distill.runs.folder import RUNS
from distill.runs.records import read_records
from distill.runtime.format import human_bytes, human_count, human_time
from distill.runtime.printable import markup
from distill.runtime.progress import Console
from teachers.base import TeacherInfo

AS_LONG_AGAIN = 1.15  # a run starts and probes as this has, then loads the teacher once more


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
    config: RunConfig,
    console: Console,
    memory: int | None = None,
    inputs: Inputs | None = None,
    budget: float | None = None,
) -> Plan:
    """Measure a little of everything and print what the whole will take; nothing is written.

    ``memory``: bytes that training is to fit into; where it does not, what would help is printed.
    ``inputs``: what ``check_plan`` has read, if it was called. ``budget``: seconds, for which
    samples and epochs are recommended.

    Raises:
        UserError, TeacherFileError, TeacherError, CaptureError: the input cannot be used.
    """
    inputs = inputs or check_plan(config, budget=budget)
    measured = measure(config, inputs.take_data(), console, budget, inputs.prompts)
    copy = faster_copy(measured, console)
    if budget is not None:
        measured = _within(budget, measured, copy, inputs.prompts, console)
    config, info, corpus, student = (
        measured.config,
        measured.info,
        measured.corpus,
        measured.student,
    )
    probe, resolved = measured.probe, measured.resolved
    weights = 0 if measured.on_device else info.file_bytes
    models = Models(
        process=measured.process,
        teacher=probe.memory_bytes,
        on_device=measured.on_device,
        worker=max(WORKER_BYTES, probe.memory_bytes - weights),
        training=student.memory,
        exported=student.numbers.exported,
        vocab_size=info.vocab_size,
        longest=corpus.sampling.max_length,
        scored=round(config.data.held_out * len(corpus)) * corpus.sampling.max_length,
    )
    plan = _combine(config, corpus, probe, measured.files, student, stage_peaks(models, config))
    title = f"{info.name} → {config.student.label} SO8T: what a run takes"
    targets = f"{measured.recipe.kind}, {probe.position_bytes} bytes a token trained on"
    _print(plan, title, targets, student.rows, console)
    if copy is not None:
        words = f"{copy.faster:.1f} times as fast with {copy.setting}, which takes {copy.takes}"
        console.note(f"capture {'would be' if budget is None else 'is'} {words}")
    for words in _closeness(config, info, plan, console):
        console.note(words)
    if memory is not None:
        _judge_memory(plan, memory, resolved, info, console)
    return plan


def _within(
    budget: float,
    measured: Measured,
    copy: TeacherCopy | None,
    prompts: list[SafetyPrompt] | None,
    console: Console,
) -> Measured:
    """The same for as much text as fits into ``budget`` seconds, which is printed."""
    measured = measured if copy is None else with_copy(measured, copy)
    allocation, _ = recommend(measured, budget, prompts, AS_LONG_AGAIN * console.elapsed())
    console.rich.print(budget_table(allocation, budget, copy))
    config = with_allocation(measured.config, allocation)
    corpus = measured.corpus
    some = itertools.islice(itertools.cycle(corpus.items), allocation.samples)
    return replace(
        measured,
        resolved=replace(measured.resolved, config=config),
        corpus=Corpus(list(some), corpus.sampling, corpus.notes, corpus.warnings),
    )


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
    batch_size = sequences_together(config, probe.batch)
    validation = round(config.data.held_out * len(corpus))
    steps = config.train.epochs * -(-(len(corpus) - validation) // batch_size)
    steps = min(steps, config.train.steps or steps)
    seconds = student.step_seconds
    if seconds is not None:
        seconds *= steps * batch_size * tokens / len(corpus)
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
