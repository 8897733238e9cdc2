"""What the processes of a launch must agree on, so that all of them do the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed


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
