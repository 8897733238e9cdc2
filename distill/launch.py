"""The processes of one launch (``torchrun``, ``accelerate launch``), or this one alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from distill.errors import UserError
from teachers.capture import Share

PATIENCE = timedelta(days=30)  # processes wait for the one that captures the largest share

Value = TypeVar("Value")


def launched_share() -> Share:
    """This process's part of the work, from what ``torchrun`` and ``accelerate launch`` set.

    Raises:
        UserError: RANK and WORLD_SIZE are not numbers that fit together.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not rank.isdigit() or not world.isdigit() or not int(rank) < int(world):
        raise UserError(
            f"RANK={rank!r} and WORLD_SIZE={world!r} in the environment do not fit together; unset them"
        )
    return Share(int(rank), int(world))


@dataclass(frozen=True)
class Launch:
    """This process's place in its launch, and what keeps the processes together."""

    share: Share

    @classmethod
    def join(cls) -> Launch:
        """Meet the other processes of the launch, if there are any."""
        share = launched_share()
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
