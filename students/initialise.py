"""Begin from the teacher instead of from noise: token embeddings."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from students.model import SO8TForCausalLM


@torch.no_grad()
def initialise_embeddings(student: SO8TForCausalLM, teacher: NDArray[np.float32]) -> None:
    """Fill the student's token embeddings from the teacher's, ``[V, D']``.

    At equal width they are copied; otherwise projected on their D first principal directions (about the
    mean, which carries no information about which token it is) or padded with zeros. The result is scaled to
    the student's own initial spread, so that learning rates mean the same as from random weights.

    Raises:
        ValueError: the vocabularies differ in size.
    """
    target = student.model.embed_tokens.weight
    vocab_size, width = target.shape
    if teacher.shape[0] != vocab_size:
        raise ValueError(f"the teacher has {teacher.shape[0]} token embeddings, the student {vocab_size}")
    centred = teacher - teacher.mean(axis=0, dtype=np.float64).astype(np.float32)
    if teacher.shape[1] > width:
        _, directions = np.linalg.eigh((centred.T @ centred).astype(np.float64))
        centred = centred @ directions[:, ::-1][:, :width].astype(np.float32)
    filled = np.zeros((vocab_size, width), dtype=np.float32)
    filled[:, : centred.shape[1]] = centred
    spread = filled.std()
    if spread > 0:
        target.copy_(torch.from_numpy(filled / spread * student.config.initializer_range))
