"""Initialize a student's token embeddings from the teacher's."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from students.model.decoder import SO8TForCausalLM


@torch.no_grad()
def initialize_embeddings(student: SO8TForCausalLM, scores: NDArray[np.float16]) -> None:
    """Fill the token embeddings from the teacher's principal ``scores [V, C]``, strongest first.

    A student of width D takes the first D columns; a wider one is padded with zeros. The result has
    the standard deviation of random weights, so that learning rates mean the same.

    Raises:
        ValueError: the vocabularies differ in size.
    """
    target = student.model.embed_tokens.weight
    vocab_size, width = target.shape
    if len(scores) != vocab_size:
        raise ValueError(
            f"the teacher has {len(scores)} token embeddings, the student {vocab_size}"
        )
    kept = scores[:, :width]
    values = np.zeros((vocab_size, width), dtype=np.float32)
    values[:, : kept.shape[1]] = kept
    if (std := values.std()) > 0:
        target.copy_(torch.from_numpy(values / std * student.config.initializer_range))
