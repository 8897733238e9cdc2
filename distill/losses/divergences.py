"""Divergences as pure functions: per-position values, no weights, no means, no temperature-squared
factor.

With p the teacher's distribution at temperature T and q the student's:

    forward_kl           KL(p ‖ q)
    reverse_kl           KL(q ‖ p)
    jensen_shannon       b · KL(p ‖ m) + (1 − b) · KL(q ‖ m),  m = b p + (1 − b) q
    skewed_forward_kl    KL(p ‖ m),                            m = s p + (1 − s) q
    skewed_reverse_kl    KL(q ‖ m),                            m = (1 − s) p + s q

Jensen-Shannon: Lin 1991, with any b as in GKD (Agarwal et al. 2024); skewed: DistiLLM (Ko et al.
2024).

Letters: ``...`` any leading dimensions (usually N valid positions, or B, T), V vocabulary, K stored
top tokens. All values are in nats and float32, whatever the dtype of the logits; float64 where they
are float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.config.schema import DivergenceName
from teachers.targets.distributions import CompactTargets
from teachers.targets.stored_arrays import Targets

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Divergence:
    """Which divergence of teacher and student is asked for.

    Attributes:
        name: one of ``DivergenceName``. js_mixing: b, the teacher's share in the mixture of
        ``jensen_shannon``, in (0, 1); unused by others. skew: s, the share of the first
        distribution in the mixture that takes the second one's place in a skewed
            KL, in [0, 1); 0 gives the plain KL; unused by others.
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
    def form(self) -> DivergenceName:
        """``name``, or that of the plain KL which a skewed one with s = 0 is."""
        plain: dict[str, DivergenceName] = {
            "skewed_forward_kl": "forward_kl",
            "skewed_reverse_kl": "reverse_kl",
        }
        return self.name if self.skew else plain.get(self.name, self.name)

    @property
    def log_shares(self) -> tuple[float, float]:
        """Logarithms of the teacher's and of the student's share in the mixture m."""
        share = self.js_mixing if self.name == "jensen_shannon" else self.skew
        logs = math.log(share), math.log1p(-share)
        return logs[::-1] if self.name == "skewed_reverse_kl" else logs


FORWARD_KL = Divergence()


def divergence(logits: Tensor, targets: Targets, temperature: float, kind: Divergence) -> Tensor:
    """The divergence of teacher and student at temperature T ≥ 1, ``[..., V]`` → ``[...]``.

    Over the whole vocabulary where the targets know the tail's shape, else over k + 1 buckets.
    """
    if targets.has_tail_shape:
        return _of_all(logits, targets, temperature, kind)
    assert isinstance(targets, CompactTargets)
    return _of_buckets(logits, targets, temperature, kind)


def forward_kl(logits: Tensor, targets: CompactTargets, temperature: float) -> Tensor:
    """KL_T(teacher ‖ student) over the K stored tokens and the tail bucket, ``[..., V]`` →
    ``[...]``.

    A true KL divergence of the two (K+1)-bucket distributions: never negative, 0 for identical
    models at every temperature, and a lower bound of the dense KL (data processing inequality).
    """
    return _of_buckets(logits, targets, temperature, FORWARD_KL)


def forward_kl_of_all(logits: Tensor, targets: Targets, temperature: float) -> Tensor:
    """KL_T(teacher ‖ student) over the whole vocabulary, ``[..., V]`` → ``[...]``: as good as the
    targets' shape.

    Raises:
        ValueError: compact targets without a sketch do not say how the tail is spread.
    """
    return _of_all(logits, targets, temperature, FORWARD_KL)


def known_kl(logits: Tensor, targets: Targets, temperature: float) -> Tensor:
    """The KL to quote in reports, ``[..., V]`` → ``[...]``: 0 for identical models whatever the
    kind of targets.

    Over k + 1 buckets for compact targets (a sketch of the tail is rounded), else over the whole
    vocabulary.
    """
    if isinstance(targets, CompactTargets):
        return forward_kl(logits, targets, temperature)
    return forward_kl_of_all(logits, targets, temperature)


def dense_forward_kl(
    teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0
) -> Tensor:
    """KL_T(teacher ‖ student) over the whole vocabulary, ``[..., V]`` twice → ``[...]``; for
    evaluation."""
    teacher, student = (
        _log_probs(teacher_logits, temperature),
        _log_probs(student_logits, temperature),
    )
    return _between(teacher, student, FORWARD_KL)


def bucket_log_probs(logits: Tensor, topk_ids: Tensor, temperature: float) -> Tensor:
    """A model's log-probabilities over K given tokens and, last, one bucket for all others, at
    temperature T.

    ``logits [..., V]`` and ``topk_ids [..., K]`` → ``[..., K + 1]``, or ``[..., K]`` where K = V
    and there are no others; in nats. The tail is summed over its own tokens, not taken as 1 − Σ:
    that keeps its value and its gradient exact also where a student has almost nothing there.
    """
    scaled = _wide(logits) / temperature
    buckets = scaled.gather(-1, topk_ids)
    if topk_ids.shape[-1] < logits.shape[-1]:
        tail = scaled.scatter(-1, topk_ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
        buckets = torch.cat((buckets, tail), dim=-1)
    return F.log_softmax(buckets, dim=-1)


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
    return _between(teacher_buckets(targets, temperature), student, kind)


def _of_all(logits: Tensor, targets: Targets, temperature: float, kind: Divergence) -> Tensor:
    return _between(targets.log_probs(temperature), _log_probs(logits, temperature), kind)


def _between(teacher: Tensor, student: Tensor, kind: Divergence) -> Tensor:
    """The divergence of two distributions given as log-probabilities, ``[..., n]`` twice →
    ``[...]``.

    Everything is made of log(p / q): log(p / m) and log(q / m) are logaddexps of it, so nothing
    overflows, and a probability that underflows counts 0.
    """
    ratio = teacher - student
    if kind.form == "forward_kl":
        return (teacher.exp() * ratio).sum(dim=-1)
    if kind.form == "reverse_kl":
        return -(student.exp() * ratio).sum(dim=-1)
    of_p, of_q = (ratio.new_tensor(share) for share in kind.log_shares)
    if kind.form == "skewed_reverse_kl":
        return _to_mixture(student, ratio + of_p, of_q)
    if kind.form == "skewed_forward_kl":
        return _to_mixture(teacher, of_q - ratio, of_p)
    b = kind.js_mixing
    return b * _to_mixture(teacher, of_q - ratio, of_p) + (1.0 - b) * _to_mixture(
        student, ratio + of_p, of_q
    )


def _to_mixture(log_probs: Tensor, other: Tensor, own: Tensor) -> Tensor:
    """KL to the mixture m of ``log_probs [..., n]``, given both parts' logarithms relative to it
    → ``[...]``."""
    return -(log_probs.exp() * torch.logaddexp(other, own)).sum(dim=-1)


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(_wide(logits) / temperature, dim=-1)


def _wide(logits: Tensor) -> Tensor:
    """At least float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−log p(label) at temperature 1, ``[N, V]`` and ``[N]`` → ``[N]``; 0 where the label is
    IGNORE_INDEX."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="none")
