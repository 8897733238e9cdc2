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

Where the tokens are a sample of the vocabulary (``distill.losses.vocabulary_sample``), every sum
over them is one of exp(z / T + log w), the teacher's and the student's; the same formulas hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.losses.divergences import (
    FORMS,
    FORWARD_KL,
    IGNORE_INDEX,
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
    1) count.

    ``log_tokens [V]``: log of how many tokens of the vocabulary each stands for, 0 of stored top
    tokens and labels; ``None``: for itself alone.
    """

    kd: float
    ce: float
    temperature: float
    divergence: Divergence = FORWARD_KL
    log_tokens: Tensor | None = None


@dataclass(frozen=True)
class ChunkResult:
    """Unweighted sums over the chunk in nats (scalars), and the gradient of the weighted sum, ``[C,
    V]``, which lies where the logits were."""

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
        """A float32 buffer of the shape of ``tensor [C, V]``, not initialized."""
        room = self._room.get(name)
        if room is None or len(room) < len(tensor) or room.shape[1:] != tensor.shape[1:]:
            room = self._room[name] = torch.empty_like(tensor, dtype=torch.float32)
        return room[: len(tensor)]


@torch.no_grad()
def divergence_and_cross_entropy(
    logits: Tensor,
    targets: Targets,
    labels: Tensor,
    weights: Weights,
    scratch: Scratch | None = None,
) -> ChunkResult:
    """The divergence of teacher and student at T, and CE, of ``logits [C, V]``, which become the
    gradient. All is computed in float32, also where the logits are narrower.

    ``labels [C]``; one that is ``IGNORE_INDEX`` has no cross-entropy.
    """
    scratch = scratch or Scratch()
    by_buckets = isinstance(targets, CompactTargets) and not targets.has_tail_shape
    products = None if by_buckets or not len(logits) else targets.head_products()
    # Passes over a few rows at a time find them in the processor's own cache.
    few = max(1, BLOCK_BYTES // (4 * logits.shape[-1]))
    together = few if logits.device.type == "cpu" else max(1, len(logits))
    sums = logits.new_zeros(2, dtype=torch.float32)
    for start in range(0, len(logits), together):
        rows = slice(start, start + together)
        own, known = logits[rows], targets.select(rows)
        wide = own
        if own.dtype != torch.float32:
            wide = scratch.like("logits", own).copy_(own)
        if by_buckets:
            assert isinstance(known, CompactTargets)
            kd, ce, gradient = _over_buckets(wide, known, labels[rows], weights)
        else:
            said = None
            if products is not None:
                said = scratch.like("teacher", own).copy_(products[rows])
                said = known.completed_(said)
                if weights.log_tokens is not None:
                    said.add_(weights.log_tokens, alpha=weights.temperature)
            kd, ce, gradient = _over_all(wide, known, said, labels[rows], weights, scratch)
        sums += torch.stack((kd, ce))
        if gradient is not own:
            own.copy_(gradient)
    return ChunkResult(sums[0], sums[1], logits)


def _over_all(
    logits: Tensor,
    targets: Targets,
    said: Tensor | None,
    labels: Tensor,
    weights: Weights,
    scratch: Scratch,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of both terms over some rows, and their gradient in ``logits [C, V]``; overwrites these.

    ``said``: the teacher's logits where its exact answer does not say; overwritten, too.
    """
    temperature = weights.temperature
    column, labelled = labels.clamp(min=0)[:, None], (labels != IGNORE_INDEX)[:, None].float()
    logits.sub_(logits.amax(dim=-1, keepdim=True))  # first, which keeps the digits of large ones
    spare = scratch.like("spare", logits)
    by_kd, by_ce = weights.kd / temperature, weights.ce * labelled
    scaled, student = logits, logits
    if temperature != 1.0:
        student = scratch.like("student", logits)
        scaled = torch.div(logits, temperature, out=student)
    if weights.log_tokens is not None:
        _weigh_(scaled, weights.log_tokens)
        if scaled is not logits:
            _weigh_(logits, weights.log_tokens)
    at_label = logits.gather(-1, column)

    if weights.divergence.form == "forward_kl":
        teacher = _Answer.of(targets, temperature, said, spare)
        # Σ p (log p − log q) = Σ p (log p − z/T) + log Σ exp(z/T), as Σ p = 1.
        exact = teacher.exact.exp()
        kd = (exact * (teacher.exact - scaled.gather(-1, teacher.ids))).sum()
        difference = teacher.said.sub_(scaled).scatter_(-1, teacher.ids, 0.0)
        rest = difference.mul_(teacher.shares).sum(dim=-1, keepdim=True)
        partition = _softmax(scaled, scaled)
        kd += (teacher.mass * (rest + teacher.constant) + partition).sum()
        if temperature == 1.0:
            plain_partition = partition
            gradient = logits.mul_(by_kd + by_ce)
        else:
            plain_partition = _softmax(logits, logits)
            gradient = logits.mul_(by_ce).add_(student, alpha=by_kd)
        gradient.addcmul_(teacher.shares, teacher.mass, value=-by_kd)
        gradient.scatter_add_(-1, teacher.ids, exact * -by_kd)
    else:
        log_teacher = targets.log_probs(temperature, said, spare)
        log_student = spare.copy_(scaled)
        partition = _softmax(scaled, scaled)
        log_student.sub_(partition)
        room = scratch.like("room", logits)
        values, pull = _pull_(log_teacher, log_student, student, room, weights.divergence)
        kd = values.sum()
        plain_partition = partition if temperature == 1.0 else _softmax(logits, logits)
        gradient = logits.mul_(by_ce).add_(pull, alpha=by_kd)
    ce = (labelled * (plain_partition - at_label)).sum()
    gradient.scatter_add_(-1, column, -by_ce)
    return kd, ce, gradient


