"""The training loop, readable top to bottom.

Long because one step, plain and guarded, is told in one place.
"""

from __future__ import annotations

import atexit
import copy
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast
from torch import Tensor, nn

from distill.config.schema import TrainConfig
from distill.errors import TrainingAborted
from distill.losses.batch import Batch
from distill.losses.objective import Objective
from distill.runs.audit_events import record_checkpoint, record_guard, record_resumed
from distill.runs.metrics_log import MetricsFile
from distill.runtime.cpu import keep_freed_memory, onednn_for_float32
from distill.runtime.device import choose_precision
from distill.runtime.launch_environment import require_trainable
from distill.training.checkpoint import TrainingState, load_newest, save_checkpoint
from distill.training.checkpoint_timer import Clock
from distill.training.data import MicroBatch, TrainingData, load_batch, micro_batches
from distill.training.distributed import TrainingModule, exchange_gradients, is_sharded, wrap
from distill.training.embedding_rows import only_used_rows
from distill.training.guard_hooks import build_guard, event_line, tensors_of, write_events
from distill.training.optimizer import build_optimizer, build_schedule, parameter_groups
from distill.training.summary import TrainingSummary
from distill.training.validation import (
    HeldOutScore,
    best_step,
    evaluation_steps,
    held_out_score,
    is_exhausted,
)
from stability import Event, GaveUp
from stability.detectors import Action
from stability.measures.step import gradient_norm, non_finite
from students.model.decoder import SHORT_ON_CPU
from students.model.interface import Student
from students.weights import full_tensor, plain_weights, set_weights

INSTEAD = 8  # stream of random numbers that chooses batches in place of those set aside

Report = Callable[[int, str], None]
"""Called with the number of finished steps and one line about how training stands."""

OwnWords = Callable[[Student, list[int], int], Batch]
"""Some sequences of the store, by index, with the student's own words in them, for a step
(``distill.training.on_policy``)."""


