"""What running a model costs: speed, and memory of llama.cpp's process."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from teachers.base import Teacher
from teachers.llama_cpp.teacher import GGUFTeacher


@dataclass(frozen=True)
class Cost:
    """Prompt and generation speed of one sequence in tokens per second, and the most bytes of main
    memory that llama.cpp's process had had by then. ``spread``: the fastest trial of writing in
    parts of the slowest.
    """

    prompt_speed: float
    generation_speed: float
    peak_memory: int
    spread: float = 1.0


def measure_cost(model: GGUFTeacher) -> Cost:
    """Read a prompt and write some tokens, three times, and take the medians.

    The model should be freshly loaded, and no other be at work: what else it is asked for takes
    memory of its own.
    """
    reading, writing = zip(*(measure_speed(model) for _ in range(SPEED_ROUNDS)), strict=True)
    spread = max(writing) / min(writing)
    return Cost(statistics.median(reading), statistics.median(writing), model.peak_memory(), spread)


SPEED_PROMPT_TOKENS = 128
SPEED_NEW_TOKENS = 64
SPEED_ROUNDS = 3
UNSTEADY = 1.5  # between trials on a machine that has nothing else to do it is less


def measure_speed(model: Teacher) -> tuple[float, float]:
    """Prompt and generation speed in tokens per second, within the model's context."""
    prompt = min(SPEED_PROMPT_TOKENS, model.info.context_length // 2)
    return model.speed(prompt, min(SPEED_NEW_TOKENS, model.info.context_length - prompt - 1))
