"""The processes of one launch (``torchrun``, ``accelerate launch``), or this one alone."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from distill.runtime.launch_environment import process_rank
from teachers.base import ProcessRank

PATIENCE = timedelta(days=30)  # processes wait for the one that captures the largest share

Value = TypeVar("Value")


@dataclass(frozen=True)
class Launch:
    """This process's place in its launch, and what keeps the processes together."""

    share: ProcessRank

    @classmethod
    def join(cls) -> Launch:
        """Meet the other processes of the launch, if there are any."""
        share = process_rank()
        if share.world > 1:
            PartialState(timeout=PATIENCE)
        return cls(share)

    @property
    def first(self) -> bool:
        """Whether this process does what only one of them does."""
        return self.share.rank == 0

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.share.world > 1:
            PartialState().wait_for_everyone()

    def agreed(self, value: Value) -> Value:
        """The first process's value, in every process."""
        if self.share.world == 1:
            return value
        values: list[Value] = broadcast_object_list([value])
        return values[0]
