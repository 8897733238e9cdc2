"""What training came to, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distill.training.validation import HeldOutScore


@dataclass(frozen=True)
class TrainingSummary:
    """What training did: steps in all, tokens learnt from, and the held-out scores in order of
    steps.

    ``seconds`` counts this process alone, which began at step ``continued_from``. ``best``: the
    step whose weights the student has now; ``planned``: steps there would have been without early
    stopping.
    """

    steps: int
    tokens_seen: int
    seconds: float
    continued_from: int
    scores: tuple[tuple[int, HeldOutScore], ...]
    precision: str
    best: int
    planned: int

    def to_json(self) -> dict[str, Any]:
        """What does not depend on the machine's speed, as JSON takes it; the scores are the
        caller's."""
        return {
            "steps": self.steps,
            "planned_steps": self.planned,
            "best_step": self.best,
            "tokens_seen": self.tokens_seen,
            "continued_from_step": self.continued_from,
            "precision": self.precision,
        }
