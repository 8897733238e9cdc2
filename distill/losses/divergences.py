"""Divergences as pure functions of logits, one row of ``FORMS`` each: per-position values, no
weights, no means, no temperature-squared factor.

With p the teacher's distribution at temperature T and q the student's:

    forward_kl           KL(p ‖ q)
    reverse_kl           KL(q ‖ p)
    jensen_shannon       b · KL(p ‖ m) + (1 − b) · KL(q ‖ m),  m = b p + (1 − b) q
    skewed_forward_kl    KL(p ‖ m),                            m = s p + (1 − s) q
    skewed_reverse_kl    KL(q ‖ m),                            m = (1 − s) p + s q

Jensen-Shannon: Lin 1991, with any b as in GKD (Agarwal et al. 2024); skewed: DistiLLM (Ko et al.
2024).

A divergence is Σ d(p_v, q_v). Its pull, of which ``distill.losses.fused`` makes the gradient in the
logits, is q_v (g_v − Σ_u q_u g_u) with the slope g_v = ∂d/∂q_v, to which any constant may be added:

    forward KL           g = −p / q,  so that the pull is q − p
    reverse KL           g = log(q / p)
    Jensen-Shannon       g = (1 − b) log(q / m)
    skewed forward KL    g = −(1 − s) p / m
    skewed reverse KL    g = log(q / m) − s q / m

Letters: ``...`` any leading dimensions (usually N valid positions, or B, T), V vocabulary, K stored
top tokens, C positions of a chunk, n tokens or buckets. All values are in nats and float32,
whatever the dtype of the logits; float64 where they are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.config.schema import DivergenceName
from teachers.targets.distributions import CompactTargets
from teachers.targets.stored_arrays import Targets

IGNORE_INDEX = -100
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Divergence:
    """A divergence of teacher and student with its parameters.

    Attributes:
        name: one of ``DivergenceName``.
        js_mixing: b, the teacher's share in the mixture of ``jensen_shannon``, in (0, 1); unused by
            others.
        skew: s, the share of the first distribution in the mixture that takes the second one's
            position in a skewed KL, in [0, 1); 0 gives the plain KL; unused by others.
    """

    name: DivergenceName = "forward_kl"
    js_mixing: float = 0.5
    skew: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in get_args(DivergenceName):
            names = ", ".join(get_args(DivergenceName))
            raise ValueError(f"divergence {self.name!r} does not exist; choose one of {names}")
        if not 0.0 < self.js_mixing < 1.0:
            raise ValueError(f"js_mixing {self.js_mixing:g} is not between 0 and 1")
        if not 0.0 <= self.skew < 1.0:
            raise ValueError(f"skew {self.skew:g} is not in [0, 1)")

    @property
    def form(self) -> str:
        """Its row of ``FORMS``: ``name``, or the plain KL which a skewed one with s = 0 is."""
        return self.name if self.skew else self.name.removeprefix("skewed_")


FORWARD_KL = Divergence()


@dataclass(frozen=True)
class ChunkRows:
    """What a pull is computed from and in, all but ``student`` and ``kind`` overwritten.

    ``teacher``: log p; ``student``: q; ``ratio``: log(p / q); ``room``: empty, ``[C, n]`` each.
    """

    teacher: Tensor
    student: Tensor
    ratio: Tensor
    room: Tensor
    kind: Divergence

    def centered_(self, slope: Tensor) -> Tensor:
        """The pull of a slope ``[C, n]``, in place."""
        mean = torch.linalg.vecdot(self.student, slope)[:, None]
        return slope.sub_(mean).mul_(self.student)

    def teacher_to_mixture_(self, log_p: float, log_q: float) -> Tensor:
        """log(p / m) in ``room``, given the logarithms of both shares in the mixture m."""
        torch.sub(self.ratio.new_full((), log_q), self.ratio, out=self.room)
        return torch.logaddexp(self.room, self.ratio.new_full((), log_p), out=self.room).neg_()

    def student_to_mixture_(self, log_p: float, log_q: float) -> Tensor:
        """log(q / m) in ``room``."""
        torch.add(self.ratio, log_p, out=self.room)
        return torch.logaddexp(self.room, self.ratio.new_full((), log_q), out=self.room).neg_()


@dataclass(frozen=True)
class Form:
    """One divergence.

    ``value``: log p and log q ``[..., n]`` → ``[...]``, differentiable. ``pull_``: the same value
    ``[C]`` and the pull ``[C, n]``, which lies in one of the tensors it was given.
    """

    value: Callable[[Tensor, Tensor, Divergence], Tensor]
    pull_: Callable[[ChunkRows], tuple[Tensor, Tensor]]


# Values are made of log(p / q): log(p / m) and log(q / m) are logaddexps of it, so nothing
# overflows, and a probability that underflows counts 0.


def _logs(share: float) -> tuple[float, float]:
    """Logarithms of a share in the mixture, and of the other one's."""
    return math.log(share), math.log1p(-share)


