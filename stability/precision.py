"""Exact arithmetic whatever the device and the process's settings: what each device cannot do is
said here, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

FLOAT32_ERROR = 1e-5  # of a sum of 512 products, relative to their spread; bfloat16 is off by 3e-3
ROUNDED = ("tf32", "bf16")  # what PyTorch may be allowed to round float32 factors to


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Multiply float32 matrices in float32 meanwhile, whatever this process or its environment has
    switched on (TF32 on a GPU, bfloat16 on a CPU); as it was afterwards.

    A backward pass counts where it runs, not where its forward pass ran.
    """
    if not _rounds():
        yield
        return
    switches = float32_switches()
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    # PyTorch's older switch cannot be read while the newer ones say otherwise; now they cannot.
    older = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = "none"  # what the switch above it says ...
            if switch.fp32_precision != value:  # ... unless it was set itself
                switch.fp32_precision = value


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """``ieee_float32`` without autocast on the tensor's device.

    In what ``torch.compile`` compiles only autocast is left out: it cannot see such switches, so
    its caller holds ``ieee_float32`` around all of it.
    """
    plain = torch.autocast(device_type=tensor.device.type, enabled=False)
    return plain if torch.compiler.is_compiling() or not _rounds() else _exact(plain)


@contextmanager
def _exact(plain: torch.autocast) -> Iterator[None]:
    with ieee_float32(), plain:
        yield


@cache
def float32_switches() -> list[Any]:
    """PyTorch's switches for products of float32 matrices on NVIDIA's and AMD's GPUs and in oneDNN;
    none before PyTorch 2.9, which has the older one alone."""
    found = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return found if all(hasattr(switch, "fp32_precision") for switch in found) else []


def _rounds() -> bool:
    """Whether float32 factors may be rounded as things stand."""
    if not (switches := float32_switches()):
        return torch.get_float32_matmul_precision() != "highest"
    gpu, onednn = (switch.fp32_precision in ROUNDED for switch in switches)
    return gpu or (onednn and not onednn_is_exact())


def has_onednn_switch() -> bool:
    """Whether PyTorch can be told to multiply float32 matrices with oneDNN."""
    return bool(float32_switches()) and torch.backends.mkldnn.is_available()


@cache
def onednn_is_exact() -> bool:
    """Whether oneDNN multiplies float32 matrices in float32 where it is allowed to use bfloat16:
    processors that would use it (those with AMX) are found by trying."""
    if not has_onednn_switch():
        return False
    _, switch = float32_switches()
    before, switch.fp32_precision = switch.fp32_precision, "bf16"
    try:
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.randn(512, 512, generator=generator) for _ in range(2))
        expected = left.double() @ right.double()
        error = ((left @ right).double() - expected).abs().max() / expected.std()
    finally:
        switch.fp32_precision = before
    return float(error) <= FLOAT32_ERROR


def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64: Metal does not, nor do Intel's smaller GPUs."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


def where_float64(tensor: Tensor) -> Tensor:
    """The tensor on its device, or on the CPU where the device has no float64."""
    return tensor if has_float64(tensor.device) else tensor.cpu()


def float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, where there is that."""
    return where_float64(tensor).double()


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 by itself: NVIDIA's before Ampere (T4, V100) only
    imitate it. One that is not in this machine is taken for a newer one."""
    if device.type == "cuda" and torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "xpu" and torch.xpu.is_available():
        return bool(torch.xpu.is_bf16_supported(including_emulation=False))
    return device.type != "mps"
