"""Weighted KL and cross-entropy of one chunk of logits with their gradient in closed form.

The same values as ``distill.losses`` gives through autograd, in a third of the passes over the logits: one
softmax serves both terms where T = 1, nothing is kept for a backward pass, and every large buffer is written
in place. Letters: C positions of a chunk, K stored top tokens, V vocabulary.

With q the student's distribution at T and p the teacher's, where p is known for every token:

    ∂KL/∂z_v = (q_v − p_v) / T

and where only K tokens S are, with the others as one bucket, of mass P for the teacher and Q for the student:

    ∂KL/∂z_v = (q_v − p_v) / T               for v in S
    ∂KL/∂z_v = (q_v / Q) · (Q − P) / T       otherwise

Cross-entropy, always at T = 1:

    ∂CE/∂z_v = softmax(z)_v − [v is the label]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.losses import IGNORE_INDEX
from teachers.records import Targets
from teachers.soft_targets import CompactTargets

LOG2_E = math.log2(math.e)


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


class Scratch:
    """Room for large temporaries that is used again by the next chunk: asking the system for it costs as much as
    computing with it."""

    def __init__(self) -> None:
        self._room: dict[str, Tensor] = {}

    def like(self, name: str, tensor: Tensor) -> Tensor:
        """Room of the shape of ``tensor [C, V]``, with whatever is in it."""
        room = self._room.get(name)
        if room is None or len(room) < len(tensor) or room.shape[1:] != tensor.shape[1:]:
            room = self._room[name] = torch.empty_like(tensor)
        return room[: len(tensor)]


@torch.no_grad()
def kl_and_cross_entropy(
    logits: Tensor, targets: Targets, labels: Tensor, weights: Weights, scratch: Scratch | None = None
) -> ChunkResult:
    """KL_T(teacher ‖ student) and CE of float32 ``logits [C, V]``, which are overwritten.

    The KL runs over the whole vocabulary where the targets know the shape of the tail, else over the K + 1
    buckets. ``labels [C]``; one that is ``IGNORE_INDEX`` has no cross-entropy.
    """
    if isinstance(targets, CompactTargets) and not targets.has_tail_shape:
        return _over_buckets(logits, targets, labels, weights)
    return _over_all(logits, targets, labels, weights, scratch or Scratch())


def _over_all(
    logits: Tensor, targets: Targets, labels: Tensor, weights: Weights, scratch: Scratch
) -> ChunkResult:
    temperature = weights.temperature
    column, labelled = labels.clamp(min=0)[:, None], (labels != IGNORE_INDEX)[:, None].float()
    at_label = logits.gather(-1, column)
    top = logits.amax(dim=-1, keepdim=True)
    spare = scratch.like("spare", logits)
    teacher = targets.log_probs(temperature, scratch.like("teacher", logits), spare)
    logits.sub_(top)
    scaled = logits
    if temperature != 1.0:
        scaled = torch.div(logits, temperature, out=scratch.like("scaled", logits))
    # Σ p (log p − log q) = Σ p (log p − z/T) + log Σ exp(z/T), as Σ p = 1.
    difference = torch.sub(teacher, scaled, out=spare)
    share, tempered = _exp_(teacher), _exp_(scaled)
    partition = tempered.sum(dim=-1, keepdim=True)
    kl = (torch.linalg.vecdot(share, difference)[:, None] + partition.log()).sum()

    by_kl, by_ce = weights.kl / temperature, weights.ce * labelled
    if temperature == 1.0:
        plain_partition = partition
        gradient = tempered.mul_((by_kl + by_ce) / partition)
    else:
        plain = _exp_(logits)
        plain_partition = plain.sum(dim=-1, keepdim=True)
        gradient = tempered.mul_(by_kl / partition).addcmul_(plain, by_ce / plain_partition)
    ce = (labelled * (plain_partition.log() + top - at_label)).sum()
    gradient.sub_(share, alpha=by_kl)
    gradient.scatter_add_(-1, column, -by_ce)
    return ChunkResult(kl, ce, gradient)


def _over_buckets(logits: Tensor, targets: CompactTargets, labels: Tensor, weights: Weights) -> ChunkResult:
    temperature, ids = weights.temperature, targets.topk_ids
    column, labelled = labels.clamp(min=0)[:, None], (labels != IGNORE_INDEX)[:, None].float()
    at_label, kept = logits.gather(-1, column), logits.gather(-1, ids)
    # The rest is taken relative to its own maximum: exact also where a student has almost nothing there.
    rest = logits.scatter_(-1, ids, -torch.inf)
    top = rest.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(rest.dtype).min)
    rest.sub_(top)
    if temperature == 1.0:
        plain = tempered = _Buckets.of(_exp_(rest), top, kept)
    else:
        scaled = rest / temperature
        plain = _Buckets.of(_exp_(rest), top, kept)
        tempered = _Buckets.of(_exp_(scaled), top / temperature, kept / temperature)

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


def _exp_(values: Tensor) -> Tensor:
    """``values.exp_()``; PyTorch's exponential to base 2 is three times faster on a CPU, and as exact."""
    return values.mul_(LOG2_E).exp2_()
