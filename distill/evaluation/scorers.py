"""Students against their teacher on validation text: KL, top-1 agreement, perplexity.

At temperature 1, per token, on the same positions: against the teacher over the whole vocabulary,
or against its stored soft targets over what these know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.losses import divergences
from distill.metrics.closeness import STORED_TARGETS, TEACHER, WHOLE_VOCABULARY, kl_over
from distill.metrics.distributions import by_sequence, groups, intervals, next_tokens
from stability.precision import ieee_float32
from students.mapped_tensors import MappedTensors
from students.weights import set_weights
from teachers.base import Keep, Teacher, Tokens, whole_masks
from teachers.store.store import SoftTargetStore
from teachers.targets.stored_arrays import Targets, join

if TYPE_CHECKING:
    from students.model.interface import Student

Scorer = Callable[[Sequence[Tokens]], Tensor]
"""Next-token logits of all positions of some sequences, ``[N, V]`` float32 (n − 1 rows for n
tokens)."""

Sums = NDArray[np.float64]
"""KL, agreement and surprise summed over each sequence's positions, ``[S, 3]``."""


@dataclass(frozen=True)
class Score:
    """One model: ``kl`` and ``cross_entropy`` in nats per token, ``agreement`` a share.

    ``intervals``: 95 % intervals of these and of perplexity; empty for a single sequence.
    """

    kl: float
    agreement: float
    cross_entropy: float
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """exp of the cross-entropy of the actual next tokens."""
        return perplexity(self.cross_entropy)


@dataclass(frozen=True)
class Evaluation:
    """Scores of several models on the same validation positions.

    ``against``: ``TEACHER`` or its ``STORED_TARGETS``. ``teacher``: its own cross-entropy in nats
    per token; ``None`` if unknown, ``approximate`` if from hidden states rounded for the store.
    """

    against: str
    positions: int
    kl_over: str
    teacher: float | None
    approximate: bool
    models: dict[str, Score]


def perplexity(cross_entropy: float) -> float:
    """exp of a cross-entropy in nats."""
    return math.exp(min(cross_entropy, 700.0))


def student_scorer(student: Student) -> Scorer:
    """Score with PyTorch in float32, one sequence at a time."""

    @ieee_float32()
    @torch.no_grad()
    def score(sequences: Sequence[Tokens]) -> Tensor:
        student.eval()
        rows = []
        for tokens in sequences:
            inputs = torch.from_numpy(tokens[:-1].astype(np.int64))[None].to(student.device)
            rows.append(student(inputs).logits[0].float().cpu())
        return torch.cat(rows)

    return score


def scorer_with(student: Student, weights: dict[str, Tensor]) -> Scorer:
    """Score the student with other weights of its own, which it has for that time only."""
    scorer = student_scorer(student)

    def score(sequences: Sequence[Tokens]) -> Tensor:
        with other_weights(student, weights):
            return scorer(sequences)

    return score


@contextmanager
def other_weights(student: Student, weights: dict[str, Tensor]) -> Iterator[None]:
    """Give the student other weights of its own for a while; what ``weights`` lacks stays."""
    now = {name: weight.clone() for name, weight in student.own_weights().items()}
    set_weights(student, now | weights)
    try:
        yield
    finally:
        set_weights(student, now)


@torch.no_grad()
def scored_ahead(student: Student, sequences: Sequence[Tokens], kept: MappedTensors) -> Scorer:
    """Score these sequences on the processor by what the student's layers say now: the student is
    not needed any more, only its output matrix, of which the scorer has a copy."""
    student.eval()
    matrix = student.output_matrix().detach().float().cpu()
    states = {}
    for tokens in sequences:
        inputs = torch.from_numpy(tokens[:-1].astype(np.int64))[None].to(student.device)
        states[tokens.tobytes()] = kept.keep(
            student(inputs, with_logits=False).last_hidden_state[0]
        )

    def score(sequences: Sequence[Tokens]) -> Tensor:
        return torch.cat([states[one.tobytes()].float() @ matrix.T for one in sequences])

    return score


def llama_scorer(model: Teacher, *, exact: bool = False) -> Scorer:
    """Score with llama.cpp; ``exact`` uses a float32 KV cache without flash attention."""
    return lambda sequences: torch.from_numpy(model.logits(sequences, exact=exact))


