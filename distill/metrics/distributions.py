"""The values of ``distill evaluate`` as functions of logits, and their intervals; nothing here
runs a model.

With p the teacher's and q the student's next-token distribution at temperature 1, per position:

    kl           Σ p ln(p / q)    reverse_kl   Σ q ln(q / p)    in nats, whole vocabulary
    top1         whether the most probable token is the same
    top5         share of the teacher's five most probable tokens that are among the student's five
    acceptance   Σ min(p, q): the chance that the teacher accepts a token the student drafts

Speculative decoding: Leviathan, Kalman and Matias 2023, "Fast Inference from Transformers via
Speculative Decoding". Letters: N positions, V vocabulary, S sequences, F values. Everything is
computed in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.metrics.calibration import expected_calibration_error
from distill.metrics.intervals import Figure
from teachers.base import Tokens, budget_slices

LOGITS_BYTES = 128 << 20  # one model's logits held at a time
COMPARED = ("kl", "reverse_kl", "top1", "top5", "acceptance")
CHUNK_LOGITS = 1 << 20  # of one model at a time in float64: 8 MB
TOP = 5
RESAMPLES = 2000
RESAMPLED_AT_ONCE = 1 << 20
BOOTSTRAP_SEED = 20_230_215  # fixed: the same scores always have the same intervals
LEVEL = 0.95

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Prediction:
    """How one model predicts the actual next tokens, each ``[N]``: −ln of their probability, the
    probability of the most probable token, and whether that is the actual one."""

    surprise: Tensor
    confidence: Tensor
    right: Tensor


def compare(teacher: Tensor, student: Tensor) -> Floats:
    """The metrics ``COMPARED`` of every position, ``[N, F]``, from both logits ``[N, V]``."""
    return torch.cat([_compare(p, q) for p, q in _chunks(teacher, student)]).numpy()


def _compare(teacher: Tensor, student: Tensor) -> Tensor:
    log_p, log_q = teacher.log_softmax(dim=-1), student.log_softmax(dim=-1)
    p, q = log_p.exp(), log_q.exp()
    top = min(TOP, p.shape[-1])
    best, students = log_p.topk(top, dim=-1).indices, log_q.topk(top, dim=-1).indices
    both = (best[:, :, None] == students[:, None, :]).any(dim=-1)
    values = (
        (p * (log_p - log_q)).sum(dim=-1).clamp_min(0.0),  # rounding may leave −1e-17
        (q * (log_q - log_p)).sum(dim=-1).clamp_min(0.0),
        (log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).double(),
        both.double().mean(dim=-1),
        # Σ min(p, q); computed directly, rounding would keep it below 1 for equal ones.
        1.0 - (p - q).abs().sum(dim=-1) / 2,
    )
    return torch.stack(values, dim=-1)


def predict(logits: Tensor, labels: Tensor) -> Prediction:
    """How ``logits [N, V]`` predict the actual next tokens ``labels [N]``."""
    surprise, confidence, right = [], [], []
    for rows, actual in _chunks(logits, labels):
        log_probs = rows.log_softmax(dim=-1)
        best = log_probs.max(dim=-1)
        surprise.append(-log_probs.gather(-1, actual[:, None])[:, 0])
        confidence.append(best.values.exp())
        right.append(best.indices == actual)
    return Prediction(torch.cat(surprise), torch.cat(confidence), torch.cat(right))


def log_probability(logits: NDArray[np.float32], labels: NDArray[np.int32]) -> float:
    """Σ log p of ``labels [C]`` under ``logits [C, V]``, in nats; of no label 0."""
    rows = logits.astype(np.float64)
    top = rows.max(axis=1, initial=-np.inf)
    sums = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
    return float((rows[np.arange(len(rows)), labels] - sums).sum())


def joined(parts: Sequence[Prediction]) -> Prediction:
    """Several parts' predictions, one after another."""
    return Prediction(
        torch.cat([part.surprise for part in parts]),
        torch.cat([part.confidence for part in parts]),
        torch.cat([part.right for part in parts]),
    )