def _teacher_to_mixture(teacher: Tensor, student: Tensor, log_p: float, log_q: float) -> Tensor:
    """KL(p ‖ m), given the logarithms of both shares in the mixture m."""
    ratio = teacher - student
    log_m = torch.logaddexp(ratio.new_full((), log_q) - ratio, ratio.new_full((), log_p))
    return -(teacher.exp() * log_m).sum(dim=-1)


def _student_to_mixture(teacher: Tensor, student: Tensor, log_p: float, log_q: float) -> Tensor:
    """KL(q ‖ m)."""
    ratio = teacher - student
    log_m = torch.logaddexp(ratio + ratio.new_full((), log_p), ratio.new_full((), log_q))
    return -(student.exp() * log_m).sum(dim=-1)


def _jensen_shannon(teacher: Tensor, student: Tensor, kind: Divergence) -> Tensor:
    b, logs = kind.js_mixing, _logs(kind.js_mixing)
    of_teacher = _teacher_to_mixture(teacher, student, *logs)
    return b * of_teacher + (1.0 - b) * _student_to_mixture(teacher, student, *logs)


def _forward_kl_pull_(rows: ChunkRows) -> tuple[Tensor, Tensor]:
    share = exp_(rows.teacher)
    values = torch.linalg.vecdot(share, rows.ratio)
    return values, torch.sub(rows.student, share, out=rows.ratio)


def _reverse_kl_pull_(rows: ChunkRows) -> tuple[Tensor, Tensor]:
    slope = rows.ratio.neg_()
    return torch.linalg.vecdot(rows.student, slope), rows.centered_(slope)


def _jensen_shannon_pull_(rows: ChunkRows) -> tuple[Tensor, Tensor]:
    b, logs = rows.kind.js_mixing, _logs(rows.kind.js_mixing)
    of_teacher = torch.linalg.vecdot(exp_(rows.teacher), rows.teacher_to_mixture_(*logs))
    slope = rows.student_to_mixture_(*logs).mul_(1.0 - b)
    values = b * of_teacher + torch.linalg.vecdot(rows.student, slope)
    return values, rows.centered_(slope)


def _skewed_forward_kl_pull_(rows: ChunkRows) -> tuple[Tensor, Tensor]:
    to_mixture = rows.teacher_to_mixture_(*_logs(rows.kind.skew))
    values = torch.linalg.vecdot(exp_(rows.teacher), to_mixture)
    return values, rows.centered_(exp_(to_mixture).mul_(rows.kind.skew - 1.0))


def _skewed_reverse_kl_pull_(rows: ChunkRows) -> tuple[Tensor, Tensor]:
    slope = rows.student_to_mixture_(*_logs(rows.kind.skew)[::-1])
    values = torch.linalg.vecdot(rows.student, slope)
    slope.sub_(exp_(rows.ratio.copy_(slope)), alpha=rows.kind.skew)
    return values, rows.centered_(slope)


FORMS: dict[str, Form] = {
    "forward_kl": Form(lambda p, q, kind: (p.exp() * (p - q)).sum(dim=-1), _forward_kl_pull_),
    "reverse_kl": Form(lambda p, q, kind: -(q.exp() * (p - q)).sum(dim=-1), _reverse_kl_pull_),
    "jensen_shannon": Form(_jensen_shannon, _jensen_shannon_pull_),
    "skewed_forward_kl": Form(
        lambda p, q, kind: _teacher_to_mixture(p, q, *_logs(kind.skew)), _skewed_forward_kl_pull_
    ),
    "skewed_reverse_kl": Form(
        lambda p, q, kind: _student_to_mixture(p, q, *_logs(kind.skew)[::-1]),
        _skewed_reverse_kl_pull_,
    ),
}


def exp_(values: Tensor) -> Tensor:
    """``values.exp_()``; PyTorch's exponential to base 2 is three times faster on a CPU, and as
    exact."""
    return values.mul_(LOG2_E).exp2_()