def evaluate(
    teacher: Teacher,
    sequences: Sequence[Tokens],
    models: dict[str, Scorer],
    report: Callable[[int], None] = lambda done: None,
    keep: Sequence[Keep] | None = None,
) -> Evaluation:
    """Compare ``models`` with the teacher at every position, or those that the masks ``keep``
    want; ``report`` counts positions."""
    masks = whole_masks(sequences, keep)
    sums: dict[str, list[Sums]] = {name: [] for name in models}
    surprise, positions = 0.0, 0
    reference = llama_scorer(teacher)
    for part in groups(sequences, teacher.info.vocab_size):
        group, kept = sequences[part], masks[part]
        rows = torch.from_numpy(np.concatenate(kept))
        expected, labels = reference(group)[rows], next_tokens(group)[rows]
        best = expected.argmax(dim=-1)
        surprise += float(divergences.cross_entropy(expected, labels).double().sum())
        for name, model in models.items():
            logits = model(group)[rows]
            kl = divergences.dense_forward_kl(expected, logits)
            sums[name].append(_sums(kl, best, logits, labels, kept))
        positions += len(labels)
        report(positions)
    scores = {name: _score(np.concatenate(parts), masks) for name, parts in sums.items()}
    return Evaluation(TEACHER, positions, WHOLE_VOCABULARY, surprise / positions, False, scores)


def evaluate_stored(
    store: SoftTargetStore,
    indices: Sequence[int],
    models: dict[str, Scorer],
    report: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """``evaluate`` against the stored soft targets of some of the store's sequences."""
    vocab_size = int(store.manifest.identity["vocab_size"])
    sums: dict[str, list[Sums]] = {name: [] for name in models}
    surprise: float | None = 0.0
    positions = finished = 0
    sequences = [store.tokens(index) for index in indices]
    masks = [store.keep(index) for index in indices]
    for part in groups(sequences, vocab_size):
        group, kept = sequences[part], masks[part]
        rows = torch.from_numpy(np.concatenate(kept))
        targets = join([store.targets(index) for index in indices[part]])
        labels = next_tokens(group)[rows]
        best, asked = targets.best(), _teachers_surprise(targets, labels)
        surprise = None if surprise is None or asked is None else surprise + asked
        for name, model in models.items():
            logits = model(group)[rows]
            kl = divergences.known_kl(logits, targets, 1.0)
            sums[name].append(_sums(kl, best, logits, labels, kept))
        positions += len(labels)
        finished += len(group)
        report(positions)
    scores = {name: _score(np.concatenate(parts), masks) for name, parts in sums.items()}
    known = None if surprise is None else surprise / positions
    recipe = store.manifest.recipe
    over = kl_over(recipe.kind, recipe.num_topk)
    return Evaluation(STORED_TARGETS, positions, over, known, recipe.kind != "dense", scores)


def _teachers_surprise(targets: Targets, labels: Tensor) -> float | None:
    """Σ −log p(label) of the teacher; ``None`` if the targets do not give every token's.

    By a sketch it is near: 0.005 nats too high with over half of the labels in the tail (WikiText
    teacher).
    """
    if not targets.has_tail_shape:
        return None
    chosen = targets.log_probs(1.0).gather(-1, labels[:, None])
    return -float(chosen.double().sum())


def _sums(kl: Tensor, best: Tensor, logits: Tensor, labels: Tensor, masks: Sequence[Keep]) -> Sums:
    """KL, agreement and surprise summed over the kept positions of each sequence."""
    same = (best == logits.argmax(dim=-1)).double()
    surprise = divergences.cross_entropy(logits, labels).double()
    values = torch.stack((kl.double(), same, surprise), dim=-1).numpy()
    return by_sequence(values, [int(mask.sum()) for mask in masks])


def _score(sums: Sums, masks: Sequence[Keep]) -> Score:
    """Means over kept positions, with their intervals, of each sequence's ``sums [S, 3]``."""
    counts = [int(mask.sum()) for mask in masks]
    kl, agreement, cross_entropy = (sums.sum(axis=0) / sum(counts)).tolist()
    edges = intervals(sums, counts)
    if edges is None:
        return Score(kl, agreement, cross_entropy)
    names = ("kl", "agreement", "cross_entropy")
    ends = {name: (low, high) for name, low, high in zip(names, *edges.tolist(), strict=True)}
    low, high = ends["cross_entropy"]
    ends["perplexity"] = (perplexity(low), perplexity(high))
    return Score(kl, agreement, cross_entropy, ends)
