"""Students against their teacher on held-out text: dense KL, top-1 agreement, perplexity.

Everything is measured at temperature 1 over the whole vocabulary, per token, on the same positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill import losses
from students.model import SO8TForCausalLM
from teachers.base import Teacher, Tokens

LOGITS_BYTES = 128 << 20  # teacher's logits held at a time

Scorer = Callable[[Sequence[Tokens]], Tensor]
"""Next-token logits of all positions of some sequences, ``[N, V]`` float32 (n − 1 rows for n tokens)."""


@dataclass(frozen=True)
class Score:
    """One model against the teacher. ``kl`` and ``cross_entropy`` in nats per token, ``agreement`` a share."""

    kl: float
    agreement: float
    cross_entropy: float

    @property
    def perplexity(self) -> float:
        """exp of the cross-entropy of the actual next tokens."""
        return math.exp(min(self.cross_entropy, 700.0))


@dataclass(frozen=True)
class Evaluation:
    """Scores of several models on the same held-out positions; ``teacher`` is the teacher against itself."""

    positions: int
    teacher: Score
    models: dict[str, Score]


def student_scorer(student: SO8TForCausalLM) -> Scorer:
    """Score with PyTorch in float32, one sequence at a time."""

    @torch.no_grad()
    def score(sequences: Sequence[Tokens]) -> Tensor:
        student.eval()
        rows = []
        for tokens in sequences:
            inputs = torch.from_numpy(tokens[:-1].astype(np.int64))[None].to(student.device)
            rows.append(student(inputs).logits[0].float().cpu())
        return torch.cat(rows)

    return score


def llama_scorer(model: Teacher, *, exact: bool = False) -> Scorer:
    """Score with llama.cpp; ``exact`` uses a float32 KV cache without flash attention."""
    return lambda sequences: torch.from_numpy(model.logits(sequences, exact=exact))


def evaluate(
    teacher: Teacher,
    sequences: Sequence[Tokens],
    models: dict[str, Scorer],
    report: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Compare ``models`` with the teacher on every position; ``report`` gets how many sequences are done."""
    sums = {name: np.zeros(3) for name in ("", *models)}
    positions = finished = 0
    reference = llama_scorer(teacher)
    for group in _groups(sequences, teacher.info.vocab_size):
        expected = reference(group)
        labels = torch.from_numpy(np.concatenate([tokens[1:] for tokens in group]).astype(np.int64))
        for name in sums:
            found = models[name](group) if name else expected
            sums[name] += _sums(expected, found, labels)
        positions += len(labels)
        finished += len(group)
        report(finished)
    scores = {name: Score(*(total / positions).tolist()) for name, total in sums.items()}
    return Evaluation(positions, scores.pop(""), scores)


def _sums(teacher: Tensor, model: Tensor, labels: Tensor) -> np.ndarray:
    kl = losses.dense_forward_kl(teacher, model).double().sum()
    same = (teacher.argmax(dim=-1) == model.argmax(dim=-1)).double().sum()
    surprise = losses.cross_entropy(model, labels).double().sum()
    return np.array([float(kl), float(same), float(surprise)])


def _groups(sequences: Sequence[Tokens], vocab_size: int) -> list[list[Tokens]]:
    """Cut the sequences into groups whose logits fit into ``LOGITS_BYTES`` (at least one each)."""
    limit = max(1, LOGITS_BYTES // (4 * vocab_size))
    groups: list[list[Tokens]] = []
    room = 0
    for tokens in sequences:
        if not groups or len(tokens) > room:
            groups.append([])
            room = limit
        groups[-1].append(tokens)
        room -= len(tokens)
    return groups
