"""Where a process trains, and in which precision."""

from __future__ import annotations

import gc

import psutil
import torch
from accelerate import PartialState

from distill.config.schema import TrainConfig
from distill.runtime.cpu import return_freed_memory
from distill.runtime.faster_precision import is_faster_in_bfloat16
from stability.precision import has_bfloat16


def training_device() -> torch.device:
    """Where this process trains: not on Metal, where every layer's rotations would wait for the
    processor's float64 in every step."""
    device = PartialState().device
    return torch.device("cpu") if device.type == "mps" else device


def base_dtype(device: torch.device, *, load_in_4bit: bool) -> torch.dtype:
    """What a base is loaded in, or NF4 computed in: bfloat16 where that is faster than float32."""
    narrow = load_in_4bit if device.type == "cpu" else trains_narrow(device)
    return torch.bfloat16 if narrow else torch.float32


def trains_narrow(device: torch.device) -> bool:
    """Whether a GPU trains in bfloat16 unless it is told otherwise."""
    return device.type in ("cuda", "xpu") and has_bfloat16(device)


def choose_precision(config: TrainConfig, width: int, device: torch.device) -> str:
    """``bf16`` or ``fp32``: as configured, or what is faster on this device."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cpu":
        return "bf16" if is_faster_in_bfloat16(width) else "fp32"
    return "bf16" if trains_narrow(device) else "fp32"


def why_float32(config: TrainConfig, device: torch.device) -> str | None:
    """Why a GPU trains more slowly than others would, or nothing."""
    if config.precision != "auto" or has_bfloat16(device):
        return None
    return (
        "this GPU has no bfloat16 of its own, so training computes in float32 "
        "(train.precision=bf16 would imitate it)"
    )


def device_memory(device: torch.device) -> tuple[int, str]:
    """Bytes of memory that a device has, and its name; of the processor main memory."""
    if device.type == "cpu":
        return psutil.virtual_memory().total, "this machine"
    facts = torch.get_device_module(device).get_device_properties(device)
    return facts.total_memory, getattr(facts, "name", str(device))


def free_device_memory(device: torch.device) -> int:
    """Bytes that a device has left for all processes; 0 where it does not say, and of the
    processor."""
    if device.type == "cpu":
        return 0
    ask = getattr(torch.get_device_module(device), "mem_get_info", None)
    return 0 if ask is None else int(ask(device)[0])


def release_memory(device: torch.device) -> None:
    """Give other processes what this one has freed, on the device and in main memory, and what
    only circles of objects still hold (an optimizer's moments)."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
    return_freed_memory()
