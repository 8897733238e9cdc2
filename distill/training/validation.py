"""How close the student is to the teacher on some validation sequences during training; early
stopping and the best step follow from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.losses import divergences
from distill.losses.batch import Batch
from distill.losses.chunked_lm_head import chunk_size, head_logits, logits_bytes
from distill.metrics.closeness import kl_name, kl_over
from distill.runtime.cpu import onednn_for_float32
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
    """Score a training module (see ``distill.training.distributed``) on batches.

    Its layers compute in float32, or as autocast says; logits are float32. Under autocast their
    products may round both factors to bfloat16, where a CPU is faster so.
    """
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
    rounded = torch.is_autocast_enabled(device)
    hidden = batch.run(student, with_logits=False).last_hidden_state
    assert hidden is not None
    # Logits that are bfloat16 themselves would tie: agreement would seem 1 % higher.
    with (
        torch.autocast(device, enabled=False),
        onednn_for_float32(exactly=not rounded) if device == "cpu" else nullcontext(),
    ):
        matrix = student.output_matrix()
        states = batch.at_valid(hidden).to(matrix.dtype)  # a base may be bfloat16 itself
        labels, sums = batch.labels, []
        # Several buffers as large as the logits lie beside them.
        room = logits_bytes(states.device) // 4
        together = chunk_size(len(matrix), room)
        for start in range(0, len(states), together):
            span = slice(start, start + together)
            logits = head_logits(states[span], matrix)
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


# Validation points from one weighing of all matrices to the next, and the share of a training's
# products that those between the first and the last may take.
WEIGH_EVERY, WEIGH_SHARE = 4, 0.01


def evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """Steps after which the student is scored: the first, the last, and evenly in between."""
    return {round(steps * number / (evaluations - 1)) for number in range(evaluations)}


def weighing_steps(points: set[int], weighing: float, training: float) -> set[int]:
    """The validation points at which all matrices are weighed: the first, the last, and in between
    every fourth, unless the training is so short that these would take too much of it.

    Counted in products, not by the clock, so that a run that is continued weighs at the same steps.

    Args:
        points: see ``evaluation_steps``.
        weighing: products that one weighing takes as long as.
        training: products of all steps.
    """
    between = set(sorted(points)[WEIGH_EVERY:-1:WEIGH_EVERY])
    if len(between) * weighing > WEIGH_SHARE * training:
        between = set()
    return between | {min(points), max(points)}
