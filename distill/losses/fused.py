"""Weighted divergence and cross-entropy of one chunk of logits with their gradient in closed form.

The same values as ``distill.losses.divergences`` gives through autograd, in a third of the passes
over the logits: one softmax serves both terms where T = 1, nothing is kept for a backward pass, and
every large buffer is written in place. Letters: C positions of a chunk, K stored top tokens, V
vocabulary.

With q the student's distribution at T and p the teacher's, where p is known for every token, a
divergence D = Σ d(p_v, q_v) has, with g_v = ∂d/∂q_v (any constant may be added to it):

    ∂D/∂z_v = q_v (g_v − Σ_u q_u g_u) / T

    forward KL           g = −p / q,  so that ∂D/∂z_v = (q_v − p_v) / T
    reverse KL           g = log(q / p)
    Jensen-Shannon       g = (1 − b) log(q / m)
    skewed forward KL    g = −(1 − s) p / m
    skewed reverse KL    g = log(q / m) − s q / m

with the mixtures m of ``distill.losses.divergences``. Where p is known for only K tokens S, with
the others as one bucket, the same holds for the K + 1 buckets; the last one's share G is spread
over its tokens, Q being the student's mass there:

    ∂D/∂z_v = (q_v / Q) · G    for v not in S;   forward KL: G = (Q − P) / T with the teacher's mass P

Cross-entropy, always at T = 1:

    ∂CE/∂z_v = softmax(z)_v − [v is the label]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.losses.divergences import FORWARD_KL, IGNORE_INDEX, Divergence, teacher_buckets
from teachers.targets.distributions import CompactTargets
from teachers.targets.stored_arrays import Targets

LOG2_E = math.log2(math.e)
BLOCK_BYTES = (
    4 << 20
)  # of float32 logits that elementwise passes take together on a CPU (docs/benchmarks.md)


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

    The gradient may lie in the scratch: it is good until the next chunk.
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
    """Room for large temporaries that is used again by the next chunk: asking the system for it
    costs as much as computing with it."""

    def __init__(self) -> None:
        self._room: dict[str, Tensor] = {}

    def like(self, name: str, tensor: Tensor) -> Tensor:
        """Room of the shape of ``tensor [C, V]``, with whatever is in it."""
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

    The divergence runs over the whole vocabulary where the targets know the shape of the tail, else
    over the K + 1 buckets. ``labels [C]``; one that is ``IGNORE_INDEX`` has no cross-entropy.
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
        plain = _exp_(logits)
        plain_partition = plain.sum(dim=-1, keepdim=True)
    by_kd, by_ce = weights.kd / temperature, weights.ce * labelled

    if weights.divergence.form == "forward_kl":
        # Σ p (log p − log q) = Σ p (log p − z/T) + log Σ exp(z/T), as Σ p = 1.
        difference = torch.sub(teacher, scaled, out=spare)
        share, tempered = _exp_(teacher), _exp_(scaled)
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
        values, pull = _pull_(
            teacher, scaled.sub_(partition.log()), student, weights.divergence, room
        )
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
        plain = tempered = _Buckets.of(_exp_(rest), top, kept)
    else:
        scaled = rest / temperature
        plain = _Buckets.of(_exp_(rest), top, kept)
        tempered = _Buckets.of(_exp_(scaled), top / temperature, kept / temperature)

    student = torch.cat((tempered.kept, tempered.rest), dim=-1)
    teacher, room = teacher_buckets(targets, temperature), torch.empty_like(student)
    values, pull = _pull_(teacher, student, student.exp(), weights.divergence, room)
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
    teacher: Tensor, log_student: Tensor, student: Tensor, kind: Divergence, room: Tensor
) -> tuple[Tensor, Tensor]:
    """Divergence of each row, ``[C]``, and q_v (g_v − Σ_u q_u g_u), ``[C, n]``.

    ``teacher`` and ``log_student`` are log-probabilities ``[C, n]``, ``student`` probabilities; all
    but the last are overwritten, and so is ``room``. The second result lies in one of them.
    """
    ratio = torch.sub(teacher, log_student, out=log_student)
    if kind.form == "forward_kl":
        share = _exp_(teacher)
        values = torch.linalg.vecdot(share, ratio)
        return values, torch.sub(student, share, out=ratio)
    if kind.form == "reverse_kl":
        slope = ratio.neg_()
        values = torch.linalg.vecdot(student, slope)
    elif kind.form == "jensen_shannon":
        b = kind.js_mixing
        of_teacher = torch.linalg.vecdot(_exp_(teacher), _log_teacher_to_mixture(ratio, kind, room))
        slope = _log_student_to_mixture(ratio, kind, room).mul_(1.0 - b)
        values = b * of_teacher + torch.linalg.vecdot(student, slope)
    elif kind.form == "skewed_forward_kl":
        to_mixture = _log_teacher_to_mixture(ratio, kind, room)
        values = torch.linalg.vecdot(_exp_(teacher), to_mixture)
        slope = _exp_(to_mixture).mul_(kind.skew - 1.0)
    else:
        slope = _log_student_to_mixture(ratio, kind, room)
        values = torch.linalg.vecdot(student, slope)
        slope.sub_(_exp_(ratio.copy_(slope)), alpha=kind.skew)
    mean = torch.linalg.vecdot(student, slope)[:, None]
    return values, slope.sub_(mean).mul_(student)


def _log_teacher_to_mixture(ratio: Tensor, kind: Divergence, room: Tensor) -> Tensor:
    """log(p / m) from log(p / q), into ``room``."""
    of_teacher, of_student = kind.log_shares
    torch.sub(ratio.new_tensor(of_student), ratio, out=room)
    return torch.logaddexp(room, ratio.new_tensor(of_teacher), out=room).neg_()


def _log_student_to_mixture(ratio: Tensor, kind: Divergence, room: Tensor) -> Tensor:
    """log(q / m) from log(p / q), into ``room``."""
    of_teacher, of_student = kind.log_shares
    torch.add(ratio, of_teacher, out=room)
    return torch.logaddexp(room, ratio.new_tensor(of_student), out=room).neg_()


def _exp_(values: Tensor) -> Tensor:
    """``values.exp_()``; PyTorch's exponential to base 2 is three times faster on a CPU, and as
    exact."""
    return values.mul_(LOG2_E).exp2_()
