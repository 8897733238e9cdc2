"""Optimizer and learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_wsd_schedule

from distill.config.schema import LossConfig, TrainConfig
from distill.losses.batch import Batch
from distill.losses.objective import Objective
from distill.training.distributed import TrainingModule
from distill.training.validation import validation_score
from students.model.interface import Student

BETAS = (0.9, 0.95)
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


def build_optimizer(module: nn.Module, config: TrainConfig, width: int) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019) over what a training module trains; decay on matrices
    only."""
    parameters = [(name, one) for name, one in module.named_parameters() if one.requires_grad]
    decayed = [one for name, one in parameters if decays(name)]
    others = [one for name, one in parameters if not decays(name)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=peak_learning_rate(config, width), betas=BETAS, fused=True)


def build_schedule(optimizer: Optimizer, config: TrainConfig, steps: int) -> LambdaLR:
    """Linear warm-up (from 0 for the cosine, else from ``min_lr``), then down to ``min_lr`` of the
    peak after the last step: by a cosine over all that is left, on a straight line, or (warm-up,
    stable, decay: Hu et al. 2024) by a cosine over the last ``decay`` of the steps."""
    warmup = round(config.warmup * steps)
    if config.schedule == "cosine":
        return get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, num_warmup_steps=warmup, num_training_steps=steps, min_lr_rate=config.min_lr
        )
    falling = steps - warmup
    if config.schedule == "wsd":
        falling = min(falling, round(config.decay * steps))
    schedule: LambdaLR = get_wsd_schedule(
        optimizer,
        num_warmup_steps=warmup,
        num_decay_steps=falling,
        num_training_steps=steps,
        decay_type="linear" if config.schedule == "linear" else "cosine",
        min_lr_ratio=config.min_lr,
    )
    return schedule


# Steps as large as random weights need damage the teacher's, the more so the nearer the student is
# to the teacher, and fewer than ``MANY_STEPS`` do not make up for it (docs/benchmarks.md).
FROM_TEACHER_RATE, MIN_RATE, MANY_STEPS = 0.5, 0.02, 64


def initial_learning_rate(
    config: TrainConfig, student: Student, init: str, validation: Iterable[Batch], steps: int
) -> float:
    """The peak learning rate of a training of ``steps``: as configured, or one that suits the
    student's initialization.

    From the teacher's weights it is √KL / 2 of the usual one, at most half of it, with the
    student's first KL on the validation batches, in nats per token; of that √(steps / 64) where
    there are fewer than 64 steps; at least a fiftieth.
    """
    share = 1.0
    if config.learning_rate is None and init == "teacher":
        score = validation_score(TrainingModule(student, Objective(LossConfig())), validation)
        wanted = FROM_TEACHER_RATE * min(1.0, math.sqrt(max(0.0, score.kl)))
        share = max(MIN_RATE, wanted * min(1.0, math.sqrt(steps / MANY_STEPS)))
    return share * peak_learning_rate(config, student.config.hidden_size)
