"""What all positions of a store share: how hidden states are encoded, and what turns them into
logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from teachers.targets.distributions import Arrays, OutputHead
from teachers.targets.recipe import Recipe
from teachers.targets.state_codec import Basis


@dataclass(frozen=True)
class Companion:
    """What all positions of a store share.

    ``bases``: how hidden states are encoded (``final``, ``layer<i>``); ``head``: what turns a
    decoded final state into logits, ``None`` where no state is kept.
    """

    bases: Mapping[str, Basis]
    head: OutputHead | None

    def arrays(self) -> Arrays:
        """Everything as named arrays; the head's matrix in float16."""
        arrays: Arrays = {}
        for name, basis in self.bases.items():
            arrays |= basis.arrays(name)
        if self.head is not None:
            arrays |= {
                "head_matrix": self.head.matrix.half().numpy(),
                "head_bias": self.head.bias.numpy(),
            }
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Arrays, recipe: Recipe) -> Companion:
        """The inverse of ``arrays``."""
        names = ["final", *(f"layer{layer}" for layer in recipe.layers)]
        found = {name: Basis.from_arrays(arrays, name) for name in names}
        head = None
        if "head_matrix" in arrays:
            matrix, bias = (
                np.array(arrays[name], np.float32) for name in ("head_matrix", "head_bias")
            )
            head = OutputHead(torch.from_numpy(matrix), torch.from_numpy(bias))
        return cls({name: basis for name, basis in found.items() if basis is not None}, head)
