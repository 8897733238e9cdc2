"""What the safety and the verification head add to the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.losses.chunked_lm_head import logits_in_chunks
from students.model.heads import VerificationHead, certainty
from students.model.interface import Student

if TYPE_CHECKING:
    from distill.losses.batch import Batch, Prompts


# The share of the safety loss's gradient that reaches the layers. It is that of a few prompts, so
# noisy that at full strength Adam's steps for everything else shrink (docs/decisions.md).
BODY_GRADIENT = 0.5
ROWS = 32  # of logits whose certainty is computed at a time


@dataclass
class VerificationTargets:
    """Where among a micro-batch's n valid positions the verification head is trained, and on what.

    ``rows [m]``: those positions; ``certain [m, 2]``: the student's certainty there (see
    ``students.model.heads.certainty``); ``agreed [m]``: 1 where student and teacher have the same
    top token.
    """

    rows: Tensor
    certain: Tensor
    agreed: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, batch: Batch, states: Tensor, matrix: Tensor) -> VerificationTargets:
        """At the positions that the batch's layout says, from the ``states [n, D]`` of all and the
        output matrix ``[V, D]``."""
        rows = batch.layout.verified
        certain, agreed = [states.new_zeros(0, 2)], [states.new_zeros(0)]
        for span, logits in logits_in_chunks(states[rows], matrix):
            best = batch.targets.select(rows[span]).best()
            # Few rows at a time, in memory that the processor has at hand.
            for part, theirs in zip(logits.split(ROWS), best.split(ROWS), strict=True):
                certain.append(certainty(part))
                agreed.append((part.argmax(dim=-1) == theirs).float())
        return cls(rows, torch.cat(certain), torch.cat(agreed))


def verification_loss(
    head: VerificationHead, states: Tensor, targets: VerificationTargets
) -> Tensor:
    """Sum of the binary cross-entropy at the chosen positions of ``states [n, D]``, in nats; it
    trains the head alone."""
    log_odds = head(states[targets.rows].detach(), targets.certain)
    return F.binary_cross_entropy_with_logits(log_odds, targets.agreed, reduction="sum")


def safety_loss(student: Student, prompts: Prompts | None) -> Tensor:
    """Weighted sum over prompts of the cross-entropy between labels and decisions at the last
    token, in nats; its gradient reaches the student's layers at ``BODY_GRADIENT`` of its strength.

    Without prompts it is 0, and so is the gradient of every parameter of the head: with several
    processes each must get one in every step.
    """
    if prompts is None:
        sums = [parameter.sum() for parameter in student.safety_head.parameters()]
        return 0.0 * torch.stack(sums).sum()
    output = student(prompts.tokens, with_logits=False)
    rows = torch.arange(len(prompts.lengths), device=prompts.tokens.device)
    last = output.last_hidden_state[rows, prompts.lengths - 1]
    last = last.detach() + BODY_GRADIENT * (last - last.detach())
    losses = F.cross_entropy(student.safety_head(last), prompts.labels, reduction="none")
    return (losses * prompts.weights).sum()