@dataclass(frozen=True)
class Loop:
    """What stays the same from step to step."""

    accelerator: Accelerator
    model: nn.Module
    data: TrainingData
    config: TrainConfig
    plan: list[list[int]]
    own_words: OwnWords | None
    folder: Path
    metrics: MetricsFile
    tell: Callable[[str], None]

    def record(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Log figures of one step."""
        self.metrics.write(kind, step, values)
        self.accelerator.log({f"{kind}/{name}": value for name, value in values.items()}, step)

    def refuse(self, path: Path, reason: str, step: int) -> None:
        """Log that a checkpoint could not be used."""
        words = (
            f"checkpoint {path.name} is damaged ({reason}): it was put aside, and the one "
            "before was used"
        )
        event = event_line(Event(step, "checkpoint_refused", "checkpoint", words))
        self.metrics.write("event", step, event)
        if self.accelerator.is_main_process:
            record_guard(self.folder, step, {**event, "checkpoint": path.name})
        self.tell(words)

    def save(self, state: TrainingState, *, finished: bool = False) -> None:
        """Save a checkpoint, and write down which."""
        state.lines_logged = self.metrics.lines
        key = self.data.store.manifest.key
        path = save_checkpoint(self.folder / "checkpoints", state, key, finished=finished)
        if self.accelerator.is_main_process:
            record_checkpoint(self.folder, path, state.step)


def train(
    student: Student,
    data: TrainingData,
    objective: Objective,
    config: TrainConfig,
    folder: Path,
    report: Report,
    own_words: OwnWords | None = None,
    tell: Callable[[str], None] = lambda words: None,
) -> TrainingSummary:
    """Train ``student`` in place, to the weights with the best held-out KL; continue from the
    newest checkpoint in ``folder`` if there is one. Under a launcher, every process calls this with
    the same arguments. ``tell`` is given a sentence about everything out of the ordinary.

    Raises:
        TrainingAborted: the guard gave up, and the last good state is saved; or, without a guard, a
            loss or gradient is not finite, and nothing of that step reaches the weights.
        UserError: a setting does not fit this launch or machine.
        OSError: the disk refuses; earlier checkpoints stay.
    """
    require_trainable(config, PartialState().num_processes)
    accelerator = _accelerator(config, student.config.hidden_size, folder)
    sharded = is_sharded(accelerator)
    # A student that writes may look up any token.
    lean = nullcontext() if own_words is not None else only_used_rows(student, data.used_tokens())
    with lean:
        # FSDP takes a module apart for good, so it gets a copy; the student is given the weights in
        # the end.
        trained = copy.deepcopy(student) if sharded else student
        model = _prepared(trained, objective, config, accelerator)
        plan = data.batches(config.epochs, config.batch_size)
        optimizer = build_optimizer(model, config, student.config.hidden_size)
        state = TrainingState(
            trained, optimizer, build_schedule(optimizer, config, len(plan)), objective
        )
        if config.guard.enabled:
            fixed = data.fixed_text().to(accelerator.device)
            state.guard = build_guard(accelerator, model, state, config, fixed)
        newest, refused = load_newest(folder / "checkpoints", state, data.store.manifest.key)
        clock = Clock(state.step, state.tokens_seen)
        metrics_file = folder / "metrics.jsonl" if accelerator.is_main_process else None
        with (
            MetricsFile(
                metrics_file, state.step if newest else None, state.lines_logged
            ) as metrics,
            _fast_products(data, accelerator),
        ):
            loop = Loop(accelerator, model, data, config, plan, own_words, folder, metrics, tell)
            if newest is not None and accelerator.is_main_process:
                record_resumed(folder, newest, state.step)
            for path, reason in refused:
                loop.refuse(path, reason, state.step)
            try:
                _run(loop, state, clock, report)
            finally:
                for tracker in accelerator.trackers:
                    tracker.finish()
        final = state.best or plain_weights(trained)
        _plain_again(student)
        set_weights(student, final)
    return TrainingSummary(
        steps=state.step,
        tokens_seen=state.tokens_seen,
        seconds=clock.seconds,
        continued_from=clock.from_step,
        scores=tuple(sorted(state.scores.items())),
        precision="bf16" if accelerator.mixed_precision == "bf16" else "fp32",
        best=best_step(state.scores),
        planned=len(plan),
    )


def _run(loop: Loop, state: TrainingState, clock: Clock, report: Report) -> None:
    """The loop itself: evaluate, save, stop, step, log."""
    config, plan = loop.config, loop.plan
    evaluate_at = evaluation_steps(len(plan), config.evaluations)
    if state.guard is not None:
        audited = loop.folder if loop.accelerator.is_main_process else None
        write_events(state.guard, plan, loop.metrics, audited, loop.tell)
        state.guard.on_probe = lambda step, reading: loop.record("probe", step, reading.flat())
    while True:
        if state.step in evaluate_at and state.step not in state.scores:
            loop.record("held_out", state.step, vars(_evaluate(loop, state)))
            if state.guard is not None:
                loop.record("weights", state.step, state.guard.monitor.weigh(full_tensor))
        finished = state.step == len(plan) or is_exhausted(state.scores, config.patience)
        if (finished and clock.trained_since_save(state.step)) or clock.save_is_due(
            loop.accelerator
        ):
            with clock.saving(state.step):
                loop.save(state, finished=finished)
        if finished:
            _require_trained(state)
            break
        before = state.step
        try:
            values = _step(loop, state)
        except GaveUp as error:
            loop.save(state)  # the last good state
            raise TrainingAborted(
                f"{error}; see the report, and try a lower train.learning_rate"
            ) from None
        if values is not None:
            loop.record("train", state.step, values)
            report(state.step, clock.describe(state, values["loss"]))
        elif state.step < before:
            clock.went_back()


def _require_trained(state: TrainingState) -> None:
    """See that training has not ended without a single step.

    Raises:
        TrainingAborted: the guard had to skip them all.
    """
    if state.guard is not None and state.guard.newest is not None and not state.tokens_seen:
        raise TrainingAborted(
            f"not one of {state.step} steps could be taken; {state.guard.newest.words}"
        )


def _fast_products(data: TrainingData, accelerator: Accelerator) -> AbstractContextManager[object]:
    """oneDNN for float32 on a CPU, where sequences are so short that no fused attention minds
    it."""
    short = int(max(data.store.lengths())) <= SHORT_ON_CPU
    return onednn_for_float32() if short and accelerator.device.type == "cpu" else nullcontext()


def _accelerator(config: TrainConfig, width: int, folder: Path) -> Accelerator:
    """Accelerate's view of this launch, with the precision and the trackers that were asked for."""
    launch = PartialState()
    if (
        launch.device.type == "mps"
    ):  # Metal lacks the float64 that rotations and scores are computed in
        launch.device = torch.device("cpu")
    device = launch.device
    if launch.num_processes > 1:
        atexit.register(_leave, launch)
    if device.type == "cpu":
        keep_freed_memory()
    precision = choose_precision(config, width, device)
    # An earlier training in this process may have had another precision
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        cpu=device.type == "cpu",
        log_with=list(config.trackers) or None,
        project_dir=folder / "trackers",
    )
    if config.trackers:
        settings = {
            key: value
            for key, value in config.model_dump().items()
            if isinstance(value, int | float | str)
        }
        accelerator.init_trackers("distill", settings)
    return accelerator


