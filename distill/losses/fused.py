"""Weighted divergence and cross-entropy of one chunk of logits with their gradient in closed form.

The same values as ``distill.losses.divergences`` gives through autograd, in a third of the passes
over the logits: one softmax serves both terms where T = 1, nothing is kept for a backward pass, and
every large buffer is written in place. Letters: C positions of a chunk, K stored top tokens, V
vocabulary.

With q the student's distribution at T, p the teacher's and pull_v as in ``FORMS``, where p is known
for every token:

    ∂D/∂z_v = pull_v / T

Where p is known for only K tokens S, with the others as one bucket, the same holds for the K + 1
buckets; the last one's share G is spread over its tokens, Q being the student's mass there:

    ∂D/∂z_v = (q_v / Q) · G    for v not in S;   forward KL: G = (Q − P) / T, P the teacher's mass

Cross-entropy, always at T = 1:

    ∂CE/∂z_v = softmax(z)_v − [v is the label]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.losses.divergences import (
    FORMS,
    FORWARD_KL,
    IGNORE_INDEX,
    LOG2_E,
    ChunkRows,
    Divergence,
    exp_,
    teacher_buckets,
)
from teachers.targets.distributions import CompactTargets
from teachers.targets.stored_arrays import Targets

# Of float32 logits that elementwise passes take together on a CPU (docs/benchmarks.md).
BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Weights:
    """What one position's ``divergence`` at ``temperature`` and its cross-entropy (always at T =
    1) count."""

    kd: float
    ce: float
    temperature: float
    divergence: Divergence = FORWARD_KL


@dataclass(frozen=True)
class ChunkResult:
    """Unweighted sums over the chunk in nats (scalars), and the gradient of the weighted sum, ``[C,
    V]``.

    The gradient may lie in the scratch: it is valid until the next chunk.
    """

    kd: Tensor
    ce: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class _Buckets:
    """A student's distribution at one temperature: K tokens and the rest.

    ``exponentials [C, V]`` are proportional to the probabilities of the rest (0 at the K tokens)
    with row sums ``total [C, 1]``; ``kept [C, K]`` and ``rest [C, 1]`` are log-probabilities;
    ``partition [C, 1]``.
    """

    exponentials: Tensor
    total: Tensor
    kept: Tensor
    rest: Tensor
    partition: Tensor

    @classmethod
    def of(cls, exponentials: Tensor, top: Tensor, kept: Tensor) -> _Buckets:
        """``top``: the rest's greatest logit, which was subtracted; ``kept``: logits; both
        divided by T."""
        total = exponentials.sum(dim=-1, keepdim=True)
        rest = top + total.log()
        partition = torch.cat((kept, rest), dim=-1).logsumexp(dim=-1, keepdim=True)
        return cls(exponentials, total, kept - partition, rest - partition, partition)


class Scratch:
    """Buffers for large temporaries, reused by the next chunk: allocating them costs as much as
    computing with them."""

    def __init__(self) -> None:
        self._room: dict[str, Tensor] = {}

    def like(self, name: str, tensor: Tensor) -> Tensor:
        """A buffer of the shape of ``tensor [C, V]``, not initialized."""
        room = self._room.get(name)
        if room is None or len(room) < len(tensor) or room.shape[1:] != tensor.shape[1:]:
            room = self._room[name] = torch.empty_like(tensor)
        return room[: len(tensor)]


@torch.no_grad()
def divergence_and_cross_entropy(
    logits: Tensor,
    targets: Targets,
    labels: Tensor,
    weights: Weights,
    scratch: Scratch | None = None,
) -> ChunkResult:
    """The divergence of teacher and student at T, and CE, of float32 ``logits [C, V]``, which are
    overwritten.

    ``labels [C]``; one that is ``IGNORE_INDEX`` has no cross-entropy.
    """
    if isinstance(targets, CompactTargets) and not targets.has_tail_shape:
        return _over_buckets(logits, targets, labels, weights)
    scratch = scratch or Scratch()
    raw = targets.head_logits(scratch.like("raw", logits)) if len(logits) else None
    # Passes over a few rows at a time find them in the processor's own cache.
    together = (
        max(1, BLOCK_BYTES // (4 * logits.shape[-1]))
        if logits.device.type == "cpu"
        else len(logits)
    )
    sums = logits.new_zeros(2)
    for start in range(0, len(logits), max(1, together)):
        rows = slice(start, start + together)
        sums += _over_all_(
            logits[rows],
            targets.select(rows),
            None if raw is None else raw[rows],
            labels[rows],
            weights,
            scratch,
        )
    return ChunkResult(sums[0], sums[1], logits)


def _over_all_(
    logits: Tensor,
    targets: Targets,
    raw: Tensor | None,
    labels: Tensor,
    weights: Weights,
    scratch: Scratch,
) -> Tensor:
    """Sums of both terms over some rows, ``[2]``; ``logits [C, V]`` become their gradient.

    ``raw``: what the targets' head says of these rows.
    """
    temperature = weights.temperature
    column, labelled = labels.clamp(min=0)[:, None], (labels != IGNORE_INDEX)[:, None].float()
    at_label = logits.gather(-1, column)
    top = logits.amax(dim=-1, keepdim=True)
    spare = scratch.like("spare", logits)
    teacher = targets.log_probs(temperature, raw, spare)
    logits.sub_(top)
    scaled = logits
    if temperature != 1.0:
        scaled = torch.div(logits, temperature, out=scratch.like("scaled", logits))
        plain = exp_(logits)
        plain_partition = plain.sum(dim=-1, keepdim=True)
    by_kd, by_ce = weights.kd / temperature, weights.ce * labelled

    if weights.divergence.form == "forward_kl":
        # Σ p (log p − log q) = Σ p (log p − z/T) + log Σ exp(z/T), as Σ p = 1.
        difference = torch.sub(teacher, scaled, out=spare)
        share, tempered = exp_(teacher), exp_(scaled)
        partition = tempered.sum(dim=-1, keepdim=True)
        kd = (torch.linalg.vecdot(share, difference)[:, None] + partition.log()).sum()
        if temperature == 1.0:
            plain_partition = partition
            logits.mul_((by_kd + by_ce) / partition)
        else:
            logits.mul_(by_ce / plain_partition).addcmul_(tempered, by_kd / partition)
        logits.sub_(share, alpha=by_kd)
    else:
        student = torch.mul(scaled, LOG2_E, out=spare).exp2_()
        partition = student.sum(dim=-1, keepdim=True)
        student.div_(partition)
        room = scratch.like("room", logits)
        log_student = scaled.sub_(partition.log())
        values, pull = _pull_(teacher, log_student, student, room, weights.divergence)
        kd = values.sum()
        if temperature == 1.0:
            plain_partition = partition
            pull.mul_(by_kd).addcmul_(student, by_ce)
            logits.copy_(pull)  # which may be the same
        else:
            logits.mul_(by_ce / plain_partition).add_(pull, alpha=by_kd)
    ce = (labelled * (plain_partition.log() + top - at_label)).sum()
    logits.scatter_add_(-1, column, -by_ce)
    return torch.stack((kd, ce))


def _over_buckets(
    logits: Tensor, targets: CompactTargets, labels: Tensor, weights: Weights
) -> ChunkResult:
    temperature, ids = weights.temperature, targets.topk_ids
    column, labelled = labels.clamp(min=0)[:, None], (labels != IGNORE_INDEX)[:, None].float()
    at_label, kept = logits.gather(-1, column), logits.gather(-1, ids)
    # The rest is taken relative to its own maximum: exact also where a student has almost nothing
    # there. All other logits are taken relative to the row's, which keeps the digits of large ones.
    rest = logits.scatter_(-1, ids, -torch.inf)
    top = rest.amax(dim=-1, keepdim=True)
    rest.sub_(top)
    highest = torch.maximum(top, kept.amax(dim=-1, keepdim=True))
    at_label, kept, top = at_label - highest, kept - highest, top - highest
    if temperature == 1.0:
        plain = tempered = _Buckets.of(exp_(rest), top, kept)
    else:
        scaled = rest / temperature
        plain = _Buckets.of(exp_(rest), top, kept)
        tempered = _Buckets.of(exp_(scaled), top / temperature, kept / temperature)

    log_student = torch.cat((tempered.kept, tempered.rest), dim=-1)
    teacher, room = teacher_buckets(targets, temperature), torch.empty_like(log_student)
    values, pull = _pull_(teacher, log_student, log_student.exp(), room, weights.divergence)
    ce = (labelled * (plain.partition - at_label)).sum()

    by_kd, by_ce = weights.kd / temperature, weights.ce * labelled
    kd_factor = by_kd * pull[:, -1:] / tempered.total
    ce_factor = by_ce * plain.rest.exp() / plain.total
    if plain is tempered:
        gradient = tempered.exponentials.mul_(kd_factor + ce_factor)
    else:
        gradient = tempered.exponentials.mul_(kd_factor).addcmul_(plain.exponentials, ce_factor)
    gradient.scatter_(-1, ids, by_kd * pull[:, :-1] + by_ce * plain.kept.exp())
    gradient.scatter_add_(-1, column, -by_ce)
    return ChunkResult(values.sum(), ce, gradient)


def _pull_(
    teacher: Tensor, log_student: Tensor, student: Tensor, room: Tensor, kind: Divergence
) -> tuple[Tensor, Tensor]:
    """Divergence of each row ``[C]`` and the pull ``[C, n]``; log p and log q are overwritten."""
    ratio = torch.sub(teacher, log_student, out=log_student)
    return FORMS[kind.form].pull_(ChunkRows(teacher, student, ratio, room, kind))
