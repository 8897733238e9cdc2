"""The launch as Accelerate sees it, and what it wraps: student and objective as one module, so
that their parameters are treated alike."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from distill.config.schema import TrainConfig
from distill.losses.objective import Objective
from distill.runtime.cpu import keep_freed_memory, onednn_for_float32
from distill.runtime.device import choose_precision, training_device
from distill.runtime.launch_environment import fsdp_is_asked_for
from distill.training.checkpoint import earlier_precision
from stability.precision import ieee_float32
from students.model.decoder import SHORT_ON_CPU
from students.model.interface import Student

Result = TypeVar("Result")


class TrainingModule(nn.Module):
    """Student and objective. Its forward pass runs a function of both.

    DDP and FSDP act around a module's forward pass: with the loss inside it, the output matrix and
    the projectors are gathered where they are used, and their gradients are averaged.
    """

    def __init__(self, student: Student, objective: Objective) -> None:
        super().__init__()
        self.student = student
        self.objective = objective

    def forward(self, compute: Callable[[Student, Objective], Result]) -> Result:
        """Run ``compute(student, objective)``."""
        return compute(self.student, self.objective)


def build_accelerator(config: TrainConfig, width: int, folder: Path) -> Accelerator:
    """Accelerate's view of this launch, with the configured precision and trackers."""
    launch = PartialState()
    launch.device = training_device()
    on_cpu = launch.device.type == "cpu"
    if launch.num_processes > 1:
        atexit.register(_leave, launch)
    if on_cpu:
        keep_freed_memory()
    precision = choose_precision(config, width, launch.device)
    if on_cpu and config.precision == "auto":
        precision = earlier_precision(folder / "checkpoints") or precision
    if launch.num_processes > 1:  # on machines of several kinds all compute in what the first does
        (precision,) = broadcast_object_list([precision])
    # An earlier training in this process may have had another precision.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        cpu=on_cpu,
        log_with=list(config.trackers) or None,
        project_dir=folder / "trackers",
    )
    if config.trackers:
        settings = config.model_dump().items()
        plain = {key: value for key, value in settings if isinstance(value, int | float | str)}
        accelerator.init_trackers("distill", plain)
    return accelerator


def _leave(launch: PartialState) -> None:
    """Leave the launch before the interpreter ends: a thread of Gloo that frees a tensor later
    aborts the process, and the launcher then kills the others."""
    time.sleep(0.2)  # in which such threads can have Python's lock
    launch.destroy_process_group()


def sum_over_processes(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum of ``values`` over all processes of the launch."""
    if accelerator.num_processes == 1:
        return values
    return accelerator.reduce(values.to(accelerator.device), "sum")


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the launcher asked for FSDP (``accelerate launch --use_fsdp``)."""
    return accelerator.num_processes > 1 and fsdp_is_asked_for()


def wrap(accelerator: Accelerator, module: TrainingModule) -> nn.Module:
    """The module on its device, wrapped for the processes of this launch (none, DDP or FSDP).

    FSDP is PyTorch's ``fully_shard``, layer by layer (Accelerate's own wrapping is for GPUs only).
    Weights stay float32 where they are gathered, and autocast narrows what may be narrow: rotations
    may not.
    """
    if not is_sharded(accelerator):
        wrapped: nn.Module = accelerator.prepare_model(module)
        return wrapped
    module.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in module.student.layers():
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def prepared(accelerator: Accelerator, module: TrainingModule, config: TrainConfig) -> nn.Module:
    """The module as it is trained: activations computed twice or layers compiled as configured,
    wrapped for this launch."""
    if config.gradient_checkpointing:
        module.student.checkpoint_activations(True)
    if config.compile:
        for layer in module.student.layers():
            layer.compile()
    return wrap(accelerator, module)


def plain_again(student: Student) -> None:
    """Undo what only training needed."""
    student.checkpoint_activations(False)
    for layer in student.layers():
        layer._compiled_call_impl = None


@contextmanager
def float32_products(
    lengths: NDArray[np.int32], student: Student, device: torch.device
) -> Iterator[None]:
    """Products of float32 matrices in float32, backward passes and compiled layers included; by
    oneDNN on a CPU where sequences are packed or too short for fused attention."""
    longest = int(lengths.max())
    fast = longest <= SHORT_ON_CPU or (student.packs and int(lengths.min()) < longest)
    with (
        ieee_float32(),
        onednn_for_float32() if fast and device.type == "cpu" else nullcontext(),
    ):
        yield


def forget_gathered(model: nn.Module) -> None:
    """Make FSDP gather the weights anew for the next forward pass.

    After a forward pass it keeps those outside the layers gathered for the backward pass; without
    one, they would be the weights from before the step.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def exchange_gradients(
    accelerator: Accelerator, model: nn.Module, now: bool
) -> AbstractContextManager[None]:
    """A context whose backward pass exchanges gradients between processes, or leaves that to a
    later one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
        return nullcontext()
    if now or accelerator.num_processes == 1:
        return nullcontext()
    return accelerator.no_sync(model)