def _leave(launch: PartialState) -> None:
    """Leave the launch before the interpreter ends: a thread of Gloo that frees a tensor later
    aborts the process, and the launcher then kills the others."""
    time.sleep(0.2)  # in which such threads can have Python's lock
    launch.destroy_process_group()


def _prepared(
    student: Student, objective: Objective, config: TrainConfig, accelerator: Accelerator
) -> nn.Module:
    """Student and objective as one module, on its device and wrapped for this launch."""
    if config.gradient_checkpointing:
        student.checkpoint_activations(True)
    if config.compile:
        for layer in student.layers():
            layer.compile()
    return wrap(accelerator, TrainingModule(student, objective))


def _plain_again(student: Student) -> None:
    """Undo what only training needed."""
    student.checkpoint_activations(False)
    for layer in student.layers():
        layer._compiled_call_impl = None


def _evaluate(loop: Loop, state: TrainingState) -> HeldOutScore:
    """Score the held-out sequences, and keep the weights aside if they are the best so far."""
    device = loop.accelerator.device
    score = held_out_score(loop.model, loop.data.held_out(loop.config.batch_size, device))
    if loop.accelerator.num_processes > 1:  # all decide by the same figures, to the last bit
        values = torch.tensor(list(vars(score).values()), dtype=torch.float64, device=device)
        score = HeldOutScore(*broadcast(values).tolist())
    state.scores[state.step] = score
    if best_step(state.scores) == state.step:
        last = state.step == len(loop.plan)
        weights = {} if last else plain_weights(state.student)
        state.best = {name: value.to("cpu", copy=True) for name, value in weights.items()} or None
    return score


def _step(loop: Loop, state: TrainingState) -> dict[str, float] | None:
    """One optimizer step; returns what is logged about it, or nothing where the guard did not
    let it stand."""
    logged, total = _gradients(loop, state)
    objective = state.objective
    figures = objective.rotation_figures()
    update = _plain_update if state.guard is None else _guarded_update
    measured = update(loop, state, logged, figures)
    state.optimizer.zero_grad(set_to_none=True)
    if measured is None:
        return None
    state.schedule.step()
    objective.after_step()
    state.step += 1
    state.tokens_seen += total
    return (
        {name: float(value) for name, value in logged.items()}
        | measured
        | figures
        | {"tokens_seen": state.tokens_seen}
    )


def _sequences(loop: Loop, state: TrainingState) -> list[int]:
    """The next step's batch, or in place of one that the guard has set aside, another that made no
    trouble; an earlier one, if there is any."""
    guard, step = state.guard, state.step
    if guard is None or not guard.is_set_aside(step):
        return loop.plan[step]
    others = [other for other in range(len(loop.plan)) if not guard.is_under_suspicion(other)]
    earlier = [other for other in others if other < step]
    if not others:
        raise TrainingAborted(
            f"step {step}: every batch has made trouble; the soft targets are not sound"
        )
    return loop.plan[
        np.random.default_rng([loop.data.seed, INSTEAD, step]).choice(earlier or others)
    ]


def _parts(loop: Loop, state: TrainingState) -> list[MicroBatch]:
    """This process's micro-batches of the next step."""
    accelerator, sequences = loop.accelerator, _sequences(loop, state)
    return micro_batches(
        sequences, loop.config.accumulation, accelerator.process_index, accelerator.num_processes
    )


