"""One process's part of a capture that several share; without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """Which shards this process writes: those whose number leaves ``rank`` when divided by ``world``."""

    rank: int = 0
    world: int = 1


WHOLE = Share()
