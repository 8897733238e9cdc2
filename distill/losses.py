"""Divergences as pure functions: per-position values, no weights, no means, no temperature-squared factor.

Letters: ``...`` any leading dimensions (usually N valid positions, or B, T), V vocabulary, K stored top
tokens. All values are in nats and float32, whatever the dtype of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from teachers.records import Targets
from teachers.soft_targets import CompactTargets

IGNORE_INDEX = -100


def bucket_log_probs(logits: Tensor, topk_ids: Tensor, temperature: float) -> Tensor:
    """A model's log-probabilities over K given tokens and, last, one bucket for all others, at temperature T.

    ``logits [..., V]`` and ``topk_ids [..., K]`` → ``[..., K + 1]``, or ``[..., K]`` where K = V and there are no
    others; in nats. The tail is summed over its own tokens, not taken as 1 − Σ: that keeps its value
    and its gradient exact also where a student has almost nothing there.
    """
    scaled = logits.float() / temperature
    buckets = scaled.gather(-1, topk_ids)
    if topk_ids.shape[-1] < logits.shape[-1]:
        tail = scaled.scatter(-1, topk_ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
        buckets = torch.cat((buckets, tail), dim=-1)
    return F.log_softmax(buckets, dim=-1)


def forward_kl(logits: Tensor, targets: CompactTargets, temperature: float) -> Tensor:
    """KL_T(teacher ‖ student) over the K stored tokens and the tail bucket, ``[..., V]`` → ``[...]``.

    A true KL divergence of the two (K+1)-bucket distributions: never negative, 0 for identical models at
    every temperature, and a lower bound of the dense KL (data processing inequality).
    """
    student = bucket_log_probs(logits, targets.topk_ids, temperature)
    teacher_topk = targets.topk_log_probs(temperature)
    count = targets.topk_ids.shape[-1]
    inside = (teacher_topk.exp() * (teacher_topk - student[..., :count])).sum(dim=-1)
    if count == logits.shape[-1]:
        return inside  # every token is stored: there is no tail
    mass = targets.tail_mass(temperature)
    return inside + torch.xlogy(mass, mass) - mass * student[..., count]


def forward_kl_of_all(logits: Tensor, targets: Targets, temperature: float) -> Tensor:
    """KL_T(teacher ‖ student) over the whole vocabulary, ``[..., V]`` → ``[...]``: as good as the targets' shape.

    Raises:
        ValueError: compact targets without a sketch do not say how the tail is spread.
    """
    teacher = targets.log_probs(temperature)
    student = F.log_softmax(_wide(logits) / temperature, dim=-1)
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


def known_kl(logits: Tensor, targets: Targets, temperature: float) -> Tensor:
    """The KL to quote in reports, ``[..., V]`` → ``[...]``: 0 for identical models whatever the kind of targets.

    Over k + 1 buckets for compact targets (a sketch of the tail is rounded), else over the whole vocabulary.
    """
    if isinstance(targets, CompactTargets):
        return forward_kl(logits, targets, temperature)
    return forward_kl_of_all(logits, targets, temperature)


def dense_forward_kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL_T(teacher ‖ student) over the whole vocabulary, ``[..., V]`` twice → ``[...]``; for evaluation."""
    teacher = F.log_softmax(_wide(teacher_logits) / temperature, dim=-1)
    student = F.log_softmax(_wide(student_logits) / temperature, dim=-1)
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


def _wide(logits: Tensor) -> Tensor:
    """At least float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−log p(label) at temperature 1, ``[N, V]`` and ``[N]`` → ``[N]``; 0 where the label is IGNORE_INDEX."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="none")
