"""Tanh-GELU as llama.cpp computes it on processors: looked up in a table of 16-bit floats."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TANH = "gelu_pytorch_tanh"
EDGE = 10.0  # from here on it is x, and 0 on the other side


class TableGELU(nn.Module):
    """The entry for ``x`` rounded to float16, in the dtype of ``x``."""

    def forward(self, x: Tensor) -> Tensor:
        entry = F.gelu(x.half().float(), approximate="tanh").half().to(x.dtype)
        return torch.where(x >= EDGE, x, torch.where(x <= -EDGE, 0.0, entry))


def uses_table(config: Any) -> bool:
    """Whether llama.cpp computes a model of this transformers configuration with the table."""
    return getattr(config, "hidden_activation", None) == TANH


@contextmanager
def computed_as_llama_cpp(model: Any) -> Iterator[None]:
    """Compute with a transformers model for which ``uses_table`` says so as llama.cpp does."""
    owners = [layer.mlp for layer in model.model.layers]
    before = [owner.act_fn for owner in owners]
    try:
        for owner in owners:
            owner.act_fn = TableGELU()
        yield
    finally:
        for owner, function in zip(owners, before, strict=True):
            owner.act_fn = function
