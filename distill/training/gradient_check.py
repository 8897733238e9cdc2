"""Before a long training of an adapted student: does every trained weight get a gradient, and no
other?

LoRA's B starts at zero, where the gradient of A is always zero; so there are two passes, the second
with small random numbers in B. Afterwards the student is as it was, to the last byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from distill.config.schema import RunConfig
from distill.errors import GradientsDoNotFlow
from distill.losses.objective import build_objective
from distill.runtime.device import choose_precision
from distill.runtime.progress import Console
from distill.training.data import TrainingData, load_batch
from stability.precision import ieee_float32
from stability.random_state import random_state, restore_random_state
from students.adapter.adapter import BASE, LORA_A, LORA_B, AdaptedStudent

FILLING_STD = 1e-2
SEED = 0
NAMED = 3  # tensors that an error names
# Of so many sequences the longest few: verification looks at some of their positions only.
AMONG, SEQUENCES = 64, 4

Named = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class KindGradients:
    """The gradients of one kind of weights: how many tensors, how many of them with a gradient, and
    the least and largest norm of these (NaN where there is none)."""

    kind: str
    tensors: int
    with_gradient: int
    least: float
    largest: float


def check_gradients(
    student: AdaptedStudent, loss_of: Callable[[], Tensor]
) -> tuple[KindGradients, ...]:
    """Check that a loss gives every LoRA, gate and head weight a finite gradient that is not zero,
    and the base none; the gradients by kind, those of LoRA's A with random numbers in B.

    ``loss_of`` computes the training loss of one probe batch, a scalar; it is called twice, in
    training mode.

    Raises:
        GradientsDoNotFlow: it does not. The student is as before then, too.
    """
    kinds = student.parameters_by_kind()
    base = kinds[BASE].items()
    trained = {kind: named for kind, named in kinds.items() if kind != BASE}
    frozen = {
        kind: [name for name, one in named.items() if not one.requires_grad]
        for kind, named in trained.items()
    }
    problems = [_problem(kind, "without requires_grad", names) for kind, names in frozen.items()]
    thawed = [name for name, one in base if one.requires_grad]
    _refuse([*problems, _problem(BASE, "with requires_grad", thawed)])
    with _as_before(student):
        student.train()
        _backward(loss_of)
        # With B at zero the gradient of A has to be there, but is zero.
        wrong = [_wrong(kind, named, kind != LORA_A) for kind, named in trained.items()]
        _refuse([problem for some in wrong for problem in some])
        moved = [name for name, one in base if one.grad is not None]
        _refuse([_problem(BASE, "with a gradient", moved)])
        result = {kind: _summary(kind, named) for kind, named in kinds.items()}
        student.zero_grad(set_to_none=True)
        with _filled(kinds[LORA_B]):
            _backward(loss_of)
        _refuse(_wrong(LORA_A, kinds[LORA_A], True))
        result[LORA_A] = _summary(LORA_A, kinds[LORA_A])
    return tuple(result.values())


def gradient_table(report: Sequence[KindGradients]) -> Table:
    """The gradients by kind for the terminal."""
    table = Table(title="Gradients of one probe batch", title_justify="left")
    table.add_column("weights")
    for head in ("tensors", "with gradient", "least norm", "largest norm"):
        table.add_column(head, justify="right")
    for row in report:
        norms = ["–" if math.isnan(norm) else f"{norm:.2e}" for norm in (row.least, row.largest)]
        table.add_row(row.kind, f"{row.tensors:,}", f"{row.with_gradient:,}", *norms)
    return table


@contextmanager
def _as_before(student: AdaptedStudent) -> Iterator[None]:
    """Leave no trace: no gradients, and modes and random numbers as they were."""
    modes = [(module, module.training) for module in student.modules()]
    numbers = random_state()
    student.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        student.zero_grad(set_to_none=True)
        restore_random_state(numbers)
        for module, mode in modes:
            module.training = mode


@contextmanager
def _filled(parameters: Named) -> Iterator[None]:
    """Small random numbers in the parameters for a while."""
    before = {name: one.detach().clone() for name, one in parameters.items()}
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for one in parameters.values():
            one.copy_(FILLING_STD * torch.randn(one.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, one in parameters.items():
                one.copy_(before[name])


def _backward(loss_of: Callable[[], Tensor]) -> None:
    with torch.enable_grad():
        loss = loss_of()
    if not loss.requires_grad:
        raise GradientsDoNotFlow("the loss depends on no trainable weight (it has no grad_fn)")
    loss.backward()


def _wrong(kind: str, named: Named, not_zero: bool) -> list[str]:
    """What is wrong with the gradients of one kind of trained weights."""
    norms = {name: _norm(one) for name, one in named.items()}
    absent = [name for name, norm in norms.items() if norm is None]
    known = {name: norm for name, norm in norms.items() if norm is not None}
    broken = [name for name, norm in known.items() if not math.isfinite(norm)]
    zero = [name for name, norm in known.items() if not_zero and norm == 0.0]
    return [
        _problem(kind, "without a gradient", absent),
        _problem(kind, "with a gradient that is not finite", broken),
        _problem(kind, "with a gradient of zero", zero),
    ]


def _norm(parameter: nn.Parameter) -> float | None:
    """The gradient's norm, in float64: that of a small gradient would be zero in float32."""
    if parameter.grad is None:
        return None
    return float(torch.linalg.vector_norm(parameter.grad.cpu().double()))