def divergence(
    logits: Tensor, targets: Targets, temperature: float, kind: Divergence = FORWARD_KL
) -> Tensor:
    """The divergence of teacher and student at temperature T ≥ 1, ``[..., V]`` → ``[...]``.

    Over the whole vocabulary where the targets know the tail's shape, else over k + 1 buckets: a
    true divergence of two bucket distributions, and a lower bound of the dense one (data processing
    inequality).
    """
    if isinstance(targets, CompactTargets) and not targets.has_tail_shape:
        return _of_buckets(logits, targets, temperature, kind)
    teacher, student = targets.log_probs(temperature), _log_probs(logits, temperature)
    return FORMS[kind.form].value(teacher, student, kind)


def known_kl(logits: Tensor, targets: Targets, temperature: float) -> Tensor:
    """The KL(teacher ‖ student) to quote in reports, ``[..., V]`` → ``[...]``: 0 for identical
    models whatever the kind of targets.

    Over k + 1 buckets for compact targets (a sketch of the tail is rounded), else over the whole
    vocabulary.
    """
    if isinstance(targets, CompactTargets):
        return _of_buckets(logits, targets, temperature, FORWARD_KL)
    return divergence(logits, targets, temperature)


def known_scores(logits: Tensor, targets: Targets, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``known_kl`` at temperature 1, whether the student's most probable token is the teacher's,
    and ``cross_entropy``: ``[N, V]`` and labels ``[N]`` → three of ``[N]``, in as few passes over
    the logits as that takes."""
    best = targets.best()[..., None]
    same = logits.gather(-1, best).squeeze(-1) == logits.amax(dim=-1)
    if not isinstance(targets, CompactTargets):
        return known_kl(logits, targets, 1.0), same, cross_entropy(logits, labels)
    buckets = _buckets(logits, targets.topk_ids, 1.0)
    kl = FORMS["forward_kl"].value(
        teacher_buckets(targets, 1.0), F.log_softmax(buckets, dim=-1), FORWARD_KL
    )
    counts = labels != IGNORE_INDEX
    chosen = _wide(logits).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return kl, same, torch.where(counts, buckets.logsumexp(dim=-1) - chosen, 0.0)


def dense_forward_kl(
    teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0
) -> Tensor:
    """KL_T(teacher ‖ student) over the whole vocabulary, ``[..., V]`` twice → ``[...]``; for
    evaluation."""
    teacher = _log_probs(teacher_logits, temperature)
    student = _log_probs(student_logits, temperature)
    return FORMS["forward_kl"].value(teacher, student, FORWARD_KL)


def bucket_log_probs(logits: Tensor, topk_ids: Tensor, temperature: float) -> Tensor:
    """A model's log-probabilities over K given tokens and, last, one bucket for all others, at
    temperature T.

    ``logits [..., V]`` and ``topk_ids [..., K]`` → ``[..., K + 1]``, or ``[..., K]`` where K = V
    and there are no others; in nats. The tail is summed over its own tokens, not taken as 1 − Σ:
    that keeps its value and its gradient exact also where a student has almost nothing there.
    """
    return F.log_softmax(_buckets(logits, topk_ids, temperature), dim=-1)


def _buckets(logits: Tensor, topk_ids: Tensor, temperature: float) -> Tensor:
    """``bucket_log_probs`` but for a number that all of a row have in common."""
    scaled = _wide(logits) if temperature == 1.0 else _wide(logits) / temperature
    buckets = scaled.gather(-1, topk_ids)
    if topk_ids.shape[-1] < logits.shape[-1]:
        tail = scaled.scatter(-1, topk_ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
        buckets = torch.cat((buckets, tail), dim=-1)
    return buckets


def teacher_buckets(targets: CompactTargets, temperature: float) -> Tensor:
    """The teacher's side of ``bucket_log_probs``: ``[..., K + 1]``, or ``[..., K]`` where K = V."""
    buckets, tail = targets.topk_logits / temperature, targets.tail_logsumexp(temperature)
    if targets.topk_ids.shape[-1] < targets.vocab_size:
        buckets = torch.cat((buckets, tail[..., None]), dim=-1)
    return F.log_softmax(buckets, dim=-1)


def _of_buckets(
    logits: Tensor, targets: CompactTargets, temperature: float, kind: Divergence
) -> Tensor:
    student = bucket_log_probs(logits, targets.topk_ids, temperature)
    return FORMS[kind.form].value(teacher_buckets(targets, temperature), student, kind)


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(_wide(logits) / temperature, dim=-1)


def _wide(logits: Tensor) -> Tensor:
    """At least float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−log p(label) at temperature 1, ``[N, V]`` and ``[N]`` → ``[N]``; 0 where the label is
    IGNORE_INDEX."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="none")
