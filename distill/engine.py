"""The training loop, readable top to bottom."""

from __future__ import annotations

import atexit
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast
from torch import Tensor, nn

from distill.batches import MicroBatch, Split, epoch_order, load_batch, micro_batches
from distill.checkpoint import (
    TrainingState,
    latest_checkpoint,
    load_checkpoint,
    plain_weights,
    save_checkpoint,
    set_weights,
)
from distill.config import TrainConfig
from distill.cpu import keep_freed_memory, onednn_for_float32
from distill.errors import TrainingAborted, UserError
from distill.held_out import HeldOutScore, best_step, evaluation_steps, held_out_score, is_exhausted
from distill.metrics import MetricsFile
from distill.objective import Batch, Objective
from distill.safety_prompts import PromptSet
from distill.schedule import build_optimizer, build_schedule, parameter_groups
from distill.sharding import full_tensor
from distill.training_module import TrainingModule, choose_precision, exchange_gradients, is_sharded, wrap
from distill.used_rows import only_used_rows, used_tokens
from stability.signals import gradient_norm, non_finite
from students.model import SHORT_ON_CPU, SO8TForCausalLM
from teachers.store import SoftTargetStore

CHECKPOINT_SECONDS = 30.0  # about so much training is lost when a process is killed
SAVING_SHARE = 0.03  # of the time may go into checkpoints

Report = Callable[[int, str], None]
"""Called with the number of finished steps and one line about how training stands."""

OwnWords = Callable[[SO8TForCausalLM, list[int], int], Batch]
"""Some sequences of the store, by index, with the student's own words in them, for a step (``distill.on_policy``)."""


@dataclass(frozen=True)
class TrainingSummary:
    """What training did: steps in all, tokens learnt from, and the held-out scores in order of steps.

    ``seconds`` counts this process alone, which began at step ``continued_from``. ``best``: the step whose weights
    the student has now; ``planned``: steps there would have been without early stopping.
    """

    steps: int
    tokens_seen: int
    seconds: float
    continued_from: int
    scores: tuple[tuple[int, HeldOutScore], ...]
    precision: str
    best: int
    planned: int


