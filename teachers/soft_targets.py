"""The typed record of a teacher's answer.

Letters: N positions, V vocabulary, K stored top tokens, M temperature nodes. One position t of a sequence
holds the teacher's distribution over the token that follows t.

Only the kind ``compact`` exists so far. Further kinds (a sketch or samples of the tail, the whole hidden
state, every logit) are further dataclasses with the same ``kind``, ``arrays`` and ``from_arrays``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Arrays = dict[str, NDArray[np.generic]]


def nodes_for(*temperatures: float) -> tuple[float, ...]:
    """The temperatures whose log-partition is stored: 1, for evaluation, and the run's own."""
    return tuple(sorted({1.0, *map(float, temperatures)}))


@dataclass(frozen=True)
class CompactTargets:
    """Exact top-k logits and the exact log-partition at a few temperatures.

    Attributes:
        topk_ids: the K most probable tokens, most probable first, int64 ``[..., K]``.
        topk_logits: their raw logits, float32 ``[..., K]``.
        logsumexp: log Σ_v exp(z_v / T) for each node T, nats, float32 ``[..., M]``.
        nodes: the M temperatures, ascending.
    """

    topk_ids: Tensor
    topk_logits: Tensor
    logsumexp: Tensor
    nodes: tuple[float, ...]
    kind: ClassVar[str] = "compact"

    def log_partition(self, temperature: float) -> Tensor:
        """log Σ_v exp(z_v / T) at one of the stored temperatures, ``[...]``, in nats.

        Raises:
            ValueError: T was not captured; top-k logits alone cannot tell the tail's mass at another T.
        """
        if temperature not in self.nodes:
            stored = ", ".join(f"{node:g}" for node in self.nodes)
            raise ValueError(
                f"these soft targets know the tail at temperature {stored}, not at {temperature:g}; "
                "capture again with that temperature"
            )
        return self.logsumexp[..., self.nodes.index(temperature)]

    def topk_log_probs(self, temperature: float) -> Tensor:
        """Log-probabilities of the top-k tokens at temperature T, ``[..., K]``, in nats."""
        return self.topk_logits / temperature - self.log_partition(temperature)[..., None]

    def tail_mass(self, temperature: float) -> Tensor:
        """Probability outside the top-k at temperature T, ``[...]``; exact up to float32 rounding."""
        return (1.0 - self.topk_log_probs(temperature).exp().sum(dim=-1)).clamp(min=0.0)

    def select(self, index: Tensor | slice) -> CompactTargets:
        """The targets at ``index`` of the leading dimension (a slice, or any index PyTorch accepts)."""
        return CompactTargets(
            self.topk_ids[index], self.topk_logits[index], self.logsumexp[index], self.nodes
        )

    def to(self, device: torch.device) -> CompactTargets:
        """The same targets on another device."""
        moved = (self.topk_ids.to(device), self.topk_logits.to(device), self.logsumexp.to(device))
        return CompactTargets(*moved, self.nodes)

    @classmethod
    def from_logits(cls, logits: Tensor, num_topk: int, nodes: tuple[float, ...]) -> CompactTargets:
        """Reduce dense logits ``[N, V]`` (float32) to compact targets.

        Raises:
            ValueError: a log-partition or one of the top-k logits is not finite (an excluded token's −∞ is
                fine outside the top-k).
        """
        values, ids = torch.topk(logits, min(num_topk, logits.shape[-1]), dim=-1)
        partitions = torch.stack([torch.logsumexp(logits / node, dim=-1) for node in nodes], dim=-1)
        if not bool(torch.isfinite(partitions).all() and torch.isfinite(values).all()):
            raise ValueError("the teacher's logits are not finite; its weights are damaged")
        return cls(ids, values, partitions, nodes)

    def arrays(self, vocab_size: int) -> Arrays:
        """The targets as the arrays a store keeps; ids take two bytes where the vocabulary allows."""
        ids = self.topk_ids.numpy()
        return {
            "topk_ids": ids.astype(np.uint16 if vocab_size <= 1 << 16 else np.int32),
            "topk_logits": self.topk_logits.numpy(),
            "logsumexp": self.logsumexp.numpy(),
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays, nodes: tuple[float, ...]) -> CompactTargets:
        """Rebuild targets from stored arrays."""
        return cls(
            torch.from_numpy(arrays["topk_ids"].astype(np.int64)),
            torch.from_numpy(np.ascontiguousarray(arrays["topk_logits"], dtype=np.float32)),
            torch.from_numpy(np.ascontiguousarray(arrays["logsumexp"], dtype=np.float32)),
            nodes,
        )
