"""Begin from the teacher instead of from noise: token embeddings."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from students.model.decoder import SO8TForCausalLM


@torch.no_grad()
def initialise_embeddings(student: SO8TForCausalLM, scores: NDArray[np.float16]) -> None:
    """Fill the student's token embeddings from the teacher's principal scores, ``[V, C]``,
    strongest first.

    A student of width D takes the first D columns; a wider one is padded with zeros. The result is
    scaled to the student's own initial spread, so that learning rates mean the same as from random
    weights.

    Raises:
        ValueError: the vocabularies differ in size.
    """
    target = student.model.embed_tokens.weight
    vocab_size, width = target.shape
    if len(scores) != vocab_size:
        raise ValueError(
            f"the teacher has {len(scores)} token embeddings, the student {vocab_size}"
        )
    taken = scores[:, :width]
    filled = np.zeros((vocab_size, width), dtype=np.float32)
    filled[:, : taken.shape[1]] = taken
    spread = filled.std()
    if spread > 0:
        target.copy_(torch.from_numpy(filled / spread * student.config.initializer_range))
