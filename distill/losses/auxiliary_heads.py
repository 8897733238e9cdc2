"""What the safety and the verification head add to the loss."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from students.model.heads import VerificationHead, certainty
from students.model.interface import Student
from teachers.targets.stored_arrays import Targets

if TYPE_CHECKING:
    from distill.losses.batch import Batch, Prompts


# The share of the safety loss's gradient that reaches the layers. It is that of a few prompts, so
# noisy that at full strength Adam's steps for everything else shrink (docs/decisions.md).
BODY_GRADIENT = 0.5


@dataclass
class VerificationTargets:
    """Where among a micro-batch's n valid positions the verification head is trained, and on what.

    ``rows [m]``: those positions, ascending, as ``numbers`` too; ``certain [m, 2]``: the student's
    certainty there (see ``students.model.heads.certainty``); ``agreed [m]``: 1 where student and
    teacher have the same top token.
    """

    rows: Tensor
    numbers: list[int]
    certain: Tensor
    agreed: Tensor

    @classmethod
    def of(cls, batch: Batch) -> VerificationTargets:
        """Nothing filled in yet, for the positions that the batch's layout says."""
        rows = batch.layout.verified
        zeros = torch.zeros(len(rows), 3, device=rows.device)
        return cls(rows, batch.layout.verified_numbers, zeros[:, :2], zeros[:, 2])

    def fill(self, logits: Tensor, targets: Targets, span: slice) -> None:
        """Fill in the positions within ``span`` from their logits ``[C, V]``; ``targets``: of the
        whole micro-batch."""
        inside = slice(*(bisect_left(self.numbers, at) for at in (span.start, span.stop)))
        rows = self.rows[inside]
        if len(rows):
            chosen = logits[rows - span.start]
            self.certain[inside] = certainty(chosen)
            self.agreed[inside] = (chosen.argmax(dim=-1) == targets.select(rows).best()).float()


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
