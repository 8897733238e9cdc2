"""How long a student generates the same tokens as its teacher at temperature 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distill.metrics.distributions import agreeing_prefix, mean_figures
from distill.metrics.intervals import Figure
from teachers.base import GenerationRequest, Sampling, Tokens
from teachers.llama_cpp.teacher import GGUFTeacher

SEQUENCES = 32  # of the text, whose first halves are continued
NEW_TOKENS = 32


@dataclass(frozen=True)
class GreedyScore:
    """``prefix``: mean number of equal tokens; ``same``: share of continuations equal to the
    end."""

    prefix: Figure
    same: Figure


@dataclass(frozen=True)
class GreedyPrompts:
    """What is continued, by at most ``new_tokens`` tokens each."""

    prompts: list[Tokens]
    new_tokens: int


def greedy_prompts(sequences: Sequence[Tokens], room: int) -> GreedyPrompts | None:
    """The first halves of the first sequences; ``None`` where ``room`` leaves nothing to write."""
    prompts = [tokens[: max(1, len(tokens) // 2)] for tokens in sequences[:SEQUENCES]]
    new_tokens = min(NEW_TOKENS, room - max(map(len, prompts)))
    return GreedyPrompts(prompts, new_tokens) if new_tokens > 0 else None


def continuations(
    model: GGUFTeacher, start: GreedyPrompts, progress: Callable[[float], None]
) -> list[Tokens]:
    """What the model generates after each prompt at temperature 0, an end-of-turn token
    included."""
    longest = max(map(len, start.prompts)) + start.new_tokens
    rows = model.generate(
        GenerationRequest(
            [[prompt] for prompt in start.prompts], Sampling(0.0, max_length=longest)
        ),
        progress,
    )
    # Behind a shorter beginning there was room for more.
    return [
        tokens[len(prompt) : len(prompt) + start.new_tokens]
        for tokens, prompt in zip(rows, start.prompts, strict=True)
    ]


def greedy_scores(
    teacher: GGUFTeacher,
    students: Mapping[str, GGUFTeacher],
    start: GreedyPrompts,
    progress: Callable[[float], None] = lambda done: None,
) -> dict[str, GreedyScore]:
    """Each student's score; ``progress`` counts continuations over all models."""
    done = 0

    def write(model: GGUFTeacher) -> list[list[int]]:
        nonlocal done
        rows = continuations(model, start, lambda count: progress(done + count))
        done += len(rows)
        return [tokens.tolist() for tokens in rows]

    expected = write(teacher)
    scores = {}
    for name, student in students.items():
        pairs = list(zip(expected, write(student), strict=True))
        values = [(agreeing_prefix(ours, theirs), ours == theirs) for ours, theirs in pairs]
        scores[name] = GreedyScore(
            *mean_figures(np.array(values, dtype=np.float64), [1] * len(values))
        )
    return scores
