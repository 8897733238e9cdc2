"""Faults put into a training on purpose, to see what the guard makes of them
(``tools.robustness.guard faults``).

Each happens once, at one step, except those that lie in the data, which come again whenever the
step does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distill.losses.batch import Batch
from distill.training import engine
from distill.training.data import load_batch
from students.model import so8
from students.model.decoder import SO8TForCausalLM
from students.model.interface import Student
from teachers.store.store import SoftTargetStore

RATE_FACTOR, RATE_STEPS = 1000.0, 5
CONSTANT_RAMP, CONSTANT_STEPS = 20, 40
EXPONENT_BIT = 30  # the highest of a float32: flips a weight below 2 to one of 1e36 or so
POISONS = ("exp_avg not finite", "exp_avg × 10,000", "exp_avg_sq = 0", "exp_avg_sq = 1e30")


@dataclass
class Place:
    """Where a fault happens: from ``step`` on, and with everything that is drawn for it from
    ``random``."""

    step: int
    random: np.random.Generator
    named: str = ""  # the tensor that the fault is in, or "batch"; known once it has happened
    kind: str = ""  # which variant of the fault


@dataclass(frozen=True)
class Fault:
    """One kind of fault. ``batch``: changes the batch of a step; ``state``: changes model or
    optimizer, once.

    ``slow``: a collapse that takes its time.
    """

    name: str
    words: str
    batch: Callable[[Batch, int, Place], Batch] | None = None
    state: Callable[[SO8TForCausalLM, Optimizer, Place], None] | None = None
    steps: int = 1
    slow: bool = False


class Injector:
    """Loads batches in place of the engine, and does harm on the way.

    ``plan``: the batches of all steps.
    """

    def __init__(
        self, store: SoftTargetStore, fault: Fault, place: Place, plan: Sequence[list[int]]
    ) -> None:
        self.store, self.fault, self.place = store, fault, place
        self._spoilt = {tuple(plan[place.step + offset]): offset for offset in range(fault.steps)}
        self.optimizer: Optimizer | None = None
        self._done: set[int] = set()

    def __call__(self, student: Student, indices: list[int], step: int) -> Batch:
        """The batch of a step, with the fault in it where it is due."""
        assert isinstance(student, SO8TForCausalLM)
        batch, offset = load_batch(self.store, indices), step - self.place.step
        if (
            self.fault.state is not None
            and 0 <= offset < self.fault.steps
            and step not in self._done
        ):
            self._done.add(step)
            assert self.optimizer is not None
            self.fault.state(student, self.optimizer, self.place)
        spoilt = self._spoilt.get(tuple(indices))
        return (
            batch
            if self.fault.batch is None or spoilt is None
            else self.fault.batch(batch, spoilt, self.place)
        )

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Meanwhile the engine's optimizer is known here."""
        real = engine.build_optimizer

        def build(*arguments: Any, **options: Any) -> Optimizer:
            self.optimizer = real(*arguments, **options)
            return self.optimizer

        with patch.object(engine, "build_optimizer", build):
            yield


def _nan_targets(batch: Batch, offset: int, place: Place) -> Batch:
    """One number of the teacher's answer at one position is not one."""
    place.named = "batch"
    floats = [
        name
        for name, value in vars(batch.targets).items()
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
    name = floats[place.step % len(floats)]
    values = getattr(batch.targets, name).clone()
    values.view(-1)[values.numel() // 2] = torch.nan
    return replace(batch, targets=replace(batch.targets, **{name: values}))


def _inf_gradient(student: SO8TForCausalLM, _: Optimizer, place: Place) -> None:
    place.named, weight = _some_weight(student, place)
    handles: list[Any] = []

    def once(gradient: Tensor) -> Tensor:
        handles.pop().remove()
        return gradient / 0.0

    handles.append(weight.register_hook(once))


def _high_rate(_: SO8TForCausalLM, optimizer: Optimizer, place: Place) -> None:
    place.named = "group 0"
    for group in optimizer.param_groups:
        group["lr"] *= RATE_FACTOR


def _flipped_bit(student: SO8TForCausalLM, _: Optimizer, place: Place) -> None:
    place.named, weight = _some_weight(student, place)
    at = int(place.random.integers(weight.numel()))
    bits = weight.data.view(-1)[at : at + 1].view(torch.int32)
    bits ^= 1 << EXPONENT_BIT


def _zeroed_layer(student: SO8TForCausalLM, _: Optimizer, place: Place) -> None:
    number = int(place.random.integers(student.config.num_hidden_layers))
    place.named = f"model.layers.{number}."
    for parameter in student.model.layers[number].parameters():
        parameter.data.zero_()


def _poisoned_optimizer(student: SO8TForCausalLM, optimizer: Optimizer, place: Place) -> None:
    place.named, weight = _some_weight(student, place)
    place.kind = POISONS[int(place.random.integers(len(POISONS)))]
    state = optimizer.state[weight]
    if place.kind == "exp_avg not finite":
        state["exp_avg"].view(-1)[0] = torch.nan
    elif place.kind == "exp_avg × 10,000":
        state["exp_avg"].mul_(1e4)
    else:
        state["exp_avg_sq"].fill_(0.0 if place.kind == "exp_avg_sq = 0" else 1e30)


def _constant_targets(batch: Batch, offset: int, place: Place) -> Batch:
    """More and more of the positions get one and the same answer."""
    place.named = "batch"
    count = batch.count()
    share = min(1.0, (offset + 1) / CONSTANT_RAMP)
    chosen = torch.arange(count) < round(share * count)
    return replace(batch, targets=batch.targets.select(torch.where(chosen, 0, torch.arange(count))))


def _off_the_group(student: SO8TForCausalLM, _: Optimizer, place: Place) -> None:
    """Either a parameter so large that its exponential is no rotation any more, or one wrong
    result of the kernel."""
    number = int(place.random.integers(student.config.num_hidden_layers))
    gate = student.gates()[number]
    place.named = f"model.layers.{number}.self_attn.gate"
    place.kind = ("parameter of 1e13", "result × 1.01")[int(place.random.integers(2))]
    if place.kind == "parameter of 1e13":
        gate.safety.data[0, 0] = 1e13
        return

    def wrong(*_: Any) -> Tensor:
        del gate.forward
        rotations = so8.rotation(torch.stack((gate.safety, gate.command)))
        return rotations * 1.01

    gate.forward = wrong  # type: ignore[method-assign]


def _some_weight(student: SO8TForCausalLM, place: Place) -> tuple[str, nn.Parameter]:
    """A matrix of a random layer."""
    named = [
        (name, one) for name, one in student.named_parameters() if name.endswith("_proj.weight")
    ]
    return named[int(place.random.integers(len(named)))]


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("nan-batch", "NaN in a batch", batch=_nan_targets),
        Fault("inf-gradient", "Inf gradient", state=_inf_gradient),
        Fault(
            "learning-rate",
            f"learning rate × 1000 for {RATE_STEPS} steps",
            state=_high_rate,
            steps=RATE_STEPS,
        ),
        Fault("bit-flip", "exponent bit flipped in a weight", state=_flipped_bit),
        Fault("zeroed-layer", "a layer zeroed", state=_zeroed_layer),
        Fault("optimizer", "optimizer state poisoned", state=_poisoned_optimizer),
        Fault(
            "constant",
            f"targets of {CONSTANT_STEPS} steps drive to a constant",
            batch=_constant_targets,
            steps=CONSTANT_STEPS,
            slow=True,
        ),
        Fault("rotation", "a rotation off the group", state=_off_the_group),
    )
}
