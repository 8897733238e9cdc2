"""Agreement of the processes of a launch, so that all of them do the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed

from stability.detectors import Anomaly

BATCH = "batch: "  # before the name of a batch's tensor (``stability.diagnosis``)


class Processes:
    """The processes of ``torch.distributed``, or only this one; they exchange on ``device``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        launched = distributed.is_available() and distributed.is_initialized()
        self.count = distributed.get_world_size() if launched else 1

    def maximum(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self.count == 1:
            return number
        value = torch.tensor(number, device=self.device)
        distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
        return int(value)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values


def root_cause(anomalies: Sequence[Anomaly | None]) -> Anomaly:
    """The most severe of the processes' anomalies in one step; of equals the one nearest the cause.

    The process with the damage can name it. The others see its effects: a loss that is not finite
    though their own batch is, or a collapse that they would attribute to the data.
    """

    def rank(one: Anomaly) -> tuple[int, bool, bool, bool]:
        tensor = one.tensor or ""
        return int(one.action), not one.suspects_data, tensor.startswith(BATCH), bool(tensor)

    return max((one for one in anomalies if one is not None), key=rank)  # the first of equals
