"""Where a process trains, and in which precision."""

from __future__ import annotations

import torch
from accelerate import PartialState

from distill.config.schema import TrainConfig

BF16_WIDTH_ON_CPU = 256  # below this width, converting to bfloat16 costs a CPU more than it saves


def training_device() -> torch.device:
    """Where this process trains."""
    device = PartialState().device
    # Metal lacks the float64 that rotations and scores are computed in.
    return torch.device("cpu") if device.type == "mps" else device


def choose_precision(config: TrainConfig, width: int, device: torch.device) -> str:
    """``bf16`` or ``fp32``: as configured, or what is faster on this device."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cpu":
        fast = (
            "avx512" in torch.backends.cpu.get_cpu_capability().lower()
            and width >= BF16_WIDTH_ON_CPU
        )
        return "bf16" if fast else "fp32"
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
