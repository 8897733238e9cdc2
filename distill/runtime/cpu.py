"""Faster PyTorch on a CPU without other results; measured in docs/benchmarks.md."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

from stability.precision import float32_switches, has_onednn_switch, onednn_is_exact

# Parameters of mallopt(3).
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the rest of this process; returns whether it can.

    A training step asks for the same large blocks every time. By default glibc returns each one and
    the kernel hands it out again page by page, zeroed, which takes longer than computing with it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # One arena: others (of autograd's threads) cannot hold large blocks. No mapping of large
    # blocks, no trimming.
    return all(
        mallopt(name, value) == 1
        for name, value in ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, LARGEST_INT))
    )


def return_freed_memory() -> None:
    """Give back to the system what the C library keeps of freed memory."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def onednn_for_float32(exactly: bool = True) -> Iterator[bool]:
    """Let oneDNN multiply float32 matrices meanwhile, if it does so in float32; yields whether it
    does the multiplying.

    PyTorch otherwise uses MKL, 2 to 2.5 times slower on an AMD EPYC. The switch also permits
    bfloat16 inside; processors that would use it (those with AMX) are left as they are, unless it
    need not be ``exactly`` float32. It makes PyTorch's fused attention for CPUs four times slower.
    """
    if not (onednn_is_exact() if exactly else has_onednn_switch()):
        yield False
        return
    _, settings = float32_switches()
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield True
    finally:
        settings.fp32_precision = before
