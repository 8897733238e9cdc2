"""The training loop, readable top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState

from distill import losses
from distill.batches import Split, epoch_order, load_batch, micro_batches
from distill.checkpoint import TrainingState, latest_checkpoint, load_checkpoint, save_checkpoint
from distill.config import TrainConfig
from distill.errors import TrainingAborted, UserError
from distill.metrics import MetricsFile
from distill.objective import Objective
from distill.schedule import build_optimizer, build_schedule
from stability.signals import gradient_norm, non_finite
from students.model import SO8TForCausalLM
from teachers.store import SoftTargetStore

EVALUATION_TEMPERATURE = 1.0
CHECKPOINT_SECONDS = 120.0  # at most so much training is lost, however far apart the evaluations are
BF16_WIDTH_ON_CPU = 256  # below this width, converting to bfloat16 costs a CPU more than it saves

Report = Callable[[int, str], None]
"""Called with the number of finished steps and one line about how training stands."""


@dataclass(frozen=True)
class HeldOutScore:
    """How close the student is to the teacher on held-out text, per token, at T = 1.

    ``kl``: in nats, over k + 1 buckets for compact targets and over the whole vocabulary for others;
    ``agreement``: share of positions with the same most probable token;
    ``cross_entropy``: of the actual next token, in nats.
    """

    kl: float
    agreement: float
    cross_entropy: float


@dataclass(frozen=True)
class TrainingSummary:
    """What training did: steps in all, tokens learnt from, and the held-out scores in order of steps.

    ``seconds`` counts this process alone, which began at step ``continued_from``.
    """

    steps: int
    tokens_seen: int
    seconds: float
    continued_from: int
    scores: tuple[tuple[int, HeldOutScore], ...]
    precision: str


@dataclass(frozen=True)
class TrainingData:
    """The store, which of its sequences are held out, and the seed of their order."""

    store: SoftTargetStore
    split: Split
    seed: int

    def batches(self, epochs: int, batch_size: int) -> list[list[int]]:
        """Sequence indices of every optimizer step, over all epochs."""
        lengths = self.store.lengths()
        return [
            batch.tolist()
            for epoch in range(epochs)
            for batch in epoch_order(self.split.train, lengths, batch_size, self.seed, epoch)
        ]


def choose_precision(config: TrainConfig, width: int, device: torch.device) -> str:
    """``bf16`` or ``fp32``: as configured, or what is faster on this device."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cpu":
        fast = "avx512" in torch.backends.cpu.get_cpu_capability().lower() and width >= BF16_WIDTH_ON_CPU
        return "bf16" if fast else "fp32"
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def train(
    student: SO8TForCausalLM,
    data: TrainingData,
    objective: Objective,
    config: TrainConfig,
    folder: Path,
    report: Report,
) -> TrainingSummary:
    """Train ``student`` in place; continue from the newest checkpoint in ``folder`` if there is one.

    Raises:
        TrainingAborted: a loss or gradient is not finite; nothing of that step reaches the weights.
        OSError: the disk refuses; earlier checkpoints stay.
    """
    launch = PartialState()
    if launch.num_processes > 1:
        raise UserError(
            f"training runs in one process, not {launch.num_processes}; start it without a launcher"
        )
    # Metal lacks the float64 that rotations and scores are computed in.
    device = torch.device("cpu") if launch.device.type == "mps" else launch.device
    precision = choose_precision(config, student.config.hidden_size, device)
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no", cpu=device.type == "cpu"
    )
    plan = data.batches(config.epochs, config.batch_size)
    optimizer = build_optimizer(student, config)
    schedule = build_schedule(optimizer, config, len(plan))
    # Only the model is wrapped: optimizer and schedule are stepped once per global batch by this loop.
    model = accelerator.prepare_model(student)
    state = TrainingState(student, optimizer, schedule, objective)
    checkpoints = folder / "checkpoints"
    key = data.store.manifest.key
    if newest := latest_checkpoint(checkpoints):
        load_checkpoint(newest, state, key)
    evaluate_at = evaluation_steps(len(plan), config.evaluations)
    clock = Clock(state.step, state.tokens_seen)

    with MetricsFile(folder / "metrics.jsonl", from_step=state.step) as metrics:
        scores = logged_scores(metrics.kept)
        while True:
            if state.step in evaluate_at and state.step not in scores:
                scores[state.step] = held_out_score(student, data, device, config.batch_size)
                metrics.write("held_out", state.step, vars(scores[state.step]))
                clock.checkpoint_is_due = state.step > 0
            if clock.checkpoint_is_due:
                save_checkpoint(checkpoints, state, key)
                clock.saved()
            if state.step == len(plan):
                break
            values = _step(model, state, data, plan[state.step], config, accelerator, len(plan))
            metrics.write("train", state.step, values)
            report(state.step, clock.describe(state.tokens_seen, values["loss"], list(scores.values())))

    history = tuple(sorted(scores.items()))
    return TrainingSummary(len(plan), state.tokens_seen, clock.seconds, clock.from_step, history, precision)


