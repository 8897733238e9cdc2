"""Optimizer and learning rate."""

from __future__ import annotations

import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from distill.config import TrainConfig
from students.model import SO8TForCausalLM

BETAS = (0.9, 0.95)


def peak_learning_rate(config: TrainConfig, width: int) -> float:
    """The configured peak, or 0.5 / width: Adam's best step shrinks with the width (Yang et al. 2022)."""
    return config.learning_rate or 0.5 / width


def build_optimizer(student: SO8TForCausalLM, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); weight decay on projection matrices only.

    Rotations live on a group where decay would pull both towards the identity (and towards commuting);
    norms and embeddings do not gain from decay.
    """
    decayed: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in student.named_parameters():
        decays = name.endswith("_proj.weight")
        (decayed if decays else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    rate = peak_learning_rate(config, student.config.hidden_size)
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=True)


def build_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine down to ``min_lr`` of the peak at the last step."""
    return get_cosine_with_min_lr_schedule_with_warmup(
        optimizer,
        num_warmup_steps=round(config.warmup * steps),
        num_training_steps=steps,
        min_lr_rate=config.min_lr,
    )
