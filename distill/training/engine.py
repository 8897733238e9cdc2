"""The training loop, readable top to bottom.

Over 400 lines because what a step does stays in one place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast
from torch import Tensor, nn

from distill.config.schema import TrainConfig
from distill.errors import TrainingAborted
from distill.losses.batch import Batch
from distill.losses.objective import Objective
from distill.losses.vocabulary_sample import VocabularySample
from distill.runs.audit_events import record_checkpoint, record_guard, record_resumed
from distill.runs.metrics_log import MetricsFile
from distill.runtime.launch_environment import require_trainable
from distill.training.checkpoint import TrainingState, load_newest, save_checkpoint
from distill.training.checkpoint_timer import CheckpointTimer
from distill.training.data import AHEAD, StepLoader, TrainingData, load_batch
from distill.training.distributed import (
    TrainingModule,
    build_accelerator,
    exchange_gradients,
    float32_products,
    is_sharded,
    plain_again,
    prepared,
    sum_over_processes,
)
from distill.training.embedding_rows import only_used_rows
from distill.training.guard_hooks import build_guard, event_line, tensors_of, write_events
from distill.training.optimizer import (
    Muon,
    build_optimizer,
    build_schedule,
    parameter_groups,
    tokens_of_a_step,
)
from distill.training.summary import TrainingSummary
from distill.training.validation import (
    ValidationScore,
    best_step,
    evaluation_steps,
    is_exhausted,
    validation_kl,
    validation_score,
    weighing_steps,
)
from stability import Event, GaveUp
from stability.detectors import Action
from stability.measures.tensors import gradient_norm, non_finite
from students.model.interface import Student
from students.weights import full_tensor, plain_weights, set_weights
from teachers.base import ProcessRank

REPLACEMENT = 8  # stream of random numbers that chooses batches in place of quarantined ones

Report = Callable[[int, str], None]
"""Receives the number of finished steps and one line on the state of training."""

OnPolicyLoader = Callable[[Student, list[int], int], Batch]
"""Loads sequences of the store, by index, for a step; the student continues some of them."""


@dataclass(frozen=True)
class TrainingJob:
    """A student to train in place on some data, with its objective, settings and run folder."""

    student: Student
    data: TrainingData
    objective: Objective
    config: TrainConfig
    folder: Path


@dataclass(frozen=True)
class Loop:
    """What stays the same from step to step."""

    job: TrainingJob
    accelerator: Accelerator
    model: nn.Module
    plan: Sequence[list[int]]
    loader: StepLoader
    metrics: MetricsFile
    warn: Callable[[str], None]

    def record(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Log values of one step."""
        self.metrics.write(kind, step, values)
        self.accelerator.log({f"{kind}/{name}": value for name, value in values.items()}, step)

    def refuse(self, path: Path, reason: str, step: int) -> None:
        """Log that a checkpoint could not be used."""
        message = (
            f"checkpoint {path.name} is damaged ({reason}): it was quarantined, and the one "
            "before was used"
        )
        event = event_line(Event(step, "checkpoint_refused", "checkpoint", message))
        self.metrics.write("event", step, event)
        if self.accelerator.is_main_process:
            record_guard(self.job.folder, step, {**event, "checkpoint": path.name})
        self.warn(message)

    def save(self, state: TrainingState, *, finished: bool = False) -> None:
        """Save a checkpoint, and record it in the audit log."""
        state.lines_logged = self.metrics.lines
        folder, key = self.job.folder, self.job.data.store.manifest.key
        path = save_checkpoint(folder / "checkpoints", state, key, finished=finished)
        if self.accelerator.is_main_process:
            record_checkpoint(folder, path, state.step)


