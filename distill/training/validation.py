"""How close the student is to the teacher on some validation sequences during training; early
stopping and the best step follow from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.losses import divergences
from distill.losses.batch import Batch
from distill.losses.chunked_lm_head import chunk_size, head_logits, logits_bytes
from distill.metrics.closeness import kl_name, kl_over
from stability.precision import float64
from students.model.interface import Student
from teachers.targets.recipe import Recipe


@dataclass(frozen=True)
class ValidationScore:
    """How close the student is to the teacher on some validation sequences, per token, at T = 1.

    ``kl``: in nats, over k + 1 buckets for compact targets and over the whole vocabulary for
    others (``validation_kl`` says which); ``agreement``: share of positions with the same most
    probable token; ``cross_entropy``: of the actual next token, in nats.
    """

    kl: float
    agreement: float
    cross_entropy: float


def validation_kl(recipe: Recipe) -> str:
    """The name of ``ValidationScore.kl`` for targets of that recipe."""
    return f"validation {kl_name(kl_over(recipe.kind, recipe.num_topk))}"


def validation_score(model: nn.Module, batches: Iterable[Batch]) -> ValidationScore:
    """Score a training module (see ``distill.training.distributed``) in float32 on batches."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    count = 0
    with torch.no_grad():
        for batch in batches:
            sums += model(lambda student, _, batch=batch: _sums(student, batch)).cpu()
            count += batch.count()
    kl, agreement, cross_entropy = (sums / count).tolist()
    return ValidationScore(kl, agreement, cross_entropy)


def _sums(student: Student, batch: Batch) -> Tensor:
    """KL, agreement and cross-entropy summed over a batch's positions, float64 ``[3]``."""
    device = batch.tokens.device.type
    # Accelerate puts autocast around the module's forward pass.
    with torch.autocast(device, enabled=False):
        hidden = batch.run(student, with_logits=False).last_hidden_state
        assert hidden is not None
        states = batch.at_valid(hidden)
        labels, sums = batch.labels, []
        # Several buffers as large as the logits lie beside them.
        room = logits_bytes(states.device) // 4
        together = chunk_size(student.output_matrix().shape[0], room)
        for start in range(0, len(states), together):
            span = slice(start, start + together)
            logits = head_logits(states[span], student.output_matrix())
            targets = batch.targets.select(span)
            values = divergences.known_scores(logits, targets, labels[span])
            sums.append(torch.stack([float64(value).sum() for value in values]))
    return torch.stack(sums).sum(dim=0)


def best_step(scores: Mapping[int, ValidationScore]) -> int:
    """The step with the lowest validation KL; the later one of equals."""
    return min(scores, key=lambda step: (scores[step].kl, -step))


def is_exhausted(scores: Mapping[int, ValidationScore], patience: int | None) -> bool:
    """Whether the last ``patience`` evaluations brought no better KL (early stopping)."""
    return patience is not None and sum(step > best_step(scores) for step in scores) >= patience


def evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """Steps after which the student is scored: the first, the last, and evenly in between."""
    return {round(steps * number / (evaluations - 1)) for number in range(evaluations)}
