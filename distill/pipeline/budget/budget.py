"""A run within a time: samples and epochs before it starts, the number of steps before it trains.

The clock begins with the command. What was decided is in the run's settings and its
``decisions.json``, so that a run that is continued decides nothing again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.table import Table

from distill.capture.data_rows import DataRows
from distill.config.schema import LossConfig, RunConfig
from distill.errors import UserError
from distill.evaluation.scorers import other_weights
from distill.heads.prompts import SafetyPrompt
from distill.heads.safety_data import SafetyData
from distill.heads.safety_fitting import fitting_time, fitting_within, reading_flops
from distill.losses.objective import Objective
from distill.pipeline.budget.allocation import (
    Allocation,
    Costs,
    TooShort,
    allocate,
    in_smaller_steps,
    stages,
    steps_within,
)
from distill.pipeline.budget.costs import (
    SAFETY_SHARE,
    expected_costs,
    text_in,
    text_of,
    with_measured,
)
from distill.pipeline.budget.measure import Measured, measure
from distill.pipeline.budget.teacher_copy import TeacherCopy, faster_copy, with_copy
from distill.pipeline.probes import step_seconds
from distill.pipeline.resolve import Resolved
from distill.runtime.device import choose_precision
from distill.runtime.format import human_time
from distill.runtime.progress import Console
from distill.training.data import TrainingData, load_batch
from distill.training.distributed import TrainingModule
from distill.training.embedding_rows import only_used_rows
from distill.training.validation import validation_score
from students.model.interface import Student

BEFORE = ("start", "capture", "head start")  # stages that are over when the steps are fixed
AGAIN = ("Load teacher", "Read data", "Vocabulary")  # what the run does once more after the probes
PROBED_STEPS, PROBED_SHARE = 8.0, 0.025  # seconds that the very student's steps are timed for


@dataclass(frozen=True)
class Budget:
    """``seconds`` of a whole run, and its expected costs."""

    seconds: float
    costs: Costs

    def to_json(self) -> dict[str, Any]:
        """As it is recorded."""
        return {"seconds": self.seconds, "costs": asdict(self.costs)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Budget:
        """As it was recorded."""
        return cls(float(content["seconds"]), Costs(**content["costs"]))


def recommend(
    measured: Measured, seconds: float, prompts: Sequence[SafetyPrompt] | None, start: float
) -> tuple[Allocation, Costs]:
    """Samples, epochs and steps that fill ``seconds``, and what was reckoned with; ``start``:
    seconds until the capture begins.

    Raises:
        UserError: there is no such run.
    """
    if measured.student.step_seconds is None:
        raise UserError("--budget: this machine has not the memory to train that student")
    costs = expected_costs(measured, prompts, start, seconds)
    try:
        allocation = allocate(seconds, text_of(measured), costs)
    except TooShort as error:
        raise UserError(
            f"--budget: {human_time(seconds)} are too short for this teacher and student; {error}"
        ) from None
    train = measured.config.train
    if not train.model_fields_set & {"batch_size", "batch_tokens"}:
        allocation = in_smaller_steps(allocation, train.batch_size)
    return allocation, costs


def settle(
    config: RunConfig,
    seconds: float,
    data: DataRows | None,
    prompts: Sequence[SafetyPrompt] | None,
    console: Console,
) -> tuple[RunConfig, Budget]:
    """The settings with as much text as fits into ``seconds``, and what that is expected to cost.

    Raises:
        UserError, TeacherFileError, TeacherError, CaptureError: the input cannot be used, or
        there is no such run.
    """
    measured = measure(config, data, console, seconds, prompts)
    if (copy := faster_copy(measured, console)) is not None:
        measured = with_copy(measured, copy)
    start = console.elapsed() + sum(console.seconds.get(stage, 0.0) for stage in AGAIN)
    allocation, costs = recommend(measured, seconds, prompts, start)
    console.rich.print(budget_table(allocation, seconds, copy))
    resolved = measured.config
    size = resolved.student.size or config.student.size
    settled = config.model_copy(
        update={
            "student": config.student.model_copy(update={"size": size}),
            "teacher": config.teacher.model_copy(
                update={"weights_as": resolved.teacher.weights_as}
            ),
        }
    )
    return with_allocation(settled, allocation), Budget(seconds, costs)


def with_allocation(config: RunConfig, allocation: Allocation) -> RunConfig:
    """The settings with samples, epochs and the size of a step; the steps are fixed later."""
    data = config.data.model_copy(update={"samples": allocation.samples})
    size = allocation.together or config.train.batch_size
    train = config.train.model_copy(update={"epochs": allocation.epochs, "batch_size": size})
    return config.model_copy(update={"data": data, "train": train})


def budget_table(allocation: Allocation, seconds: float, copy: TeacherCopy | None = None) -> Table:
    """What fits into a time, where a ``copy`` of the teacher captures or its file."""
    table = Table(title=f"In {human_time(seconds)}", title_justify="left", show_header=False)
    wanted = f"--samples {allocation.samples} --epochs {allocation.epochs}"
    if allocation.together is not None:
        wanted += f" --set train.batch_size={allocation.together}"
    if copy is not None:
        wanted += f" {copy.setting}"
    table.add_row("recommended", f"{wanted} ({allocation.steps:,} steps)")
    for name, part in allocation.seconds.items():
        table.add_row(f"  {name}", f"about {human_time(part)}")
    table.add_row("whole run", f"about {human_time(allocation.total)}")
    if allocation.total < 0.9 * seconds:
        table.add_row("", "there is no more text, and nothing to gain from this one in more time")
    return table


def with_steps(
    budget: Budget,
    resolved: Resolved,
    student: Student,
    data: TrainingData,
    safety: SafetyData | None,
    console: Console,
) -> Resolved:
    """The settings with the number of steps for which there is time left, by what the very student
    takes on the very text, and how many prompts its safety head is fitted to."""
    config, lengths = resolved.config, data.store.lengths()
    batches = data.batches(1, config.train.batch_size)
    text = text_in(config, lengths, -(-len(data.split.train) // len(batches)))
    with console.stage("Fix steps") as stage:
        costs = _costs_of(student, budget, config, data)
        if safety is not None:
            config, costs = with_prompts(config, costs, student, safety, budget)
        rest = stages(costs, text, len(lengths), 0)
        others = sum(rest[name] for name in rest if name not in BEFORE)
        left = budget.seconds - console.elapsed() - others
        steps = steps_within(left, text, costs, len(lengths))
        epochs = -(-steps // text.steps(len(lengths)))
        expected = stages(costs, text, len(lengths), steps)
        after = {name: part for name, part in expected.items() if name not in BEFORE}
        parts = ", ".join(f"{name} {human_time(part)}" for name, part in after.items())
        stage.finish(f"{steps:,} steps, {steps / text.steps(len(lengths)):.2f} epochs; {parts}")
    train = config.train.model_copy(update={"steps": steps, "epochs": epochs})
    return replace(resolved, config=config.model_copy(update={"train": train}))


def with_prompts(
    config: RunConfig, costs: Costs, student: Student, safety: SafetyData, budget: Budget
) -> tuple[RunConfig, Costs]:
    """The settings with as many prompts for the safety head as there is time for, and the costs
    with it."""
    time, most = fitting_time(student, safety), config.safety.most_read
    counts, flops = (len(safety.train), len(safety.validation)), reading_flops(student, safety)
    most, taken = fitting_within(SAFETY_SHARE * budget.seconds, time, counts, flops, most)
    of_safety = config.safety.model_copy(update={"most_read": most})
    return config.model_copy(update={"safety": of_safety}), replace(costs, safety=taken)


def _costs_of(student: Student, budget: Budget, config: RunConfig, data: TrainingData) -> Costs:
    """The expected costs, with those that the student can be asked for measured, as training does
    it."""
    device = student.device
    precision = choose_precision(config.train, student.config.hidden_size, device)
    narrow, most = precision == "bf16", max(PROBED_STEPS, PROBED_SHARE * budget.seconds)
    with data.store.head_on(device, torch.bfloat16 if narrow else None):
        read = _scoring_seconds(student, config, data, narrow)
        training = _training_seconds(student, config, data, most)
    return with_measured(budget.costs, training, read)


def _scoring_seconds(
    student: Student, config: RunConfig, data: TrainingData, narrow: bool
) -> float:
    """Seconds of a token in a scoring of validation sequences."""
    module, data = TrainingModule(student, Objective(LossConfig())), data.watching(0.0, 1)
    for _ in range(2):  # the first time shards are read back
        start = time.perf_counter()
        validation = data.held_out(config.train.batch_size, student.device, student.packs)
        with torch.autocast(student.device.type, torch.bfloat16, enabled=narrow):
            validation_score(module, validation)
        seconds = time.perf_counter() - start
    return seconds / float(data.store.lengths()[data.watched].sum())


def _training_seconds(
    student: Student, config: RunConfig, data: TrainingData, most: float
) -> float:
    """Seconds of a token in a step, timed for about ``most`` seconds."""
    batch = load_batch(data.store, data.batches(1, config.train.batch_size)[0], pack=False)
    with other_weights(student, {}), only_used_rows(student, data.used_tokens()):
        return step_seconds(student, batch, config, most)