def train(
    job: TrainingJob,
    report: Report,
    on_policy: OnPolicyLoader | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> TrainingSummary:
    """Train the job's student in place, to the weights with the best validation KL; continue from
    the newest checkpoint if there is one. Under a launcher, every process calls this with the same
    arguments. ``warn`` receives a message about everything out of the ordinary.

    Raises:
        TrainingAborted: the guard gave up, and the last good state is saved; or, without a guard, a
            loss or gradient is not finite, and nothing of that step reaches the weights.
        UserError: a setting does not fit this launch or machine.
        OSError: the disk refuses; earlier checkpoints stay.
    """
    student, data, config, folder = job.student, job.data, job.config, job.folder
    width = student.config.hidden_size
    require_trainable(config, PartialState().num_processes)
    accelerator = build_accelerator(config, width, folder)
    # Text that the student generates may contain any token.
    lean = nullcontext() if on_policy is not None else only_used_rows(student, data.used_tokens())
    narrow = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    with lean, data.store.head_on(accelerator.device, narrow):
        # FSDP shards a module for good, so it gets a copy; the student gets the weights at the end.
        trained = copy.deepcopy(student) if is_sharded(accelerator) else student
        model = prepared(accelerator, TrainingModule(trained, job.objective), config)
        plan = data.batches(config.epochs, config.batch_size)[: config.steps]
        tokens = tokens_of_a_step(data.store.lengths(), plan)
        narrow = accelerator.mixed_precision == "bf16"
        optimizer = build_optimizer(model, config, width, tokens, narrow=narrow)
        schedule = build_schedule(optimizer, config, len(plan))
        state = TrainingState(trained, optimizer, schedule, job.objective, narrow=narrow)
        if config.guard.enabled:
            fixed = data.fixed_text().to(accelerator.device)
            state.guard = build_guard(accelerator, model, state, config, fixed)
        newest, refused = load_newest(folder / "checkpoints", state, data.store.manifest.key)
        timer = CheckpointTimer(state.step, state.tokens_seen)
        path = folder / "metrics.jsonl" if accelerator.is_main_process else None
        with (
            MetricsFile(path, state.step if newest else None, state.lines_logged) as metrics,
            float32_products(data.store.lengths(), student, accelerator.device),
            _loader(job, trained, accelerator, on_policy) as loader,
        ):
            loop = Loop(job, accelerator, model, plan, loader, metrics, warn)
            if newest is not None and accelerator.is_main_process:
                record_resumed(folder, newest, state.step)
            for damaged, reason in refused:
                loop.refuse(damaged, reason, state.step)
            try:
                _run(loop, state, timer, report)
            finally:
                for tracker in accelerator.trackers:
                    tracker.finish()
        final = state.best or plain_weights(trained)
        plain_again(student)
        set_weights(student, final)
    return TrainingSummary(
        steps=state.step,
        tokens_seen=state.tokens_seen,
        seconds=timer.seconds,
        aside=timer.aside,
        continued_from=timer.from_step,
        scores=tuple(sorted(state.scores.items())),
        precision="bf16" if accelerator.mixed_precision == "bf16" else "fp32",
        optimizer="muon" if isinstance(optimizer, Muon) else "adamw",
        best=best_step(state.scores),
        planned=len(plan),
        padding=data.padding(plan, config.accumulation * accelerator.num_processes, student.packs),
    )


def _run(loop: Loop, state: TrainingState, timer: CheckpointTimer, report: Report) -> None:
    """The loop itself: evaluate, save, stop, step, log."""
    config, plan = loop.job.config, loop.plan
    evaluate_at = evaluation_steps(len(plan), config.evaluations)
    weigh_at = _weighing_steps(loop, state, evaluate_at)
    name = validation_kl(loop.job.data.store.manifest.recipe)
    if state.guard is not None:
        audited = loop.job.folder if loop.accelerator.is_main_process else None
        write_events(state.guard, plan, loop.metrics, audited, loop.warn)
        state.guard.on_probe = lambda step, reading: loop.record("probe", step, reading.flat())
    while True:
        if state.step in evaluate_at and state.step not in state.scores:
            with timer.beside_training():
                scored = {"sequences": loop.job.data.watched_count}
                loop.record("held_out", state.step, vars(_evaluate(loop, state)) | scored)
                last = is_exhausted(state.scores, config.patience)
                if state.guard is not None and (last or state.step in weigh_at):
                    loop.record("weights", state.step, state.guard.monitor.weigh(full_tensor))
        finished = state.step == len(plan) or is_exhausted(state.scores, config.patience)
        unsaved = finished and timer.trained_since_save(state.step)
        if unsaved or timer.save_is_due(loop.accelerator):
            with timer.saving(state.step):
                loop.save(state, finished=finished)
        if finished:
            _require_trained(state)
            break
        before = state.step
        try:
            values = _step(loop, state)
        except GaveUp as error:
            loop.save(state)  # the last good state
            message = f"{error}; see the report, and try a lower train.learning_rate"
            raise TrainingAborted(message) from None
        if values is not None:
            loop.record("train", state.step, values)
            report(state.step, timer.describe(state, values["loss"], name))
        elif state.step < before:
            timer.rolled_back()


def _weighing_steps(loop: Loop, state: TrainingState, points: set[int]) -> set[int]:
    """The validation points at which the guard weighs all matrices."""
    if state.guard is None:
        return set()
    monitor, lengths = state.guard.monitor, loop.job.data.store.lengths()
    tokens = tokens_of_a_step(lengths, loop.plan) * len(loop.plan)
    trained = 6.0 * tokens * sum(weight.numel() for weight in monitor.weights)
    return weighing_steps(points, monitor.weigh_products, trained)


def _require_trained(state: TrainingState) -> None:
    """Raise ``TrainingAborted`` if the guard had to skip every step."""
    event = None if state.guard is None else state.guard.state.newest
    if event is not None and not state.tokens_seen:
        raise TrainingAborted(f"not one of {state.step} steps could be taken; {event.message}")


def _evaluate(loop: Loop, state: TrainingState) -> ValidationScore:
    """Score the watched sequences, and keep a copy of the weights if they are the best yet."""
    device = loop.accelerator.device
    size, pack = loop.job.config.batch_size, state.student.packs
    with loop.accelerator.autocast():
        score = validation_score(loop.model, loop.job.data.held_out(size, device, pack))
    if loop.accelerator.num_processes > 1:  # all decide by the same values, to the last bit
        values = torch.tensor(list(vars(score).values()), dtype=torch.float64, device=device)
        score = ValidationScore(*broadcast(values).tolist())
    state.scores[state.step] = score
    if best_step(state.scores) == state.step:
        last = state.step == len(loop.plan)
        weights = {} if last else plain_weights(state.student)
        state.best = {name: value.to("cpu", copy=True) for name, value in weights.items()} or None
    return score


def _step(loop: Loop, state: TrainingState) -> dict[str, float] | None:
    """One optimizer step; returns the values to log, or nothing where the guard rejected it."""
    logged, total, padding = _gradients(loop, state)
    rotations = state.objective.rotation_stats()
    update = _plain_update if state.guard is None else _guarded_update
    measured = update(loop, state, logged, rotations)
    state.optimizer.zero_grad(set_to_none=True)
    if measured is None:
        return None
    state.schedule.step()
    state.objective.after_step()
    state.step += 1
    state.tokens_seen += total
    values = dict(zip(logged, torch.stack(list(logged.values())).tolist(), strict=True))
    values["padding"] = float(np.float32(padding))
    return values | measured | rotations | {"tokens_seen": state.tokens_seen}


def _sequences(loop: Loop, state: TrainingState) -> list[int]:
    """The next step's batch; in place of a quarantined one another, an earlier one if possible,
    that the guard does not suspect."""
    guard, step = state.guard, state.step
    if guard is None or not guard.is_quarantined(step):
        return loop.plan[step]
    others = [other for other in range(len(loop.plan)) if not guard.is_suspect(other)]
    earlier = [other for other in others if other < step]
    if not others:
        raise TrainingAborted(
            f"step {step}: every batch has made trouble; the soft targets are not sound"
        )
    draw = np.random.default_rng([loop.job.data.seed, REPLACEMENT, step])
    return loop.plan[draw.choice(earlier or others)]


def _loader(
    job: TrainingJob, student: Student, accelerator: Accelerator, on_policy: OnPolicyLoader | None
) -> StepLoader:
    """What loads this process's batches: ahead where nothing of them depends on the student."""

    def read(indices: list[int], step: int) -> Batch:
        if on_policy is not None:
            return on_policy(student, indices, step)
        return load_batch(job.data.store, indices, student.packs)

    return StepLoader(
        job.data,
        read,
        accumulation=job.config.accumulation,
        process=ProcessRank(accelerator.process_index, accelerator.num_processes),
        on_gpu=accelerator.device.type != "cpu",
        ahead=on_policy is None,
    )


def _gradients(loop: Loop, state: TrainingState) -> tuple[dict[str, Tensor], int, float]:
    """Forward and backward of one step; the loss and its parts over all processes, the step's
    number of tokens, and the share of padding."""
    loop.model.train()
    accelerator = loop.accelerator
    batches = loop.loader.take(state.step, _sequences(loop, state))
    if (following := state.step + 1) < len(loop.plan):
        later = loop.plan[min(following + AHEAD, len(loop.plan) - 1)]
        loop.loader.expect(following, loop.plan[following], later)
    counts = torch.tensor(
        [
            (batch.count() * part.counts, batch.padding, batch.tokens.numel())
            for part, batch in batches
        ]
    )
    total, padding, computed = sum_over_processes(accelerator, counts.sum(dim=0)).tolist()
    sample = VocabularySample.of_step(
        (batch for _, batch in batches),
        loop.job.objective.config.vocabulary_sample,
        accelerator.device,
        loop.job.data.seed,
        state.step,
        partial(sum_over_processes, accelerator),
    )
    step = {"total": total, "fraction": state.step / len(loop.plan), "sample": sample}
    sums: dict[str, Tensor] = {}
    for number, (part, batch) in enumerate(batches, 1):
        # Gradients are exchanged once per step, after the last micro-batch.
        exchange = exchange_gradients(accelerator, loop.model, now=number == len(batches))
        with exchange, accelerator.autocast():
            on_device = batch.to(accelerator.device)  # one at a time: targets may be large
            values = _backward(loop, on_device, part.counts, step)
        for name, value in values.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value
    reduced = sum_over_processes(accelerator, torch.stack(list(sums.values())))
    return dict(zip(sums, reduced, strict=True)), total, padding / computed


def _plain_update(
    loop: Loop, state: TrainingState, logged: dict[str, Tensor], rotations: dict[str, float]
) -> dict[str, float]:
    """Clip and step; a loss or gradient that is not finite ends training."""
    # The heads are clipped separately: the gradient of a few prompts varies much more than that of
    # all tokens, and would set the scale of both.
    groups = parameter_groups(loop.model)
    norms = {name: gradient_norm(parameters) for name, parameters in groups.items()}
    gradients = {f"{name} gradient": full_tensor(norm) for name, norm in norms.items()}
    if broken := non_finite({"loss": logged["loss"], **gradients}):
        raise TrainingAborted(
            f"step {state.step}: the {' and the '.join(broken)} is not finite; the weights are as "
            "before this step, and the last checkpoint is kept; try a lower train.learning_rate or "
            "train.precision=fp32"
        )
    for name, parameters in groups.items():
        torch.nn.utils.clip_grads_with_norm_(parameters, loop.job.config.max_grad_norm, norms[name])
    rate = float(state.schedule.get_last_lr()[0])
    state.optimizer.step()
    return {"grad_norm": float(gradients["student's gradient"]), "learning_rate": rate}


def _guarded_update(
    loop: Loop, state: TrainingState, logged: dict[str, Tensor], rotations: dict[str, float]
) -> dict[str, float] | None:
    """Let the guard clip and step; nothing where it skipped the step or rolled back.

    Raises:
        GaveUp: rolling back did not help.
    """
    assert state.guard is not None
    # Prompts come in every n-th step only, and the heads learn at a pace of their own.
    heads = [logged[name] for name in ("safety", "verification") if name in logged]
    loss = logged["loss"] - sum(heads)

    def inputs() -> Mapping[str, Tensor]:
        batches = loop.loader.load(state.step, _sequences(loop, state))
        return tensors_of(batch for _, batch in batches)

    verdict = state.guard.step(loss, _sequences(loop, state), inputs=inputs, stats=rotations)
    if verdict.action == Action.SKIP:
        state.schedule.step()
        state.step += 1
    if verdict.action != Action.PROCEED:
        return None
    measured = {
        "grad_norm": verdict.totals["student's"],
        "learning_rate": verdict.learning_rate,
        "update_ratio": verdict.update_ratio,
    }
    limit = verdict.limits["student's"]
    return measured | ({"clip_limit": limit} if limit < loop.job.config.max_grad_norm else {})


def _backward(loop: Loop, batch: Batch, counts: bool, step: Mapping[str, Any]) -> dict[str, Tensor]:
    """Forward and backward of one micro-batch; its loss and its parts (0 for a stand-in)."""
    step = {**step, "share": batch.count() / step["total"]}
    loss, parts = loop.model(lambda student, objective: objective(student, batch, **step))
    # DDP and FSDP average gradients over processes, but the loss is divided by all tokens already.
    scale = float(loop.accelerator.num_processes) if counts else 0.0
    with torch.autocast(loop.accelerator.device.type, enabled=False):
        (loss if scale == 1.0 else loss * scale).backward()
    return {name: value.detach() * float(counts) for name, value in {"loss": loss, **parts}.items()}
