"""The last good states of a training, in memory, to go back to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stability.measures.random_state import random_state, restore_random_state
from stability.measures.step import local


@dataclass(frozen=True)
class Extra:
    """What of the caller's own state goes with a snapshot: ``save`` returns a copy, ``restore`` puts it back."""

    save: Callable[[], Any]
    restore: Callable[[Any], None]


@dataclass(frozen=True)
class Snapshot:
    """What the optimizer's step after ``step`` others begins from.

    Taken after that step's backward pass: buffers are as that left them; the random state is that of before it.
    ``moments``: the optimizer's state of each parameter, ``groups`` its settings; ``information``: of the newest look
    at the fixed text.
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


class Keeper:
    """Takes snapshots and keeps the newest few.

    Each holds, in main memory, the weights that are trained, buffers and optimizer state: with Adam three times the
    weights. Of what FSDP has spread, each process keeps its part.

    Raises:
        ValueError: the optimizer has parameters that are not the model's, which would not go back.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler | None,
        extra: Extra | None,
        count: int,
    ) -> None:
        self.model, self.optimizer, self.schedule, self.extra = model, optimizer, schedule, extra
        self.count = count
        self.kept: list[Snapshot] = []
        self._random: tuple[int, dict[str, Tensor]] | None = None
        self.weights = [one for one in model.parameters() if one.requires_grad]
        known = {id(one) for one in model.parameters()}
        strangers = sum(id(one) not in known for group in optimizer.param_groups for one in group["params"])
        if strangers:
            raise ValueError(
                f"{strangers} parameters of the optimizer are not the model's: they could not go back"
            )

    def keep_random_state(self, step: int) -> None:
        """Remember the random state as it is before a step that a snapshot may be taken in."""
        self._random = step, random_state()

    @torch.no_grad()
    def take(self, step: int, information: float | None, *, keep_first: bool = False) -> None:
        """Keep the state as it is now; the oldest goes when there are too many, or the second where the first is to
        stay."""
        while len(self.kept) >= max(self.count, 2 if keep_first else 1):
            self.kept.pop(1 if keep_first and len(self.kept) > 1 else 0)
        settings = [
            {key: copy.copy(value) for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        self.kept.append(
            Snapshot(
                step,
                [_copied(one) for one in self.weights],
                [_copied(one) for one in self.model.buffers()],
                [_copied_state(self.optimizer.state.get(one, {})) for one in self.weights],
                settings,
                None if self.schedule is None else copy.deepcopy(self.schedule.state_dict()),
                self._random[1] if self._random is not None and self._random[0] == step else random_state(),
                None if self.extra is None else self.extra.save(),
                information,
            )
        )

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Put a snapshot back; younger ones are of a future that will not be, and go."""
        for weight, saved in zip(self.weights, snapshot.weights, strict=True):
            local(weight).copy_(saved)
        self.restore_buffers(snapshot)
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
        """Put the buffers alone back (running averages, which a forward pass changes)."""
        for buffer, saved in zip(self.model.buffers(), snapshot.buffers, strict=True):
            local(buffer).copy_(saved)

    def _restore_moments(self, weight: nn.Parameter, moments: dict[str, Any]) -> None:
        """One parameter's state, written into the tensors that are there, so that it stays spread as it is."""
        if not moments:
            self.optimizer.state.pop(weight, None)
            return
        state = self.optimizer.state[weight]
        for key, saved in moments.items():
            if isinstance(saved, Tensor):
                local(state[key]).copy_(saved)
            else:
                state[key] = copy.deepcopy(saved)


def _copied(tensor: Tensor) -> Tensor:
    """A copy in main memory of what this process holds."""
    return local(tensor.detach()).to("cpu", copy=True)


def _copied_state(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _copied(value) if isinstance(value, Tensor) else copy.deepcopy(value)
        for key, value in state.items()
    }
