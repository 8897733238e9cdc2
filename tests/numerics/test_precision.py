"""Exact products whatever is switched on, the switches as they were, and what devices lack."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.config.schema import TrainConfig
from distill.runtime.cpu import onednn_for_float32
from distill.runtime.device import base_dtype, choose_precision, why_float32
from numerics import precision
from numerics.precision import full_precision, has_bfloat16, has_float64, ieee_float32
from tests.support.pretended_gpu.arithmetic import GPU, ONEDNN, as_pytorch_starts

ALL: Any = torch.backends


def older() -> str:
    """What PyTorch's older switch says, or that it cannot be read."""
    try:
        return f"{torch.get_float32_matmul_precision()} {GPU.allow_tf32}"
    except RuntimeError:
        return "mixed"


def state() -> tuple[str, str, str, str]:
    """All there is to see of the switches."""
    return GPU.fp32_precision, ONEDNN.fp32_precision, ALL.fp32_precision, older()


@pytest.fixture
def switches() -> Iterator[None]:
    """PyTorch's own state, before and after."""
    as_pytorch_starts()
    yield
    as_pytorch_starts()


WAYS = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(GPU, "allow_tf32", True),
    "TF32 by the newer switch": lambda: setattr(GPU, "fp32_precision", "tf32"),
    "TF32 everywhere": lambda: setattr(ALL, "fp32_precision", "tf32"),
    "bfloat16 in oneDNN": lambda: setattr(ONEDNN, "fp32_precision", "bf16"),
    "both kinds of switch": lambda: (
        torch.set_float32_matmul_precision("medium"),
        setattr(GPU, "fp32_precision", "ieee"),
    ),
}


def test_switches_are_off_within_and_as_they_were_after(
    switches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever was used, after an error too; within, PyTorch's older one can be read."""
    monkeypatch.setattr(precision, "onednn_is_exact", lambda: False)
    for way, switch_on in WAYS.items():
        switch_on()
        before = state()
        with pytest.raises(KeyError), ieee_float32(), full_precision(torch.zeros(1)):
            assert not {"tf32", "bf16"} & set(state()[:2]), way
            assert older() == "highest False" or before == state(), way
            raise KeyError
        assert state() == before, way
        as_pytorch_starts()
    # What was switched on above a switch is still switched off there.
    ALL.fp32_precision = "tf32"
    with ieee_float32():
        pass
    ALL.fp32_precision = "ieee"
    assert state()[:2] == ("ieee", "ieee")


def test_products_are_exact(switches: None) -> None:
    """Bit for bit those of a process in which nothing is switched on; where the processor has
    AMX, "medium" rounds to bfloat16 otherwise."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, 96, 96, generator=generator) for _ in range(2))
    expected = left @ right
    torch.set_float32_matmul_precision("medium")
    assert torch.equal(left @ right, expected) == precision.onednn_is_exact()
    with full_precision(left):
        assert torch.equal(left @ right, expected)


def test_onednn_stays_where_it_is_exact(switches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor without AMX it is faster and as exact; on one with it, it is left alone."""
    for exact in (True, False):
        for module in ("numerics.precision", "distill.runtime.cpu"):
            monkeypatch.setattr(f"{module}.onednn_is_exact", lambda exact=exact: exact)
        with onednn_for_float32() as used:
            before = state()
            assert used == exact == (before[1] == "bf16")
            with ieee_float32():
                assert state() == before
        assert ONEDNN.fp32_precision == "none"


def test_the_environment_is_not_asked() -> None:
    """``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE`` switches TF32 on before the first line runs."""
    script = (
        "import torch; from numerics.precision import ieee_float32\n"
        "gpu = torch.backends.cuda.matmul\n"
        "print(gpu.fp32_precision)\n"
        "with ieee_float32(): print(gpu.fp32_precision)\n"
        "print(gpu.fp32_precision)"
    )
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["tf32", "ieee", "tf32"]


def test_what_devices_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64 on Metal and on Intel's smaller GPUs; bfloat16 on NVIDIA's before Ampere."""
    cpu, metal, intel, gpu = map(torch.device, ("cpu", "mps", "xpu", "cuda"))
    assert [has_float64(one) for one in (cpu, metal, gpu)] == [True, False, True]
    for wide in (True, False):
        found = SimpleNamespace(has_fp64=wide)
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device, found=found: found)
        assert has_float64(intel) == wide
    auto, asked = TrainConfig(), TrainConfig(precision="bf16")
    assert choose_precision(auto, 64, gpu) == "bf16" and has_bfloat16(gpu)  # none here to ask
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    for generation, narrow in ((7, False), (8, True)):  # T4 and V100; A100
        found = SimpleNamespace(major=generation)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=found: found)
        row = (generation, narrow)
        assert has_bfloat16(gpu) == narrow, row
        assert choose_precision(auto, 64, gpu) == ("bf16" if narrow else "fp32"), row
        assert choose_precision(asked, 64, gpu) == "bf16", row
        assert (why_float32(auto, gpu) is None) == narrow and not why_float32(asked, gpu), row
        wanted = torch.bfloat16 if narrow else torch.float32
        assert base_dtype(gpu, load_in_4bit=True) == base_dtype(gpu, load_in_4bit=False) == wanted
    assert base_dtype(cpu, load_in_4bit=True) == torch.bfloat16
    assert base_dtype(cpu, load_in_4bit=False) == torch.float32 and not why_float32(auto, cpu)
