"""The shared codec file: how a store's hidden states are encoded, and their way to logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from teachers.targets.distributions import Arrays, OutputHead, floats
from teachers.targets.recipe import Recipe
from teachers.targets.state_codec import Basis, bases_arrays, bases_in


@dataclass(frozen=True)
class SharedCodec:
    """What all positions of a store share.

    ``bases``: how hidden states are encoded (``final``, ``layer<i>``); ``head``: what turns a
    decoded final state into logits, ``None`` where no state is kept.
    """

    bases: Mapping[str, Basis]
    head: OutputHead | None

    def arrays(self) -> Arrays:
        """Everything as named arrays; the head's matrix in float16."""
        arrays = bases_arrays(self.bases)
        if self.head is not None:
            arrays["head_matrix"] = self.head.matrix.half().numpy()
            arrays["head_bias"] = self.head.bias.numpy()
            if self.head.cap:
                arrays["head_cap"] = np.array([self.head.cap])
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Arrays, recipe: Recipe) -> SharedCodec:
        """The inverse of ``arrays``."""
        head = None
        if "head_matrix" in arrays:
            cap = float(arrays["head_cap"][0]) if "head_cap" in arrays else 0.0
            head = OutputHead(floats(arrays["head_matrix"]), floats(arrays["head_bias"]), cap)
        return cls(bases_in(arrays, recipe.layers), head)
