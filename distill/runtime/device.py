"""Where a process trains, and in which precision."""

from __future__ import annotations

import torch
from accelerate import PartialState

from distill.config.schema import TrainConfig
from stability.precision import has_bfloat16

BF16_WIDTH_ON_CPU = 256  # below this width, converting to bfloat16 costs a CPU more than it saves


def training_device() -> torch.device:
    """Where this process trains: not on Metal, where every layer's rotations would wait for the
    processor's float64 in every step."""
    device = PartialState().device
    return torch.device("cpu") if device.type == "mps" else device


def base_dtype(device: torch.device, *, load_in_4bit: bool) -> torch.dtype:
    """What a base is loaded in, or NF4 computed in: bfloat16 where that is faster than float32."""
    narrow = (load_in_4bit or device.type != "cpu") and has_bfloat16(device)
    return torch.bfloat16 if narrow else torch.float32


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
    return "bf16" if device.type in ("cuda", "xpu") and has_bfloat16(device) else "fp32"


def why_float32(config: TrainConfig, device: torch.device) -> str | None:
    """Why a GPU trains more slowly than others would, or nothing."""
    if config.precision != "auto" or has_bfloat16(device):
        return None
    return (
        "this GPU has no bfloat16 of its own, so training computes in float32 "
        "(train.precision=bf16 would imitate it)"
    )