@dataclass(frozen=True)
class TrainingData:
    """The store, which of its sequences are held out, the seed of their order, and prompts for the safety head:
    in every ``prompts_every``-th optimizer step ``prompts_together`` of them."""

    store: SoftTargetStore
    split: Split
    seed: int
    prompts: PromptSet | None = None
    prompts_every: int = 1
    prompts_together: int = 0

    def batches(self, epochs: int, batch_size: int) -> list[list[int]]:
        """Sequence indices of every optimizer step, over all epochs."""
        lengths = self.store.lengths()
        return [
            batch.tolist()
            for epoch in range(epochs)
            for batch in epoch_order(self.split.train, lengths, batch_size, self.seed, epoch)
        ]

    def used_tokens(self) -> Tensor:
        """Every token that training looks up, ascending."""
        return used_tokens(self.store, self.prompts.tokens if self.prompts is not None else ())

    def held_out(self, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """The held-out sequences in batches."""
        indices = self.split.held_out
        for start in range(0, len(indices), batch_size):
            yield load_batch(self.store, indices[start : start + batch_size]).to(device)


@dataclass(frozen=True)
class Loop:
    """What stays the same from step to step."""

    accelerator: Accelerator
    model: nn.Module
    data: TrainingData
    config: TrainConfig
    plan: list[list[int]]
    own_words: OwnWords | None


def train(
    student: SO8TForCausalLM,
    data: TrainingData,
    objective: Objective,
    config: TrainConfig,
    folder: Path,
    report: Report,
    own_words: OwnWords | None = None,
) -> TrainingSummary:
    """Train ``student`` in place, to the weights with the best held-out KL; continue from the newest checkpoint in
    ``folder`` if there is one. Under a launcher, every process calls this with the same arguments.

    Raises:
        TrainingAborted: a loss or gradient is not finite; nothing of that step reaches the weights.
        UserError: a setting does not fit this launch or machine.
        OSError: the disk refuses; earlier checkpoints stay.
    """
    require_trainable(config, PartialState().num_processes)
    accelerator = _accelerator(config, student.config.hidden_size, folder)
    sharded = is_sharded(accelerator)
    # A student that writes may look up any token.
    lean = nullcontext() if own_words is not None else only_used_rows(student, data.used_tokens())
    with lean:
        # FSDP takes a module apart for good, so it gets a copy; the student is given the weights in the end.
        trained = copy.deepcopy(student) if sharded else student
        model = _prepared(trained, objective, config, accelerator)
        plan = data.batches(config.epochs, config.batch_size)
        optimizer = build_optimizer(model, config, student.config.hidden_size)
        state = TrainingState(trained, optimizer, build_schedule(optimizer, config, len(plan)), objective)
        newest = latest_checkpoint(folder / "checkpoints")
        if newest:
            load_checkpoint(newest, state, data.store.manifest.key)
        clock = Clock(state.step, state.tokens_seen)
        metrics_file = folder / "metrics.jsonl" if accelerator.is_main_process else None
        with (
            MetricsFile(metrics_file, state.step if newest else None) as metrics,
            _fast_products(data, accelerator),
        ):
            try:
                _run(
                    Loop(accelerator, model, data, config, plan, own_words),
                    state,
                    folder,
                    clock,
                    metrics,
                    report,
                )
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


def require_trainable(config: TrainConfig, processes: int) -> None:
    """See that settings fit the launch and what is installed, before anything takes long.

    Raises:
        UserError: they do not.
    """
    if config.on_policy and processes > 1:
        raise UserError(
            f"train.on_policy = {config.on_policy:g} works in one process, not in {processes}; start it without a "
            "launcher"
        )
    for tracker in config.trackers:
        if find_spec(tracker) is None:
            raise UserError(f"train.trackers names {tracker}, which is not installed: pip install {tracker}")


def _run(
    loop: Loop, state: TrainingState, folder: Path, clock: Clock, metrics: MetricsFile, report: Report
) -> None:
    """The loop itself: evaluate, save, stop, step, log."""
    config, plan = loop.config, loop.plan
    evaluate_at = evaluation_steps(len(plan), config.evaluations)

    def record(kind: str, values: dict[str, float]) -> None:
        metrics.write(kind, state.step, values)
        loop.accelerator.log({f"{kind}/{name}": value for name, value in values.items()}, state.step)

    while True:
        if state.step in evaluate_at and state.step not in state.scores:
            record("held_out", vars(_evaluate(loop, state)))
        finished = state.step == len(plan) or is_exhausted(state.scores, config.patience)
        if (finished and clock.trained_since_save(state.step)) or clock.save_is_due(loop.accelerator):
            with clock.saving(state.step):
                save_checkpoint(
                    folder / "checkpoints", state, loop.data.store.manifest.key, finished=finished
                )
        if finished:
            break
        values = _step(loop, state)
        record("train", values)
        report(state.step, clock.describe(state, values["loss"]))


def _fast_products(data: TrainingData, accelerator: Accelerator) -> AbstractContextManager[object]:
    """oneDNN for float32 on a CPU, where sequences are so short that no fused attention minds it."""
    short = int(max(data.store.lengths())) <= SHORT_ON_CPU
    return onednn_for_float32() if short and accelerator.device.type == "cpu" else nullcontext()


def _accelerator(config: TrainConfig, width: int, folder: Path) -> Accelerator:
    """Accelerate's view of this launch, with the precision and the trackers that were asked for."""
    launch = PartialState()
    if launch.device.type == "mps":  # Metal lacks the float64 that rotations and scores are computed in
        launch.device = torch.device("cpu")
    device = launch.device
    if launch.num_processes > 1:
        atexit.register(_leave, launch)
    if device.type == "cpu":
        keep_freed_memory()
    precision = choose_precision(config, width, device)
    AcceleratorState._reset_state()  # an earlier training in this process may have had another precision
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        cpu=device.type == "cpu",
        log_with=list(config.trackers) or None,
        project_dir=folder / "trackers",
    )
    if config.trackers:
        settings = {
            key: value for key, value in config.model_dump().items() if isinstance(value, int | float | str)
        }
        accelerator.init_trackers("distill", settings)
    return accelerator


def _leave(launch: PartialState) -> None:
    """Leave the launch before the interpreter ends: a thread of Gloo that frees a tensor later aborts the process,
    and the launcher then kills the others."""
    time.sleep(0.2)  # in which such threads can have Python's lock
    launch.destroy_process_group()


def _prepared(
    student: SO8TForCausalLM, objective: Objective, config: TrainConfig, accelerator: Accelerator
) -> nn.Module:
    """Student and objective as one module, on its device and wrapped for this launch."""
    if config.gradient_checkpointing:
        # Older transformers (for Python 3.10) know it by its older name.
        enable = getattr(student, "activation_checkpointing_enable", None)
        (enable or student.gradient_checkpointing_enable)({"use_reentrant": False})
    if config.compile:
        for layer in student.model.layers:
            layer.compile()
    return wrap(accelerator, TrainingModule(student, objective))


