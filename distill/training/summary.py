"""The result of training in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distill.training.validation import ValidationScore


@dataclass(frozen=True)
class TrainingSummary:
    """``seconds``: of this process alone, which started at step ``continued_from``; ``best``: the
    step whose weights the student has now; ``planned``: steps without early stopping;
    ``padding``: share of the computed positions that are padding."""

    steps: int
    tokens_seen: int
    seconds: float
    continued_from: int
    scores: tuple[tuple[int, ValidationScore], ...]
    precision: str
    best: int
    planned: int
    padding: float

    def to_json(self) -> dict[str, Any]:
        """All but the scores and what depends on the machine's speed."""
        return {
            "steps": self.steps,
            "planned_steps": self.planned,
            "best_step": self.best,
            "tokens_seen": self.tokens_seen,
            "continued_from_step": self.continued_from,
            "precision": self.precision,
            "padding": round(self.padding, 4),
        }
