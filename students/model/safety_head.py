"""The safety head: ALLOW / ESCALATE / REFUSE for a prompt, from a student's states and its tokens.

Letters: N prompts, T tokens of one, D width, L chosen layers, F = D · (L + 1) · positions features,
B buckets, C = 3 decisions.

A small student's states say little about words that its text never had; which tokens stand
together says more. So the head adds a weight for every run of one to four tokens, found by a hash
in a table of B rows (Weinberger et al. 2009, "Feature hashing"; a bag of n-grams as in Joulin et
al. 2017). Both parts are exact functions of what an exported file computes anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from stability.precision import full_precision
from students.model.head_decisions import DECISIONS

LONGEST_RUN = 4  # tokens
MOST_BUCKETS = 1 << 22
# FNV-1a over 64-bit token ids, then the finalizer of SplitMix64 (Steele et al. 2014).
_OFFSET, _PRIME = 0xCBF29CE484222325, 0x100000001B3
_MIXERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass(frozen=True)
class SafetyShape:
    """What a safety head looks at: the final state of the last token always.

    ``layers``: layers, from 0, whose output it sees besides the final state. ``mean``: of all
    these, the mean over the tokens too. ``buckets``: rows of its table of token runs, 0 for none.
    """

    layers: tuple[int, ...] = ()
    mean: bool = False
    buckets: int = 0

    def features(self, width: int) -> int:
        """F, for states of ``width``."""
        return width * (len(self.layers) + 1) * (2 if self.mean else 1)

    def to_json(self) -> dict[str, Any]:
        """The inverse of ``shape_of``."""
        return {**vars(self), "layers": list(self.layers)}


def shape_of(saved: Mapping[str, Any] | None) -> SafetyShape:
    """The shape that a student's configuration says, untrusted; ``ValueError`` for nonsense."""
    if saved is None:
        return LAST_STATE
    layers, mean, buckets = (saved.get(name) for name in ("layers", "mean", "buckets"))
    if (
        not isinstance(layers, list | tuple)
        or not all(type(layer) is int and layer >= 0 for layer in layers)
        or type(mean) is not bool
        or type(buckets) is not int
        or not 0 <= buckets <= MOST_BUCKETS
    ):
        raise ValueError(f"safety_shape is {dict(saved)!r}, not layers, mean and buckets")
    return SafetyShape(tuple(layers), mean, buckets)


LAST_STATE = SafetyShape()  # in training, and in files of older versions


class SafetyHead(nn.Module):
    """Logits of the three decisions: a linear map of F features, plus the weights of the prompt's
    token runs, divided by the root of their number."""

    runs: Tensor | None

    def __init__(self, width: int, shape: SafetyShape = LAST_STATE) -> None:
        super().__init__()
        self.shape = shape
        self.linear = nn.Linear(shape.features(width), len(DECISIONS))
        # A buffer: it is fitted in one go after training, and no optimizer may move it.
        self.register_buffer(
            "runs", torch.zeros(shape.buckets, len(DECISIONS)) if shape.buckets else None
        )

    def forward(self, features: Tensor, tokens: Sequence[NDArray[np.int32]] = ()) -> Tensor:
        """Logits ``[..., 3]`` of ``features [..., F]``, in float32; with a table of runs, the
        features are ``[N, F]`` and the prompts' ``tokens`` are needed."""
        with full_precision(features):
            weight, bias = self.linear.weight.float(), self.linear.bias.float()
            logits = F.linear(features.float(), weight, bias)
        if self.runs is None:
            return logits
        return logits + self.of_runs(tokens).to(logits.device)

    def of_runs(self, tokens: Sequence[NDArray[np.int32]]) -> Tensor:
        """What the token runs of each prompt add to its logits, ``[N, 3]``."""
        assert self.runs is not None
        table = self.runs.cpu()
        found = [token_runs(row, self.shape.buckets) for row in tokens]
        return torch.stack([table[rows].sum(dim=0) / len(rows) ** 0.5 for rows in found])


def token_runs(tokens: NDArray[np.int32], buckets: int) -> Tensor:
    """The table rows of a prompt's runs of one to ``LONGEST_RUN`` tokens, each once, ascending."""
    ids = np.asarray(tokens).astype(np.uint64)
    rows = []
    for length in range(1, min(LONGEST_RUN, len(ids)) + 1):
        count = len(ids) - length + 1
        hashed = np.full(count, _OFFSET ^ length, dtype=np.uint64)
        for place in range(length):  # unsigned arithmetic wraps around, as the hash wants it
            hashed = (hashed ^ ids[place : place + count]) * np.uint64(_PRIME)
        for shift, mixer in zip((30, 27), _MIXERS, strict=True):
            hashed = (hashed ^ (hashed >> np.uint64(shift))) * np.uint64(mixer)
        rows.append((hashed ^ (hashed >> np.uint64(31))) % np.uint64(buckets))
    return torch.from_numpy(np.unique(np.concatenate(rows)).astype(np.int64))


def prompt_features(shape: SafetyShape, final: Tensor, layers: Mapping[int, Tensor]) -> Tensor:
    """The features ``[F]`` of one prompt, from its ``final [T, D]`` states and those of the chosen
    ``layers``.

    The mean leaves out the first of several tokens: it gathers attention, not meaning, and its
    state is far larger than others (Xiao et al. 2024).
    """
    states = [final, *(layers[number] for number in shape.layers)]
    parts = [state[-1] for state in states]
    if shape.mean:
        parts += [state[1:].mean(dim=0) if len(state) > 1 else state[0] for state in states]
    return torch.cat([part.float() for part in parts])
