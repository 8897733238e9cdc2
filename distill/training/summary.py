"""The result of training in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distill.runtime.format import human_count
from distill.training.validation import ValidationScore


@dataclass(frozen=True)
class TrainingSummary:
    """``seconds``: of this process alone, which started at step ``continued_from``, and ``aside``:
    of them those of validation, weighing and checkpoints; ``best``: the step whose weights the
    student has now; ``planned``: steps without early stopping; ``padding``: share of the computed
    positions that are padding."""

    steps: int
    tokens_seen: int
    seconds: float
    aside: float
    continued_from: int
    scores: tuple[tuple[int, ValidationScore], ...]
    precision: str
    optimizer: str
    best: int
    planned: int
    padding: float

    def in_words(self, name: str) -> str:
        """Training in a line; ``name``: of the validation points' KL."""
        scores = dict(self.scores)
        text = f"{self.steps} steps, {human_count(self.tokens_seen)} tokens, "
        text += f"{self.padding:.1%} of the computed positions padding, "
        text += f"{self.aside / self.seconds:.1%} of the time validation and checkpoints; {name} "
        text += f"{scores[0].kl:.3f} → {scores[self.best].kl:.3f}"
        if self.steps < self.planned:
            text += f"; stopped early, {self.planned} steps were planned"
        if self.best < self.steps:
            text += f"; the best weights are those of step {self.best}"
        return text

    def to_json(self) -> dict[str, Any]:
        """All but the scores and what depends on the machine's speed."""
        return {
            "steps": self.steps,
            "planned_steps": self.planned,
            "best_step": self.best,
            "tokens_seen": self.tokens_seen,
            "continued_from_step": self.continued_from,
            "precision": self.precision,
            "optimizer": self.optimizer,
            "padding": round(self.padding, 4),
        }
