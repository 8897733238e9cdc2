"""What running a model costs: speed, and memory of llama.cpp's process."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from teachers.base import Teacher
from teachers.llama_cpp.teacher import GGUFTeacher


@dataclass(frozen=True)
class Cost:
    """Prompt and generation speed of one sequence in tokens per second, and llama.cpp's peak memory
    in bytes. ``spread``: the fastest generation trial over the slowest."""

    prompt_speed: float
    generation_speed: float
    peak_memory: int
    spread: float = 1.0


def measure_cost(model: GGUFTeacher) -> Cost:
    """Medians of three speed trials; the model is freshly loaded and the machine idle."""
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
