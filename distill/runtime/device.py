"""Which precision a device trains in."""

from __future__ import annotations

import torch

from distill.config.schema import TrainConfig

BF16_WIDTH_ON_CPU = 256  # below this width, converting to bfloat16 costs a CPU more than it saves


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
