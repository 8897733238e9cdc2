"""Training without the rows of the input embedding that never occur.

A token that is in no sequence of the store is never looked up: its row has no gradient, no moments,
and (embeddings do not decay) never changes. In an untied student those rows are left out while it
trains, and with them their share of the optimizer's memory and time: most of it where data is short
and the vocabulary large.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from students.model.decoder import SO8TForCausalLM
from students.model.interface import Student
from teachers.store.store import SoftTargetStore


class UsedRows(nn.Module):
    """Stands for an embedding ``[V, D]`` of which only the rows ``used [U]`` are looked up."""

    def __init__(self, whole: nn.Embedding, used: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(whole.weight.detach()[used].clone())  # [U, D]
        row_of = torch.full((whole.num_embeddings,), -1, dtype=torch.int64)
        row_of[used] = torch.arange(len(used))
        self.register_buffer("row_of", row_of, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of tokens ``[...]`` → ``[..., D]``; a token that is not used is an error."""
        assert isinstance(self.row_of, Tensor)
        return F.embedding(self.row_of[ids], self.weight)


def used_tokens(store: SoftTargetStore, prompts: Iterable[NDArray[np.int32]] = ()) -> Tensor:
    """The tokens that occur in a store or in ``prompts``, ascending, and 0, the padding."""
    seen = store.files.overview.occurring.copy()
    seen[0] = True
    for tokens in prompts:
        seen[tokens] = True
    return torch.from_numpy(np.flatnonzero(seen))


@contextmanager
def only_used_rows(student: Student, used: Tensor) -> Iterator[None]:
    """Within, an untied student's input embedding has the rows ``used`` only."""
    whole = student.model.embed_tokens if isinstance(student, SO8TForCausalLM) else None
    if student.config.tie_word_embeddings or not isinstance(whole, nn.Embedding):
        yield
        return
    assert isinstance(student, SO8TForCausalLM)
    rows = UsedRows(whole, used)
    student.model.embed_tokens = rows  # type: ignore[assignment]
    try:
        yield
    finally:
        with torch.no_grad():
            whole.to(rows.weight.device)
            whole.weight[used.to(rows.weight.device)] = rows.weight
        student.model.embed_tokens = whole
