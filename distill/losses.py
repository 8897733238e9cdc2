"""Divergences as pure functions: per-position values, no weights, no means, no temperature-squared factor.

Letters: ``...`` any leading dimensions (usually N valid positions, or B, T), V vocabulary, K stored top
tokens. All values are in nats and float32, whatever the dtype of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from teachers.soft_targets import CompactTargets

IGNORE_INDEX = -100
# Below this tail probability the float32 difference 1 − Σ is rounding noise; the logarithm is held there.
_MIN_TAIL = 1e-6


def bucket_log_probs(logits: Tensor, topk_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """A model's log-probabilities over K given tokens and one bucket for all others, at temperature T.

    ``logits [..., V]`` and ``topk_ids [..., K]`` → ``[..., K]`` and ``[...]``, in nats.
    """
    scaled = logits.float() / temperature
    topk = scaled.gather(-1, topk_ids) - torch.logsumexp(scaled, dim=-1, keepdim=True)
    covered = topk.logsumexp(dim=-1)
    tail = torch.log(-torch.expm1(covered.clamp(max=-_MIN_TAIL)))
    return topk, tail


def forward_kl(logits: Tensor, targets: CompactTargets, temperature: float) -> Tensor:
    """KL_T(teacher ‖ student) over the K stored tokens and the tail bucket, ``[..., V]`` → ``[...]``.

    A true KL divergence of the two (K+1)-bucket distributions: never negative, 0 for identical models at
    every stored temperature, and a lower bound of the dense KL (data processing inequality).
    """
    student_topk, student_tail = bucket_log_probs(logits, targets.topk_ids, temperature)
    teacher_topk = targets.topk_log_probs(temperature)
    inside = (teacher_topk.exp() * (teacher_topk - student_topk)).sum(dim=-1)
    if targets.topk_ids.shape[-1] == logits.shape[-1]:
        return inside  # every token is stored: there is no tail
    mass = targets.tail_mass(temperature).clamp(min=_MIN_TAIL)
    return inside + mass * (mass.log() - student_tail)


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
