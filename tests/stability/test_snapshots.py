"""A state that is put back is the kept one, to the last byte, and training goes on as it did."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from stability.snapshots import Extra, Keeper
from tests.support.pretended_gpu import DEVICE, to_gpu, watch

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
    "fused AdamW": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "Rprop": partial(torch.optim.Rprop, lr=0.01),
}


class Net(nn.Module):
    """Dropout, running statistics, a tied and a frozen weight, a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.last.weight = self.first.weight
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.last(nn.functional.dropout(self.norm(self.first(x)), 0.3)) * self.frozen


class Training:
    """A loop with everything that a snapshot must hold."""

    def __init__(self, optimizer: str = "AdamW") -> None:
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        self.model = Net()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.schedule = LambdaLR(self.optimizer, lambda step: 1.0 / (1 + step))
        self.place = {"seen": [0]}
        extra = Extra(lambda: {"seen": list(self.place["seen"])}, self.put_back)
        self.keeper = Keeper(
            self.model, self.optimizer, schedule=self.schedule, extra=extra, count=3
        )

    def put_back(self, saved: dict[str, list[int]]) -> None:
        self.place = {"seen": list(saved["seen"])}

    def run(self, steps: int) -> None:
        """Random numbers of all three libraries decide what is learnt."""
        for _ in range(steps):
            inputs = torch.randn(8, 6) * random.random() + np.random.standard_normal()
            (self.model(inputs) - inputs).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.place["seen"].append(len(self.place["seen"]))

    def state(self) -> list[Any]:
        """Everything, as bytes where it is tensors."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        draws = [random.getstate(), np.random.get_state()[1].tobytes(), np.random.get_state()[2:]]
        return [
            [tensor.detach().numpy().tobytes() for tensor in tensors],
            plain(self.optimizer.state_dict()),
            plain(self.schedule.state_dict()),
            [*draws, torch.get_rng_state().numpy().tobytes()],
            self.place["seen"][:],
        ]


def plain(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return (tree.dtype, tree.shape, tree.detach().numpy().tobytes())
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, list) else tree


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_put_back_is_what_was_kept(optimizer: str) -> None:
    """Weights, buffers, moments, schedule, random numbers, the caller's; before any step too."""
    for at in (0, 5):
        training = Training(optimizer)
        training.run(at)
        training.keeper.take(at, None)
        before = training.state()
        training.run(4)
        assert all(one != other for one, other in zip(training.state(), before, strict=True)), at
        training.model(torch.randn(8, 6)).sum().backward()
        training.keeper.restore(training.keeper.kept[0])
        assert training.state() == before, at
        assert all(parameter.grad is None for parameter in training.model.parameters()), at


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_as_it_did(optimizer: str) -> None:
    """From a state that was put back, even after damage, as often as it is: it is not used up."""
    training = Training(optimizer)
    training.run(5)
    training.keeper.take(5, None)
    training.run(6)
    expected = training.state()
    for _ in range(2):
        for tensor in (*training.model.first.parameters(), *training.model.norm.buffers()):
            tensor.data.fill_(7)
        for entry in training.optimizer.state.values():
            for value in entry.values():
                if isinstance(value, Tensor):
                    value.fill_(torch.inf)
        training.keeper.restore(training.keeper.kept[0])
        training.run(6)
        assert training.state() == expected


def test_taking_a_snapshot_changes_nothing() -> None:
    """Neither the state nor what comes of it."""
    unwatched = Training()
    unwatched.run(5)
    expected = unwatched.state()
    watched = Training()
    for step in range(5):
        watched.keeper.take(step, None)
        watched.run(1)
    assert watched.state() == expected


def steps_kept(count: int, takes: list[int], first_stays: list[bool]) -> list[list[int]]:
    """Steps of the snapshots that are there after each one that is taken."""
    model = nn.Linear(1, 1)
    keeper = Keeper(model, torch.optim.SGD(model.parameters(), lr=0.1), count=count)
    found = []
    for step, stays in zip(takes, first_stays, strict=True):
        keeper.take(step, None, keep_first=stays)
        found.append([one.step for one in keeper.kept])
    return found


def test_the_newest_are_kept() -> None:
    """As many as asked for; with ``keep_first`` the oldest stays, the second goes: two or more."""
    takes = [0, 25, 50, 75]
    assert steps_kept(3, takes, [False] * 4) == [[0], [0, 25], [0, 25, 50], [25, 50, 75]]
    assert steps_kept(1, takes, [False] * 4) == [[0], [25], [50], [75]]
    assert steps_kept(3, takes, [True] * 4) == [[0], [0, 25], [0, 25, 50], [0, 50, 75]]
    assert steps_kept(1, takes, [True] * 4) == [[0], [0, 25], [0, 50], [0, 75]]
    assert steps_kept(1, [0, 5, 25], [True, True, False])[-1] == [25]


def test_younger_snapshots_go_with_what_is_undone() -> None:
    """Those up to the one that is put back stay, and hold what they held."""
    training = Training()
    states = []
    for step in range(3):
        states.append(training.state())
        training.keeper.take(step, 0.5 * step)
        training.run(1)
    training.keeper.restore(training.keeper.kept[1])
    assert [(one.step, one.information) for one in training.keeper.kept] == [(0, 0.0), (1, 0.5)]
    assert training.state() == states[1]
    training.keeper.restore(training.keeper.kept[0])
    assert training.state() == states[0] and len(training.keeper.kept) == 1


def test_a_gpu_copies_by_itself() -> None:
    """Taking a snapshot waits for nothing; it holds what was there then, and is whole when it is
    put back."""
    model = to_gpu(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)))
    optimizer = OPTIMIZERS["fused AdamW"](model.parameters())
    keeper = Keeper(model, optimizer, count=2)
    inputs = torch.randn(8, 6).to(DEVICE)

    def step() -> None:
        model(inputs).square().sum().backward()
        optimizer.step()

    def state() -> list[Tensor]:
        moments = (value for one in optimizer.state.values() for value in one.values())
        return [one.detach().cpu() for one in (*model.state_dict().values(), *moments)]

    with watch() as seen:
        step()
        before, seen.syncs = state(), type(seen.syncs)()
        keeper.take(1, None)
        assert not seen.syncs and seen.bytes
        step()
        keeper.restore(keeper.kept[0])
        assert len(before) == 5 + 2 + 4 * 3 and all(map(torch.equal, state(), before))
