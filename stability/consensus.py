"""What the processes of a launch must agree on, so that all of them do the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed

from stability.detectors import Trouble

BATCH = "batch: "  # how ``stability.diagnosis`` begins the name of a batch's tensor


class Processes:
    """The processes of ``torch.distributed``, or this one alone. ``device``: of the tensors they exchange."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.count = 1
        if distributed.is_available() and distributed.is_initialized():
            self.count = distributed.get_world_size()

    def most(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self.count == 1:
            return number
        value = torch.tensor(number, device=self.device)
        distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
        return int(value)

    def all(self, value: Any) -> list[Any]:
        """Every process's value, in the order of their ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values


def nearest_the_cause(found: Sequence[Trouble | None]) -> Trouble:
    """The most severe of what the processes found in one step; of equals what is nearest to the cause.

    The process that has the damage can name it; the others see what came of it: a loss that is not finite though their
    own batch is, or a collapse that they would blame on the data.
    """

    def rank(one: Trouble) -> tuple[int, bool, bool, bool]:
        named = one.tensor or ""
        return int(one.action), not one.blames_data, named.startswith(BATCH), bool(named)

    return max((one for one in found if one is not None), key=rank)  # the first process's of equals
