"""The shared codec file: how a store's hidden states are encoded, and their way to logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from teachers.targets.distributions import Arrays, floats
from teachers.targets.output_head import OutputHead
from teachers.targets.recipe import Recipe
from teachers.targets.state_codec import Basis, bases_arrays, bases_in


@dataclass(frozen=True)
class SharedCodec:
    """What all positions of a store share.

    ``bases``: how hidden states are encoded (``final``, ``layer<i>``); ``head``: what turns a
    decoded final state into logits, ``None`` where no state is kept; ``sketch_kl``: the mean
    KL(teacher ‖ what a sketch gives back) that was measured when it was fitted, nats at T = 1.
    """

    bases: Mapping[str, Basis]
    head: OutputHead | None
    sketch_kl: float | None = None

    @property
    def sketch(self) -> dict[str, float] | None:
        """``bytes`` of a position's sketch and what it loses, ``kl``, where that was measured."""
        if self.sketch_kl is None:
            return None
        return {"bytes": self.bases["final"].bytes_per_position, "kl": self.sketch_kl}

    def arrays(self) -> Arrays:
        """Everything as named arrays; the head's matrix in float16."""
        arrays = bases_arrays(self.bases)
        if self.head is not None:
            arrays["head_matrix"] = self.head.matrix.half().numpy()
            arrays["head_bias"] = self.head.bias.numpy()
            if self.head.cap:
                arrays["head_cap"] = np.array([self.head.cap])
        if self.sketch_kl is not None:
            arrays["sketch_kl"] = np.array([self.sketch_kl])
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Arrays, recipe: Recipe) -> SharedCodec:
        """The inverse of ``arrays``.

        Raises:
            KeyError, IndexError, TypeError, ValueError: these arrays are something else.
        """
        head, bases = None, bases_in(arrays, recipe.layers)
        if recipe.needs_states:
            matrix, bias = floats(arrays["head_matrix"]), floats(arrays["head_bias"])
            cap = float(arrays["head_cap"][0]) if "head_cap" in arrays else 0.0
            columns = len(bases["final"].steps) if recipe.has_sketch else matrix.shape[-1]
            if matrix.shape != (len(bias), columns) or bias.ndim != 1 or not 0.0 <= cap < np.inf:
                raise ValueError(f"an output matrix {list(matrix.shape)} of {columns} coordinates")
            head = OutputHead(matrix, bias, cap)
        known = float(arrays["sketch_kl"][0]) if "sketch_kl" in arrays else None
        return cls(bases, head, known)
