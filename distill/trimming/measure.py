"""What a teacher and the same model with a smaller vocabulary say of one text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.errors import ProofFailed, UserError
from distill.losses.divergences import cross_entropy
from distill.metrics.distributions import groups, next_tokens
from distill.trimming.text import Piece, tokenized, windows
from teachers.base import Teacher, Tokens
from teachers.llama_cpp.library.kernels import LoadOptions
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.vocabulary.reduced import ReducedVocabulary

ROWS = 64  # whose probabilities are summed together
MAX_LOGIT_DIFFERENCE = 1e-3
PROOF_SEQUENCES, PROOF_TOKENS = 4, 256
Report = Callable[[int], None]


def teacher_mass(
    teacher: Teacher, sequences: Sequence[Tokens], report: Report
) -> NDArray[np.float64]:
    """The probability of every token at temperature 1, summed over all positions, ``[V]``;
    ``report`` counts positions.

    Raises:
        UserError: the teacher's logits are not finite.
    """
    mass, done = torch.zeros(teacher.info.vocab_size, dtype=torch.float64), 0
    for part in groups(sequences, teacher.info.vocab_size):
        logits = _logits(teacher, sequences[part])
        for start in range(0, len(logits), ROWS):
            mass += logits[start : start + ROWS].softmax(dim=-1).sum(dim=0)
        report(done := done + len(logits))
    return mass.numpy()


def bits_per_byte(
    teacher: Teacher, pieces: Sequence[Piece], report: Report = lambda positions: None
) -> float:
    """What the model needs to write the pieces, each anew, with its own tokenizer, in bits for
    each of their bytes; ``report`` counts positions.

    Raises:
        UserError: the model's logits are not finite.
    """
    sequences = windows(teacher, tokenized(teacher, pieces, lambda done: None))
    nats, done = 0.0, 0
    for part in groups(sequences, teacher.info.vocab_size):
        logits = _logits(teacher, sequences[part])
        nats += float(cross_entropy(logits, next_tokens(sequences[part])).double().sum())
        report(done := done + len(logits))
    return nats / math.log(2) / sum(piece.bytes for piece in pieces)


def _logits(teacher: Teacher, sequences: Sequence[Tokens]) -> Tensor:
    logits = torch.from_numpy(teacher.logits(sequences))
    if not bool(torch.isfinite(logits).all()):
        raise UserError(
            f"{teacher.info.name} computes logits that are not finite; download or convert it again"
        )
    return logits


def logit_difference(
    original: Path, trimmed: Path, vocabulary: ReducedVocabulary, pieces: Sequence[Piece]
) -> tuple[float, int]:
    """The largest difference of a kept token's logit between the two files, on the same tokens,
    and at how many positions; in llama.cpp with a float32 KV cache.

    Raises:
        ProofFailed: it is more than rounding.
    """
    # Kernels for rearranged weights take no matrix of any number of rows, and round otherwise.
    plain = LoadOptions(extra_buffers=False)
    with GGUFTeacher(trimmed, plain) as model:
        rows = tokenized(model, pieces, lambda done: None)
        chosen = windows(model, rows)[:PROOF_SEQUENCES]
        sequences = [one[: 1 + PROOF_TOKENS // len(chosen)] for one in chosen]
        ours = model.logits(sequences, exact=True)
    kept = vocabulary.kept.astype(np.int32)
    with GGUFTeacher(original, plain) as model:
        theirs = model.logits([kept[one] for one in sequences], exact=True)[:, kept]
    difference = float(np.abs(ours - theirs).max())
    if not difference <= MAX_LOGIT_DIFFERENCE:
        raise ProofFailed(
            f"logits of kept tokens differ by {difference:.1e} from the original's (at most "
            f"{MAX_LOGIT_DIFFERENCE:.0e} is rounding); the file was not written"
        )
    return difference, len(ours)
