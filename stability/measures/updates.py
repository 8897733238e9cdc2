"""How much one optimizer step changes each weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stability.measures.tensors import local

SAMPLED = 1024  # elements read of each weight


def _stride(number: int, shape: torch.Size) -> int:
    """Distance of sampled elements, coprime to the row length: else few columns are sampled."""
    stride = max(1, number // SAMPLED)
    while shape and math.gcd(stride, shape[-1]) > 1:
        stride -= 1
    return stride


class UpdateSample:
    """How much one optimizer step changes each weight, from at most 1,024 evenly spaced elements.

    Reading whole weights twice per step would cost as much as the optimizer. From 1,024 elements
    the relative size of a change is known to about 1/√1024 = 3 %. For the same reason the values
    after one step serve as those before the next, until ``reset``.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        flat = [local(weight.detach()).reshape(-1) for weight in weights]
        width = max((min(SAMPLED, one.numel()) for one in flat), default=0)
        device = flat[0].device if flat else torch.device("cpu")
        self._weights = list(weights)
        pairs = zip(flat, weights, strict=True)
        self._strides = [_stride(one.numel(), weight.shape) for one, weight in pairs]
        self._counts = [min(SAMPLED, one.numel()) for one in flat]
        self._before = torch.zeros(len(flat), width, device=device)
        self._after = torch.zeros(len(flat), width, device=device)
        self._addresses: list[int] = []
        self._sources: list[Tensor] = []
        self._known = False

    def before(self) -> None:
        if not self._known:
            self._read(self._before)
            self._known = True

    def reset(self) -> None:
        self._known = False

    def ratios(self) -> Tensor:
        """‖change‖ / ‖weight before‖ of each weight since ``before``, ``[N]``.

        0 for a weight that was all zeros; not finite for a weight that is not finite now.
        """
        self._read(self._after)
        change = torch.linalg.vector_norm(self._after - self._before, dim=1)
        size = torch.linalg.vector_norm(self._before, dim=1)
        self._before, self._after = self._after, self._before
        return torch.where((size == 0) & change.isfinite(), 0.0, change / size)

    def _read(self, rows: Tensor) -> None:
        flat = [local(weight.detach()) for weight in self._weights]
        addresses = [weight.data_ptr() for weight in flat]
        if addresses != self._addresses:  # seen for the first time, or moved
            views = all(one.is_contiguous() for one in flat)
            self._addresses = addresses if views else []
            self._sources = [
                one.reshape(-1)[: stride * count : stride]
                for one, stride, count in zip(flat, self._strides, self._counts, strict=True)
            ]
        targets = [rows[index, :count] for index, count in enumerate(self._counts)]
        if targets:
            torch._foreach_copy_(targets, self._sources)