def _gradients(loop: Loop, state: TrainingState) -> tuple[dict[str, Tensor], int]:
    """Forward and backward of one step; the loss and its parts over all processes, and how many
    tokens it has."""
    loop.model.train()
    accelerator = loop.accelerator
    parts = _parts(loop, state)
    batches = [_load(loop, state, part) for part in parts]
    counted = [batch for batch, part in zip(batches, parts, strict=True) if part.counts]
    total = int(
        _over_all_processes(accelerator, torch.tensor(sum(batch.count() for batch in counted)))
    )
    sums: dict[str, Tensor] = {}
    for place, (batch, part) in enumerate(zip(batches, parts, strict=True), 1):
        last = place == len(parts)
        # Gradients are exchanged once per step, after the last micro-batch.
        with exchange_gradients(accelerator, loop.model, now=last), accelerator.autocast():
            on_device = batch.to(accelerator.device)  # one at a time: targets may be large
            values = _backward(loop, on_device, part.counts, total, state.step / len(loop.plan))
        sums = {
            name: sums.get(name, torch.zeros_like(value)) + value for name, value in values.items()
        }
    logged = dict(
        zip(sums, _over_all_processes(accelerator, torch.stack(list(sums.values()))), strict=True)
    )
    return logged, total


def _plain_update(
    loop: Loop, state: TrainingState, logged: dict[str, Tensor], figures: dict[str, float]
) -> dict[str, float]:
    """Clip and step; a loss or gradient that is not finite ends training."""
    # The heads are clipped by themselves: a few prompts' gradient varies much more than that of all
    # tokens, and would set the scale of both.
    groups = parameter_groups(loop.model)
    norms = {name: gradient_norm(parameters) for name, parameters in groups.items()}
    gradients = {f"{name} gradient": full_tensor(norm) for name, norm in norms.items()}
    if broken := non_finite({"loss": logged["loss"], **gradients}):
        raise TrainingAborted(
            f"step {state.step}: the {' and the '.join(broken)} is not finite; the weights are as "
            "before this "
            "step, and the last checkpoint is kept; try a lower train.learning_rate or "
            "train.precision=fp32"
        )
    for name, parameters in groups.items():
        torch.nn.utils.clip_grads_with_norm_(parameters, loop.config.max_grad_norm, norms[name])
    rate = float(state.schedule.get_last_lr()[0])
    state.optimizer.step()
    return {"grad_norm": float(gradients["student's gradient"]), "learning_rate": rate}


def _guarded_update(
    loop: Loop, state: TrainingState, logged: dict[str, Tensor], figures: dict[str, float]
) -> dict[str, float] | None:
    """Let the guard clip and step; nothing where it skipped the step or went back.

    Raises:
        GaveUp: going back did not help.
    """
    assert state.guard is not None
    # Of prompts there are some in every n-th step only, and the heads learn at a pace of their own.
    heads = [logged[name] for name in ("safety", "verification") if name in logged]
    loss = logged["loss"] - sum(heads)

    def inputs() -> Mapping[str, Tensor]:
        return tensors_of(_load(loop, state, part) for part in _parts(loop, state))

    verdict = state.guard.step(loss, _sequences(loop, state), inputs, figures)
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
    return measured | ({"clip_limit": limit} if limit < loop.config.max_grad_norm else {})


def _load(loop: Loop, state: TrainingState, part: MicroBatch) -> Batch:
    """A micro-batch in main memory, a share of it in the student's own words where that is asked
    for."""
    data = loop.data
    if loop.own_words is None:
        batch = load_batch(data.store, part.indices)
    else:
        batch = loop.own_words(state.student, part.indices, state.step)
    turn, off = divmod(state.step, data.prompts_every)
    if data.prompts is None or off:
        return batch
    prompts = data.prompts.batch(turn, data.prompts_together, part.place, part.places)
    return replace(batch, prompts=prompts)


def _backward(
    loop: Loop, batch: Batch, counts: bool, total: int, fraction: float
) -> dict[str, Tensor]:
    """Forward and backward of one micro-batch; returns its loss and its parts (0 for a
    stand-in)."""
    share = batch.count() / total
    loss, parts = loop.model(
        lambda student, objective: objective(
            student, batch, total=total, share=share, fraction=fraction
        )
    )
    # DDP and FSDP average gradients over processes, but the loss is divided by everybody's tokens
    # already.
    scale = float(loop.accelerator.num_processes) if counts else 0.0
    with torch.autocast(loop.accelerator.device.type, enabled=False):
        (loss if scale == 1.0 else loss * scale).backward()
    return {name: value.detach() * float(counts) for name, value in {"loss": loss, **parts}.items()}


def _over_all_processes(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum of ``values`` over all processes of the launch."""
    if accelerator.num_processes == 1:
        return values
    return accelerator.reduce(values.to(accelerator.device), "sum")
