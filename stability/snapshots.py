"""The last good states of a training, in memory, for rollbacks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stability.measures.tensors import local
from stability.random_state import random_state, restore_random_state


@dataclass(frozen=True)
class Extra:
    """The caller's own part of a snapshot: ``save`` returns a copy, ``restore`` puts it back."""

    save: Callable[[], Any]
    restore: Callable[[Any], None]


@dataclass(frozen=True)
class Snapshot:
    """The state from which the optimizer takes its next step, after ``step`` others.

    Taken after the backward pass, which has updated the buffers; the random state is from before
    the forward pass. ``moments``: the optimizer's state of each parameter, ``groups`` its settings;
    ``information``: of the newest probe reading; ``losses``: the loss detector's state.
    """

    step: int
    weights: list[Tensor]
    buffers: list[Tensor]
    moments: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    schedule: dict[str, Any] | None
    randomness: dict[str, Tensor]
    extra: Any
    information: float | None
    losses: dict[str, Any] | None
    copied: Any  # the event after which a GPU has copied it; ``None`` on a CPU


class Keeper:
    """Takes snapshots and keeps the newest ``count``.

    Each holds trained weights, buffers and optimizer state in main memory: with Adam three times
    the weights. A GPU copies them by itself while the processor goes on. Each process keeps its
    part of what FSDP has sharded. An optimizer with parameters that are not the model's is refused
    (``ValueError``).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        schedule: LRScheduler | None = None,
        extra: Extra | None = None,
        count: int,
    ) -> None:
        self.model, self.optimizer, self.schedule, self.extra = model, optimizer, schedule, extra
        self.count = count
        self.kept: list[Snapshot] = []
        self._random: tuple[int, dict[str, Tensor]] | None = None
        self.weights = [one for one in model.parameters() if one.requires_grad]
        known = {id(one) for one in model.parameters()}
        owned = [one for group in optimizer.param_groups for one in group["params"]]
        if unknown := sum(id(one) not in known for one in owned):
            raise ValueError(f"{unknown} parameters of the optimizer are not the model's")

    def keep_random_state(self, step: int) -> None:
        """Remember the random state before a step in which a snapshot may be taken."""
        self._random = step, random_state()

    @torch.no_grad()
    def take(
        self,
        step: int,
        information: float | None,
        *,
        losses: dict[str, Any] | None = None,
        keep_first: bool = False,
    ) -> None:
        """Take a snapshot; drop the oldest of too many, or with ``keep_first`` the second."""
        while len(self.kept) >= max(self.count, 2 if keep_first else 1):
            self.kept.pop(1 if keep_first and len(self.kept) > 1 else 0)
        known = self._random
        randomness = known[1] if known is not None and known[0] == step else random_state()
        groups = self.optimizer.param_groups
        states = (self.optimizer.state.get(one, {}) for one in self.weights)
        snapshot = Snapshot(
            step,
            [_copied(one) for one in self.weights],
            [_copied(one) for one in self.model.buffers()],
            [{key: _copied(value) for key, value in one.items()} for one in states],
            [{key: copy.copy(one[key]) for key in one if key != "params"} for one in groups],
            None if self.schedule is None else copy.deepcopy(self.schedule.state_dict()),
            randomness,
            None if self.extra is None else self.extra.save(),
            information,
            losses,
            self._event(),
        )
        self.kept.append(snapshot)

    def _event(self) -> Any:
        """What to wait for until the copies just begun are there."""
        device = self.weights[0].device if self.weights else torch.device("cpu")
        if device.type == "cpu":
            return None
        event = torch.get_device_module(device).Event()
        event.record()
        return event

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Restore a snapshot, and drop those taken after it."""
        self.restore_buffers(snapshot)
        for weight, saved in zip(self.weights, snapshot.weights, strict=True):
            local(weight).copy_(saved)
        for weight, moments in zip(self.weights, snapshot.moments, strict=True):
            self._restore_moments(weight, moments)
        for group, settings in zip(self.optimizer.param_groups, snapshot.groups, strict=True):
            group.update({key: copy.copy(value) for key, value in settings.items()})
        if self.schedule is not None and snapshot.schedule is not None:
            self.schedule.load_state_dict(copy.deepcopy(snapshot.schedule))
        restore_random_state(snapshot.randomness)
        if self.extra is not None:
            self.extra.restore(snapshot.extra)
        for weight in self.weights:
            weight.grad = None
        self.kept = [one for one in self.kept if one.step <= snapshot.step]

    @torch.no_grad()
    def restore_buffers(self, snapshot: Snapshot) -> None:
        """Restore only the buffers (running averages, which a forward pass changes)."""
        if snapshot.copied is not None:
            snapshot.copied.synchronize()
        for buffer, saved in zip(self.model.buffers(), snapshot.buffers, strict=True):
            local(buffer).copy_(saved)

    def _restore_moments(self, weight: nn.Parameter, moments: dict[str, Any]) -> None:
        """Write a parameter's state into the tensors that are there, which may be sharded."""
        if not moments:
            self.optimizer.state.pop(weight, None)
            return
        state = self.optimizer.state[weight]
        for key, saved in moments.items():
            if isinstance(saved, Tensor):
                local(state[key]).copy_(saved)
            else:
                state[key] = copy.deepcopy(saved)


def _copied(value: Any) -> Any:
    """A copy, in main memory; of a tensor only the local part.

    From a GPU it is there after the event that is recorded next. PyTorch lets it have memory that
    stays in place, which a GPU can write to by itself.
    """
    if isinstance(value, Tensor):
        return local(value.detach()).to("cpu", copy=True, non_blocking=True)
    return copy.deepcopy(value)
