"""A teacher's token embeddings for students of any width: principal scores, strongest first."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from teachers.base import Floats
from teachers.gguf.file import GGUFFile, TeacherFileError
from teachers.targets.threads import one_thread

EMBEDDING = "token_embd.weight"
# Wider students are rare, and the strongest come first. Each column costs two bytes a token: 1,024
# of them are 66 MB for a vocabulary of 32,064 and 311 MB for one of 151,936.
MAX_COLUMNS = 1024
ROWS_TOGETHER = 8192


def stored_columns(width: int) -> int:
    """How many columns are kept of embeddings of this width."""
    return min(width, MAX_COLUMNS)


def principal_scores(file: GGUFFile) -> NDArray[np.float16]:
    """The token embeddings on their principal directions, ``[V, C]``, with an average square of 1.

    A student of width D takes the first D columns. The mean is subtracted: it does not distinguish
    tokens. Each direction's greatest entry is positive, so that equal files give equal scores.

    Raises:
        TeacherFileError: the embeddings are not finite, or of a type that cannot be read.
    """
    vocab_size, width = file.tensors[EMBEDDING].shape
    sums = (rows.sum(axis=0, dtype=np.float64) for _, rows in _blocks(file))
    mean = (sum(sums, np.zeros(width)) / vocab_size).astype(np.float32)
    gram = np.zeros((width, width))
    for _, rows in _blocks(file):
        centered = rows - mean
        gram += centered.T @ centered
    if not np.isfinite(gram).all():
        raise TeacherFileError(
            f"{file.path}: its token embeddings are not finite; download or convert it again"
        )
    with one_thread():
        strengths, directions = (part.numpy() for part in torch.linalg.eigh(torch.from_numpy(gram)))
    count = stored_columns(width)
    chosen = directions[:, ::-1][:, :count]
    chosen = chosen * np.sign(chosen[np.abs(chosen).argmax(axis=0), np.arange(count)])
    spread = np.sqrt(max(0.0, strengths[::-1][:count].sum()) / (vocab_size * count)) or 1.0
    directions = (chosen / spread).astype(np.float32)
    scores = np.empty((vocab_size, count), dtype=np.float16)
    for start, rows in _blocks(file):
        scores[start : start + len(rows)] = (rows - mean) @ directions
    return scores


def _blocks(file: GGUFFile) -> Iterator[tuple[int, Floats]]:
    """The embeddings, some rows at a time: a large vocabulary in float32 is gigabytes."""
    vocab_size = file.tensors[EMBEDDING].shape[0]
    for start in range(0, vocab_size, ROWS_TOGETHER):
        yield start, file.rows(EMBEDDING, start, min(vocab_size, start + ROWS_TOGETHER))
