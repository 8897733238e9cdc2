"""Optimizer and learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distill.config.schema import LossConfig, TrainConfig
from distill.losses.batch import Batch
from distill.losses.objective import Objective
from distill.training.distributed import TrainingModule
from distill.training.validation import validation_score
from students.model.interface import Student
from students.weights import full_tensor

BETAS = (0.9, 0.95)
MOMENTUM = 0.95
# Root mean square of the elements of an orthogonalized update at learning rate 1, about that of
# AdamW's updates: one rate suits both (docs/benchmarks.md).
UPDATE_SIZE = 0.6
# Coefficients (a, b, c) of x ← a·x + b·x³ + c·x⁵ for singular values between 1e-3 and 1, each step
# the best of its degree after those before it (Polar Express, Amsel et al. 2025,
# arXiv:2505.16932), and the margin that keeps rounding within that interval.
POLAR = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
)
MARGIN = 1.01
# Muon is chosen where making updates orthogonal takes at most this share of a step's products: it
# learns as much from about half as many tokens.
MOST_OF_A_STEP = 0.6
# Of matrices of one shape that are made orthogonal side by side: one alone does not keep two
# cores busy (docs/benchmarks.md).
BYTES_TOGETHER = 8 << 20
STEPS_LOOKED_AT = 64
# The matrices of layers and projectors. Decay would pull both rotations towards the identity (and
# towards commuting); norms and embeddings do not gain from it.
DECAYED = ("_proj.weight",)
HEADS = ("safety_head", "verification_head")
# After "module." where DDP has wrapped the training module.
PROJECTORS = "objective.hidden.projectors."


def peak_learning_rate(config: TrainConfig, width: int) -> float:
    """The configured peak, or 0.5 / width: Adam's best step shrinks with the width (Yang et al.
    2022)."""
    return config.learning_rate or 0.5 / width


def parameter_groups(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters that a training module trains, by whose gradients are clipped together: those
    of the safety and verification heads, where there are any, and all others."""
    groups: dict[str, list[nn.Parameter]] = {"student's": [], "heads'": []}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        of_head = any(part in HEADS for part in name.split("."))
        groups["heads'" if of_head else "student's"].append(parameter)
    return {name: parameters for name, parameters in groups.items() if parameters}


def decays(name: str) -> bool:
    """Whether a parameter of this name (in the training module) gets weight decay."""
    return name.endswith(DECAYED) or (PROJECTORS in name and name.endswith(".weight"))


def orthogonalized(matrices: Tensor) -> Tensor:
    """About U Vᵀ of the singular value decomposition U S Vᵀ of each of ``matrices [n, M, N]``: with
    its singular values between 0.15 and 1.9, if they were within a factor of 1,000, by products of
    their type; a matrix of zeros stays one. More exact ones did not learn better."""
    wide = matrices.shape[1] <= matrices.shape[2]
    value = matrices if wide else matrices.mT
    value = value / (MARGIN * torch.linalg.matrix_norm(value, keepdim=True) + 1e-30)
    for a, b, c in POLAR:
        a, b, c = a / MARGIN, b / MARGIN**3, c / MARGIN**5
        gram = value @ value.mT
        change = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        value = torch.baddbmm(value, change, value, beta=a)
    return value if wide else value.mT