def _summary(kind: str, named: Named) -> KindGradients:
    norms = [norm for norm in map(_norm, named.values()) if norm is not None]
    return KindGradients(
        kind, len(named), len(norms), min(norms, default=math.nan), max(norms, default=math.nan)
    )


def _problem(kind: str, what: str, names: Sequence[str]) -> str:
    """A message, empty where there is no such tensor."""
    if not names:
        return ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{kind}: {len(names)} {what} ({', '.join(names[:NAMED])}{more})"


def _refuse(problems: Sequence[str]) -> None:
    if any(problems):
        raise GradientsDoNotFlow("gradients do not flow; " + "; ".join(filter(None, problems)))


def probe_gradients(
    student: AdaptedStudent,
    data: TrainingData,
    config: RunConfig,
    teacher_layers: int,
    console: Console,
) -> dict[str, Any]:
    """Check the gradients as training will have them, print them, and return them for
    ``results.json``.

    Raises:
        GradientsDoNotFlow: a weight gets none, or one of the base does.
    """
    with console.stage("Probe gradients") as stage:
        report = _probe(student, data, config, teacher_layers)
        tensors = sum(row.with_gradient for row in report)
        stage.finish(f"{tensors} tensors have one, none of them the base's")
    console.rich.print(gradient_table(report))
    return {
        row.kind: {key: value for key, value in asdict(row).items() if key != "kind"}
        for row in report
    }


@ieee_float32()
def _probe(
    student: AdaptedStudent, data: TrainingData, config: RunConfig, teacher_layers: int
) -> tuple[KindGradients, ...]:
    device = student.device
    objective = build_objective(config.loss, data.store, student, teacher_layers)
    objective = objective.to(device)
    lengths = data.store.lengths()
    some = data.split.train[:AMONG].tolist()
    batch = load_batch(data.store, sorted(some, key=lambda i: -int(lengths[i]))[:SEQUENCES])
    if data.prompts is not None:
        batch = replace(batch, prompts=data.prompts.batch(0, data.prompts_together, 0, 1))
    batch = batch.to(device)
    narrow = choose_precision(config.train, student.config.hidden_size, device) == "bf16"

    def loss_of() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=narrow):
            loss: Tensor
            loss, _ = objective(student, batch, total=batch.count(), share=1.0, fraction=1.0)
        return loss

    student.checkpoint_activations(bool(config.train.gradient_checkpointing))
    try:
        return check_gradients(student, loss_of)
    finally:
        student.checkpoint_activations(False)
