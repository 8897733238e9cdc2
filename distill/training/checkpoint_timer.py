"""When the next checkpoint is due, how fast training goes, and what takes time beside it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from distill.training.checkpoint import TrainingState

CHECKPOINT_SECONDS = 30.0  # about how much training is lost when a process is killed
SAVING_SHARE = 0.015  # of the time may go into checkpoints


class CheckpointTimer:
    """How long this process has trained, and when the next checkpoint is due."""

    def __init__(self, from_step: int, from_tokens: int) -> None:
        self.from_step = self.saved_step = from_step
        self.from_tokens = from_tokens
        self.start = self.last_save = time.perf_counter()
        self.interval = CHECKPOINT_SECONDS
        self.aside = 0.0  # seconds of validation, weighing and checkpoints

    @property
    def seconds(self) -> float:
        """Seconds since this process started to train."""
        return time.perf_counter() - self.start

    def trained_since_save(self, step: int) -> bool:
        """Whether there is anything to save that is not saved."""
        return step > self.saved_step

    def rolled_back(self) -> None:
        """The guard went back to an earlier step: a checkpoint is due at once."""
        self.saved_step, self.last_save = -1, -math.inf

    def save_is_due(self, accelerator: Accelerator) -> bool:
        """Whether it is time for a checkpoint; the first process decides for all."""
        due = time.perf_counter() - self.last_save > self.interval
        if accelerator.num_processes > 1:
            due = bool(broadcast(torch.tensor(int(due), device=accelerator.device)))
        return due

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Time the writing of a checkpoint; a slow one makes them rarer."""
        start = time.perf_counter()
        with self.beside_training():
            yield
        self.saved_step, self.last_save = step, time.perf_counter()
        self.interval = max(CHECKPOINT_SECONDS, (self.last_save - start) / SAVING_SHARE)

    @contextmanager
    def beside_training(self) -> Iterator[None]:
        """Time what is no step."""
        start = time.perf_counter()
        yield
        self.aside += time.perf_counter() - start

    def describe(self, state: TrainingState, loss: float, name: str) -> str:
        """One line on the state of training; ``name``: of the validation points' KL."""
        speed = (state.tokens_seen - self.from_tokens) / max(self.seconds, 1e-9)
        newest = state.scores[max(state.scores)] if state.scores else None
        score = f", {name} {newest.kl:.3f}" if newest else ""
        return f"loss {loss:.3f}{score}, {speed:,.0f} tokens/s"