class Muon(AdamW):
    """AdamW, but that groups with ``orthogonal`` set take Muon's steps (Jordan 2024): Nesterov's
    momentum of the gradient, made orthogonal, so that every direction of a matrix moves alike.

    The state of such a matrix is ``momentum`` and ``step``, which AdamW's loading of states wants.
    """

    def __init__(
        self, groups: list[dict[str, Any]], rate: float, dtype: torch.dtype, **settings: Any
    ) -> None:
        """``rate``: of all groups; ``dtype``: of the products that make updates orthogonal."""
        self.dtype = dtype
        super().__init__([{"orthogonal": False, **group} for group in groups], rate, **settings)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every group."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            loss: float | None = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["orthogonal"]:
                self._orthogonal_step(group)
        return loss

    @torch.no_grad()
    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for weight in group["params"]:
            if weight.grad is not None:
                by_shape.setdefault(weight.shape, []).append(weight)
        for shape, weights in by_shape.items():
            together = max(1, BYTES_TOGETHER // (shape.numel() * self.dtype.itemsize))
            for start in range(0, len(weights), together):
                some = weights[start : start + together]
                ahead = [full_tensor(self._ahead(weight)).to(self.dtype) for weight in some]
                size = UPDATE_SIZE * math.sqrt(max(shape))
                for weight, direction in zip(some, orthogonalized(torch.stack(ahead)), strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(_like(direction, weight), alpha=-group["lr"] * size)

    def _ahead(self, weight: Tensor) -> Tensor:
        """Nesterov's look ahead of a weight's momentum, which moves by its gradient."""
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["momentum"] = torch.zeros_like(weight)
        state["step"] += 1
        momentum: Tensor = state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
        return weight.grad.lerp(momentum, MOMENTUM)


def _like(tensor: Tensor, weight: Tensor) -> Tensor:
    """A tensor that every process has, sharded as ``weight`` is."""
    tensor = tensor.to(weight.dtype)
    if isinstance(weight, DTensor):
        return distribute_tensor(tensor, weight.device_mesh, weight.placements, src_data_rank=None)
    return tensor


def takes_orthogonal_steps(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon is for a parameter of this name: the matrices of a new student's layers."""
    return parameter.ndim == 2 and name.endswith(DECAYED)


def choose_optimizer(module: nn.Module, config: TrainConfig, tokens: float) -> str:
    """The configured optimizer, or the one that pays with ``tokens`` per step: Muon where its
    products are at most ``MOST_OF_A_STEP`` of those of forward and backward pass."""
    matrices = [
        one.shape
        for name, one in module.named_parameters()
        if one.requires_grad and takes_orthogonal_steps(name, one)
    ]
    if config.optimizer != "auto":
        return config.optimizer
    parameters = sum(one.numel() for one in module.parameters() if one.ndim == 2)
    products = sum(
        len(POLAR) * (4 * min(shape) ** 2 * max(shape) + 2 * min(shape) ** 3) for shape in matrices
    )
    return "muon" if 0 < products <= MOST_OF_A_STEP * 6 * parameters * tokens else "adamw"


def tokens_of_a_step(lengths: NDArray[Any], plan: Sequence[list[int]]) -> float:
    """Tokens of an optimizer step, on average over the first of them."""
    some = plan[:STEPS_LOOKED_AT]
    return float(sum(lengths[step].sum() for step in some)) / max(1, len(some))


def build_optimizer(
    module: nn.Module,
    config: TrainConfig,
    width: int,
    tokens: float = 0.0,
    *,
    narrow: bool = False,
) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019) over what a training module trains, or Muon for the matrices
    of its layers and AdamW for the rest (``choose_optimizer``); decay on matrices only.

    ``tokens``: of a step, on average; ``narrow``: training computes in bfloat16, and so does Muon.
    """
    orthogonal: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    muon = choose_optimizer(module, config, tokens) == "muon"
    for name, one in module.named_parameters():
        if one.requires_grad:
            chosen = decayed if decays(name) else others
            (orthogonal if muon and takes_orthogonal_steps(name, one) else chosen).append(one)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    rate = peak_learning_rate(config, width)
    if not muon:
        return AdamW(groups, rate, betas=BETAS, fused=True)
    groups.append({"params": orthogonal, "weight_decay": config.weight_decay, "orthogonal": True})
    groups = [group for group in groups if group["params"]]
    dtype = torch.bfloat16 if narrow else torch.float32
    return Muon(groups, rate, dtype, betas=BETAS, fused=True)


def build_schedule(optimizer: Optimizer, config: TrainConfig, steps: int) -> LambdaLR:
    """The learning rate of every step: ``rate_share`` of the optimizer's.

    Written here, as the same functions of transformers bring its trainer with them, and that peft,
    bitsandbytes and PyTorch's compiler: a quarter of the time that a command takes to start.
    """
    return LambdaLR(optimizer, partial(rate_share, config=config, steps=steps))


def rate_share(step: int, *, config: TrainConfig, steps: int) -> float:
    """The share of the peak that a step's learning rate is.

    A linear warm-up (from 0 for the cosine, else from ``min_lr``), then down to ``min_lr`` after
    the last step: by a cosine over all that is left, on a straight line, or (warm-up, stable,
    decay: Hu et al. 2024) by a cosine over the last ``decay`` of the steps.
    """
    warmup, least = round(config.warmup * steps), config.min_lr
    if step < warmup:
        share = step / warmup
        return share if config.schedule == "cosine" else share * (1.0 - least) + least
    falling = steps - warmup
    if config.schedule == "wsd":
        falling = min(falling, round(config.decay * steps))
    done = step - (steps - falling)
    if done < 0:
        return 1.0
    progress = min(1.0, done / falling) if falling else 1.0
    if config.schedule == "linear":
        height = 1.0 - progress
    else:
        height = 0.5 * (1.0 + math.cos(math.pi * progress))
    return height * (1.0 - least) + least


# Steps as large as random weights need damage the teacher's, the more so the nearer the student is
# to the teacher, and fewer than ``MANY_STEPS`` do not make up for it (docs/benchmarks.md).
FROM_TEACHER_RATE, MIN_RATE, MANY_STEPS = 0.5, 0.02, 64


def initial_learning_rate(
    config: TrainConfig, student: Student, init: str, validation: Iterable[Batch], steps: int
) -> float:
    """The peak learning rate of a training of ``steps``: as configured, or one that suits the
    student's initialization.

    Of a base (``init`` is "base") it is √KL of the usual one, with the student's first KL on the
    validation batches, in nats per token: one near its teacher would be led away from it first.
    From the teacher's weights it is half of that, and of it √(steps / 64) where there are fewer
    than 64 steps. It is at least a fiftieth and at most the usual one.
    """
    share = 1.0
    if config.learning_rate is None and init in ("teacher", "base"):
        score = validation_score(TrainingModule(student, Objective(LossConfig())), validation)
        wanted = min(1.0, math.sqrt(max(0.0, score.kl)))
        if init == "teacher":
            wanted *= FROM_TEACHER_RATE * min(1.0, math.sqrt(steps / MANY_STEPS))
        share = max(MIN_RATE, wanted)
    return share * peak_learning_rate(config, student.config.hidden_size)
