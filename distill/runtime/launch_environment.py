"""What ``torchrun`` and ``accelerate launch`` have set, before any process meets another."""

from __future__ import annotations

import os
from importlib.util import find_spec

from distill.config.schema import TrainConfig
from distill.errors import UserError
from teachers.base import ProcessRank


def process_rank() -> ProcessRank:
    """This process's part of a ``torchrun`` or ``accelerate`` launch; ``UserError`` if it is
    malformed, also as far as it is about this machine (``teachers.launch``)."""
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if not (value := os.environ.get(name, "0")).isdigit():
            raise UserError(f"{name}={value!r} in the environment is no number; unset it")
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not rank.isdigit() or not world.isdigit() or not int(rank) < int(world):
        raise UserError(
            f"RANK={rank!r} and WORLD_SIZE={world!r} in the environment do not fit together; unset "
            "them"
        )
    return ProcessRank(int(rank), int(world))


def fsdp_is_asked_for() -> bool:
    """Whether the launcher's settings say FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def require_trainable(config: TrainConfig, processes: int) -> None:
    """Raise ``UserError`` unless the settings fit the launch and what is installed."""
    if config.on_policy and processes > 1:
        raise UserError(
            f"train.on_policy = {config.on_policy:g} works in one process, not in {processes}; "
            "start it without a launcher"
        )
    for tracker in config.trackers:
        if find_spec(tracker) is None:
            raise UserError(
                f"train.trackers names {tracker}, which is not installed: pip install {tracker}"
            )
