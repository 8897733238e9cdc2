"""Weighted KL and cross-entropy of one chunk of logits with their gradient in closed form.

The same values as ``distill.losses`` gives through autograd, in a third of the passes over the logits: one
softmax serves both terms where T = 1, nothing is kept for a backward pass, and every large buffer is written
in place. Letters: C positions of a chunk, K stored top tokens, V vocabulary.

With q the student's distribution at T, the K stored tokens S and the others as one bucket, of mass P for the
teacher and Q for the student:

    ∂KL/∂z_v = (q_v − p_v) / T               for v in S
    ∂KL/∂z_v = (q_v / Q) · (Q − P) / T       otherwise
    ∂CE/∂z_v = softmax(z)_v − [v is the label]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.losses import IGNORE_INDEX
from teachers.soft_targets import CompactTargets


@dataclass(frozen=True)
class Weights:
    """What one position's KL at ``temperature`` and its cross-entropy (always at T = 1) count."""

    kl: float
    ce: float
    temperature: float


@dataclass(frozen=True)
class ChunkResult:
    """Unweighted sums over the chunk in nats (scalars), and the gradient of the weighted sum, ``[C, V]``."""

    kl: Tensor
    ce: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class _Buckets:
    """A student's distribution at one temperature: K tokens and the rest.

    ``exponentials [C, V]`` are proportional to the probabilities of the rest (0 at the K tokens) with row sums
    ``total [C, 1]``; ``kept [C, K]`` and ``rest [C, 1]`` are log-probabilities; ``partition [C, 1]``.
    """

    exponentials: Tensor
    total: Tensor
    kept: Tensor
    rest: Tensor
    partition: Tensor

    @classmethod
    def of(cls, exponentials: Tensor, top: Tensor, kept: Tensor) -> _Buckets:
        """``top``: the rest's greatest logit, which was subtracted; ``kept``: logits; both divided by T."""
        total = exponentials.sum(dim=-1, keepdim=True).clamp(min=1.0)  # below 1 only where there is no rest
        rest = top + total.log()
        partition = torch.cat((kept, rest), dim=-1).logsumexp(dim=-1, keepdim=True)
        return cls(exponentials, total, kept - partition, rest - partition, partition)


@torch.no_grad()
def kl_and_cross_entropy(
    logits: Tensor, targets: CompactTargets, labels: Tensor, weights: Weights
) -> ChunkResult:
    """KL_T(teacher ‖ student) over the (K+1) buckets, and CE: float32 ``logits [C, V]``, which are overwritten.

    ``labels [C]``; one that is ``IGNORE_INDEX`` has no cross-entropy.
    """
    temperature, ids = weights.temperature, targets.topk_ids
    column, labelled = labels.clamp(min=0)[:, None], (labels != IGNORE_INDEX)[:, None].float()
    at_label, kept = logits.gather(-1, column), logits.gather(-1, ids)
    # The rest is taken relative to its own maximum: exact also where a student has almost nothing there.
    rest = logits.scatter_(-1, ids, -torch.inf)
    top = rest.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(rest.dtype).min)
    rest.sub_(top)
    if temperature == 1.0:
        plain = tempered = _Buckets.of(rest.exp_(), top, kept)
    else:
        plain = _Buckets.of(rest.exp(), top, kept)
        scaled = rest.div_(temperature).exp_()
        tempered = _Buckets.of(scaled, top / temperature, kept / temperature)

    teacher = targets.topk_log_probs(temperature)
    mass = targets.tail_mass(temperature)[:, None] * float(ids.shape[-1] < logits.shape[-1])
    kl = (teacher.exp() * (teacher - tempered.kept)).sum() + (
        torch.xlogy(mass, mass) - mass * tempered.rest
    ).sum()
    ce = (labelled * (plain.partition - at_label)).sum()

    by_kl, by_ce = weights.kl / temperature, weights.ce * labelled
    kl_factor = by_kl * (tempered.rest.exp() - mass) / tempered.total
    ce_factor = by_ce * plain.rest.exp() / plain.total
    if plain is tempered:
        gradient = tempered.exponentials.mul_(kl_factor + ce_factor)
    else:
        gradient = tempered.exponentials.mul_(kl_factor).addcmul_(plain.exponentials, ce_factor)
    gradient.scatter_(-1, ids, by_kl * (tempered.kept.exp() - teacher.exp()) + by_ce * plain.kept.exp())
    gradient.scatter_add_(-1, column, -by_ce)
    return ChunkResult(kl, ce, gradient)