def calibration_error(prediction: Prediction) -> float:
    """Expected calibration error of the most probable token, 15 equal bins (Naeini et al. 2015)."""
    return expected_calibration_error(prediction.confidence, prediction.right)


def _chunks(first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of both together, as many as are computed at once; logits in float64."""
    together = max(1, CHUNK_LOGITS // first.shape[-1])
    for start in range(0, len(first), together):
        rows = slice(start, start + together)
        other = second[rows]
        yield first[rows].double(), other.double() if other.is_floating_point() else other


def tokens_per_pass(acceptance: float, draft_length: int) -> float:
    """Expected tokens per teacher pass with ``draft_length`` drafted, each accepted with chance a:
    (1 − a^(n+1)) / (1 − a) (Leviathan et al. 2023, eq. 1)."""
    return sum(acceptance**count for count in range(draft_length + 1))


def agreeing_prefix(teacher: Sequence[int], student: Sequence[int]) -> int:
    """Length of the common prefix of two continuations, an end-of-turn token included."""
    for index, (expected, token) in enumerate(zip(teacher, student, strict=False)):
        if expected != token:
            return index
    return min(len(teacher), len(student))


# -- means over positions, with their intervals ---------------------------------------------------


def by_sequence(values: Floats, lengths: Sequence[int]) -> Floats:
    """Sums over each sequence's positions, ``[S, F]``, of ``values [Σ lengths, F]``."""
    sums: Floats = np.zeros((len(lengths), values.shape[1]))
    np.add.at(sums, np.repeat(np.arange(len(lengths)), lengths), values)
    return sums


def intervals(sums: Floats, counts: Sequence[int]) -> Floats | None:
    """95 % intervals ``[2, F]`` (low, high) of means over positions, from each sequence's sums
    ``[S, F]`` and counts ``[S]``; ``None`` for a single sequence.

    A percentile cluster bootstrap: since positions of one sequence resemble each other, whole
    sequences are resampled (Cameron, Gelbach and Miller 2008), 2,000 times with a fixed seed, the
    same for all metrics.
    """
    count = len(sums)
    if count < 2:
        return None
    positions = np.asarray(counts, dtype=np.float64)
    random = np.random.default_rng(BOOTSTRAP_SEED)
    together = max(1, RESAMPLED_AT_ONCE // (count * sums.shape[1]))
    means = []
    for start in range(0, RESAMPLES, together):
        drawn = random.integers(0, count, (min(together, RESAMPLES - start), count))
        means.append(sums[drawn].sum(axis=1) / positions[drawn].sum(axis=1)[:, None])
    tail = (1.0 - LEVEL) / 2
    edges: Floats = np.quantile(np.concatenate(means), [tail, 1.0 - tail], axis=0)
    return edges


def mean_figures(sums: Floats, counts: Sequence[int]) -> list[Figure]:
    """Means over positions with ``intervals``, one for each column of ``sums [S, F]``."""
    means = (sums.sum(axis=0) / np.sum(counts)).tolist()
    edges = intervals(sums, counts)
    if edges is None:
        return [Figure(mean) for mean in means]
    return [Figure(*row) for row in zip(means, *edges.tolist(), strict=True)]


def next_tokens(sequences: Sequence[Tokens]) -> Tensor:
    """The actual next token of every position, ``[N]``."""
    return torch.from_numpy(np.concatenate([tokens[1:] for tokens in sequences]).astype(np.int64))


def groups(sequences: Sequence[Tokens], vocab_size: int) -> Iterator[slice]:
    """Groups of sequences whose logits fit into ``LOGITS_BYTES`` (at least one each)."""
    room = LOGITS_BYTES // (4 * vocab_size)
    return budget_slices([len(tokens) for tokens in sequences], room)