class Clock:
    """How long this process has trained, and when the next checkpoint is due."""

    def __init__(self, from_step: int, from_tokens: int) -> None:
        self.from_step = from_step
        self.from_tokens = from_tokens
        self.begin = self.last_save = time.perf_counter()
        self.asked = False

    @property
    def seconds(self) -> float:
        """Seconds since this process began to train."""
        return time.perf_counter() - self.begin

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether to save now: after an evaluation, or when too much would be lost."""
        return self.asked or time.perf_counter() - self.last_save > CHECKPOINT_SECONDS

    @checkpoint_is_due.setter
    def checkpoint_is_due(self, asked: bool) -> None:
        self.asked = asked

    def saved(self) -> None:
        """A checkpoint has just been written."""
        self.asked, self.last_save = False, time.perf_counter()

    def describe(self, tokens_seen: int, loss: float, scores: list[HeldOutScore]) -> str:
        """One line about how training stands."""
        speed = (tokens_seen - self.from_tokens) / max(self.seconds, 1e-9)
        held_out = f", held-out KL {scores[-1].kl:.3f}" if scores else ""
        return f"loss {loss:.3f}{held_out}, {speed:,.0f} tokens/s"


def logged_scores(lines: list[dict[str, float | str]]) -> dict[int, HeldOutScore]:
    """The held-out scores that a run's metrics already hold, by step."""
    names = ("kl", "agreement", "cross_entropy")
    return {
        int(line["step"]): HeldOutScore(*(float(line[name]) for name in names))
        for line in lines
        if line["kind"] == "held_out" and all(line.get(name) is not None for name in names)
    }


def _step(
    model: torch.nn.Module,
    state: TrainingState,
    data: TrainingData,
    indices: list[int],
    config: TrainConfig,
    accelerator: Accelerator,
    steps: int,
) -> dict[str, float]:
    """One optimizer step; returns what is logged about it."""
    state.student.train()
    batches = [load_batch(data.store, part) for part in micro_batches(np.array(indices), config.accumulation)]
    total = sum(batch.count() for batch in batches)
    losses_seen: list[torch.Tensor] = []
    parts_seen: dict[str, torch.Tensor] = {}
    for batch in batches:
        with accelerator.autocast():
            loss, parts = state.objective(
                model,
                batch.to(accelerator.device),
                total=total,
                share=batch.count() / total,
                fraction=state.step / steps,
            )
        accelerator.backward(loss)
        losses_seen.append(loss.detach())
        for name, part in parts.items():
            parts_seen[name] = parts_seen.get(name, torch.zeros_like(part)) + part
    loss = torch.stack(losses_seen).sum()
    norm = gradient_norm(state.student.parameters())
    if broken := non_finite({"loss": loss, "gradient": norm}):
        raise TrainingAborted(
            f"step {state.step}: the {' and the '.join(broken)} is not finite; the weights are as before this "
            "step, and the last checkpoint is kept; try a lower train.learning_rate or train.precision=fp32"
        )
    torch.nn.utils.clip_grads_with_norm_(state.student.parameters(), config.max_grad_norm, norm)
    rate = float(state.schedule.get_last_lr()[0])
    state.optimizer.step()
    state.schedule.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.objective.after_step(state.student)
    state.step += 1
    state.tokens_seen += total
    values: dict[str, float] = {"loss": float(loss), "grad_norm": float(norm), "learning_rate": rate}
    values |= {name: float(part) for name, part in parts_seen.items()}
    return values | {"tokens_seen": float(state.tokens_seen)}


def evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """Steps after which the held-out score is taken: the first, the last, and evenly in between."""
    return {round(steps * place / (evaluations - 1)) for place in range(evaluations)}


@torch.no_grad()
def held_out_score(
    student: SO8TForCausalLM, data: TrainingData, device: torch.device, batch_size: int
) -> HeldOutScore:
    """Score the student in float32 on the held-out sequences of the store."""
    student.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    count = 0
    held_out = data.split.held_out
    for start in range(0, len(held_out), batch_size):
        batch = load_batch(data.store, held_out[start : start + batch_size]).to(device)
        hidden = student(batch.tokens, with_logits=False).last_hidden_state[batch.valid]
        logits = student.lm_head(hidden).float()
        sums[0] += losses.known_kl(logits, batch.targets, EVALUATION_TEMPERATURE).cpu().double().sum()
        sums[1] += (logits.argmax(dim=-1) == batch.targets.best()).cpu().double().sum()
        sums[2] += losses.cross_entropy(logits, batch.labels).cpu().double().sum()
        count += batch.count()
    kl, agreement, cross_entropy = (sums / count).tolist()
    return HeldOutScore(kl, agreement, cross_entropy)