class Clock:
    """How long this process has trained, and when the next checkpoint is due."""

    def __init__(self, from_step: int, from_tokens: int) -> None:
        self.from_step = self.saved_step = from_step
        self.from_tokens = from_tokens
        self.begin = self.last_save = time.perf_counter()
        self.interval = CHECKPOINT_SECONDS

    @property
    def seconds(self) -> float:
        """Seconds since this process began to train."""
        return time.perf_counter() - self.begin

    def trained_since_save(self, step: int) -> bool:
        """Whether there is anything to save that is not saved."""
        return step > self.saved_step

    def save_is_due(self, accelerator: Accelerator) -> bool:
        """Whether it is time for a checkpoint; all processes hear the first one's clock."""
        due = time.perf_counter() - self.last_save > self.interval
        if accelerator.num_processes > 1:
            due = bool(broadcast(torch.tensor(int(due), device=accelerator.device)))
        return due

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Around the writing of a checkpoint; one that takes long makes them rarer."""
        begin = time.perf_counter()
        yield
        self.saved_step, self.last_save = step, time.perf_counter()
        self.interval = max(CHECKPOINT_SECONDS, (self.last_save - begin) / SAVING_SHARE)

    def describe(self, state: TrainingState, loss: float) -> str:
        """One line about how training stands."""
        speed = (state.tokens_seen - self.from_tokens) / max(self.seconds, 1e-9)
        newest = state.scores[max(state.scores)] if state.scores else None
        held_out = f", held-out KL {newest.kl:.3f}" if newest else ""
        return f"loss {loss:.3f}{held_out}, {speed:,.0f} tokens/s"


def _plain_again(student: SO8TForCausalLM) -> None:
    """Undo what only training needed."""
    disable = getattr(student, "activation_checkpointing_disable", None)
    (disable or student.gradient_checkpointing_disable)()
    for layer in student.model.layers:
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


def _step(loop: Loop, state: TrainingState) -> dict[str, float]:
    """One optimizer step; returns what is logged about it."""
    loop.model.train()
    accelerator = loop.accelerator
    indices = loop.plan[state.step]
    parts = micro_batches(
        indices, loop.config.accumulation, accelerator.process_index, accelerator.num_processes
    )
    batches = [_load(loop, state, part) for part in parts]
    counted = [batch for batch, part in zip(batches, parts, strict=True) if part.counts]
    total = int(_over_all_processes(accelerator, torch.tensor(sum(batch.count() for batch in counted))))
    sums: dict[str, Tensor] = {}
    for place, (batch, part) in enumerate(zip(batches, parts, strict=True), 1):
        last = place == len(parts)
        # Gradients are exchanged once per step, after the last micro-batch.
        with exchange_gradients(accelerator, loop.model, now=last), accelerator.autocast():
            on_device = batch.to(accelerator.device)  # one at a time: targets may be large
            values = _backward(loop, on_device, part.counts, total, state.step / len(loop.plan))
        sums = {name: sums.get(name, torch.zeros_like(value)) + value for name, value in values.items()}
    logged = dict(zip(sums, _over_all_processes(accelerator, torch.stack(list(sums.values()))), strict=True))
    # The heads are clipped by themselves: a few prompts' gradient varies much more than that of all tokens, and would
    # set the scale of both.
    groups = parameter_groups(loop.model)
    norms = {name: gradient_norm(parameters) for name, parameters in groups.items()}
    gradients = {f"{name} gradient": full_tensor(norm) for name, norm in norms.items()}
    if broken := non_finite({"loss": logged["loss"], **gradients}):
        raise TrainingAborted(
            f"step {state.step}: the {' and the '.join(broken)} is not finite; the weights are as before this "
            "step, and the last checkpoint is kept; try a lower train.learning_rate or train.precision=fp32"
        )
    for name, parameters in groups.items():
        torch.nn.utils.clip_grads_with_norm_(parameters, loop.config.max_grad_norm, norms[name])
    rate = float(state.schedule.get_last_lr()[0])
    state.optimizer.step()
    state.schedule.step()
    state.optimizer.zero_grad(set_to_none=True)
    figures = state.objective.rotation_figures()
    state.objective.after_step()
    state.step += 1
    state.tokens_seen += total
    measured = {"grad_norm": float(gradients["student's gradient"]), "learning_rate": rate} | figures
    return (
        {name: float(value) for name, value in logged.items()} | measured | {"tokens_seen": state.tokens_seen}
    )


def _load(loop: Loop, state: TrainingState, part: MicroBatch) -> Batch:
    """A micro-batch in main memory, a share of it in the student's own words where that is asked for."""
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


def _backward(loop: Loop, batch: Batch, counts: bool, total: int, fraction: float) -> dict[str, Tensor]:
    """Forward and backward of one micro-batch; returns its loss and its parts (0 for a stand-in)."""
    share = batch.count() / total
    loss, parts = loop.model(
        lambda student, objective: objective(student, batch, total=total, share=share, fraction=fraction)
    )
    # DDP and FSDP average gradients over processes, but the loss is divided by everybody's tokens already.
    scale = float(loop.accelerator.num_processes) if counts else 0.0
    with torch.autocast(loop.accelerator.device.type, enabled=False):
        (loss if scale == 1.0 else loss * scale).backward()
    return {name: value.detach() * float(counts) for name, value in {"loss": loss, **parts}.items()}


def _over_all_processes(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum of ``values`` over all processes of the launch."""
    if accelerator.num_processes == 1:
        return values
    return accelerator.reduce(values.to(accelerator.device), "sum")