def _weigh_(logits: Tensor, log_tokens: Tensor) -> None:
    """Let each token count as many times as it stands for; a row's greatest is 0 again."""
    logits.add_(log_tokens)
    logits.sub_(logits.amax(dim=-1, keepdim=True))


def _softmax(logits: Tensor, out: Tensor) -> Tensor:
    """Probabilities of ``logits [C, V]``, of which each row's greatest is 0, into ``out``; returns
    log Σ exp(logits), ``[C, 1]``."""
    torch.softmax(logits, dim=-1, out=out)
    return out.amax(dim=-1, keepdim=True).log().neg_()


@dataclass(frozen=True)
class _Answer:
    """A teacher's distribution at one temperature: exact at K tokens, in proportion at the others.

    ``ids [C, K]`` have log-probabilities ``exact [C, K]``. All others have ``mass [C, 1]``, of
    which each has its part in ``shares [C, V]`` (0 at ``ids``, where ``said`` means nothing), so
    that its log-probability is ``said [C, V]`` + ``constant [C, 1]``.
    """

    ids: Tensor
    exact: Tensor
    said: Tensor
    shares: Tensor
    mass: Tensor
    constant: Tensor

    @classmethod
    def of(cls, targets: Targets, temperature: float, said: Tensor | None, room: Tensor) -> _Answer:
        """``said``: see ``_over_all``; the shares lie in ``room [C, V]``."""
        if said is None:  # every token is exact
            said = targets.log_probs(temperature)
        elif temperature != 1.0:
            said.div_(temperature)
        if not isinstance(targets, CompactTargets) or targets.topk_ids.shape[-1] == said.shape[-1]:
            ids = torch.empty(len(said), 0, dtype=torch.int64, device=said.device)
            exact, log_mass = said.new_empty(len(said), 0), said.new_zeros(len(said), 1)
        else:
            ids, exact = targets.topk_ids, targets.topk_log_probs(temperature)
            tail = targets.tail_logsumexp(temperature)
            log_mass = (tail - targets.log_partition(temperature))[:, None]
            said.scatter_(-1, ids, -torch.inf)
        said.sub_(said.amax(dim=-1, keepdim=True))
        constant = log_mass - _softmax(said, room)
        return cls(ids, exact, said, room, log_mass.exp(), constant)


def _over_buckets(
    logits: Tensor, targets: CompactTargets, labels: Tensor, weights: Weights
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of both terms, and their gradient in ``logits [C, V]``, which it overwrites."""
    temperature, ids = weights.temperature, targets.topk_ids
    if weights.log_tokens is not None:
        logits.add_(weights.log_tokens)
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
        if weights.log_tokens is not None:  # these are not to be divided by T
            scaled.add_(weights.log_tokens, alpha=1.0 - 1.0 / temperature)
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
    return values.sum(), ce, gradient


def _pull_(
    teacher: Tensor, log_student: Tensor, student: Tensor, room: Tensor, kind: Divergence
) -> tuple[Tensor, Tensor]:
    """Divergence of each row ``[C]`` and the pull ``[C, n]``; log p and log q are overwritten."""
    ratio = torch.sub(teacher, log_student, out=log_student)
    return FORMS[kind.form].pull_(ChunkRows(teacher, student, ratio, room, kind))
