"""What Accelerate wraps: student and objective as one module, so that their parameters are
treated alike."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from distill.losses.objective import Objective
from distill.runtime.launch_environment import fsdp_is_asked_for
from students.model.interface import Student

Result = TypeVar("Result")


class TrainingModule(nn.Module):
    """Student and objective. Its forward pass runs a function of both.

    DDP and FSDP act around a module's forward pass: with the loss inside it, the output matrix that
    the chunked loss reads, and the projectors, are whole where they are used and their gradients
    are averaged.
    """

    def __init__(self, student: Student, objective: Objective) -> None:
        super().__init__()
        self.student = student
        self.objective = objective

    def forward(self, compute: Callable[[Student, Objective], Result]) -> Result:
        """``compute(student, objective)``."""
        return compute(self.student, self.objective)


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


def forget_gathered(model: nn.Module) -> None:
    """Make FSDP gather the weights anew for the next forward pass.

    After a forward pass it keeps those outside the layers gathered for the backward pass; where a
    step is taken without one, they would be the weights of before the step.
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
