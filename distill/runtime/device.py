"""Where a process trains, and in which precision."""

from __future__ import annotations

import gc

import torch
from accelerate import PartialState

from distill.config.schema import TrainConfig
from distill.runtime.cpu import return_freed_memory

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


def release_memory(device: torch.device) -> None:
    """Give other processes what this one has freed, on the device and in main memory, and what
    only circles of objects still hold (an optimizer's moments)."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
    return_freed_memory()
