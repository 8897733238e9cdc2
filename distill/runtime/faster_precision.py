"""Whether this processor computes faster in bfloat16 than in float32: tried once, and remembered.

What a processor says of itself does not tell. With AVX-512 alone bfloat16 is imitated, and products
take four times as long; with AVX-512's own bfloat16 it depends on how good float32 is there; with
AMX bfloat16 is four to five times as fast (docs/machines.md).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.runtime.cpu import onednn_for_float32
from stability.precision import ieee_float32
from teachers.atomic_files import write_whole
from teachers.cache import cache_folder
from teachers.llama_cpp.library.build import processor
from teachers.targets.threads import one_thread

LEAST_WIDTH = 256  # below this width, converting to bfloat16 costs a CPU more than it saves
MOST_WIDTH = 512  # wider matrices behave like these
ROWS, FIRST_ROWS = 512, 128
FEED_FORWARD = 3  # times the width
REPEATS = 3
HOPELESS = 0.4  # of a product alone: what surrounds it can only bring it nearer to 1
GAIN = 1.15  # bfloat16 rounds, so it has to be worth it; and equal times give equal choices
LOCK_SECONDS = 20.0
ISA = "ONEDNN_MAX_CPU_ISA"  # what oneDNN may use of a processor, if its user says so


def is_faster_in_bfloat16(width: int) -> bool:
    """Whether a student so wide trains faster in bfloat16 on this processor.

    The first answer for a processor and a width takes up to two seconds and is kept in the user's
    cache folder; where nothing can be kept, every process tries anew.
    """
    if width < LEAST_WIDTH:
        return False
    return _remembered(min(width, MOST_WIDTH))


@functools.cache
def _remembered(width: int) -> bool:
    cpu = processor()
    key = [cpu.name, sorted(cpu.features), str(torch.__version__), os.environ.get(ISA), width]
    with suppress(OSError):
        name = f"precision-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
        path = cache_folder() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):  # processes that measure side by side would disturb each other
            if (known := _read(path)) is not None:
                return known
            gain = measured_gain(width)
            record = {"bfloat16": gain >= GAIN, "gain": round(gain, 3), "key": key}
            write_whole(path, json.dumps(record, indent=2).encode())
            return gain >= GAIN
    return measured_gain(width) >= GAIN


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    try:
        with filelock.FileLock(path.with_suffix(".lock"), timeout=LOCK_SECONDS):
            yield
    except filelock.Timeout:
        raise OSError(f"{path} is locked by another process") from None


def _read(path: Path) -> bool | None:
    """What is remembered; nothing where there is none, or a damaged one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["bfloat16"]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return found if isinstance(found, bool) else None


def measured_gain(width: int) -> float:
    """How many times as fast a feed-forward part with its backward pass is in bfloat16, as autocast
    computes it; of a product alone, where that already says that it is slower."""
    generator = torch.Generator().manual_seed(0)
    draw: Callable[..., Tensor] = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    with one_thread(), ieee_float32(), torch.enable_grad():
        left, right = draw(FIRST_ROWS, width), draw(width, width)
        narrow = left.bfloat16(), right.bfloat16()
        # An imitated product may take a hundred times as long: it is tried on a few rows.
        alone = _ratio(lambda: left @ right, lambda: narrow[0] @ narrow[1])
        if alone < HOPELESS:
            return alone
        inner = FEED_FORWARD * width
        inputs, gain = draw(ROWS, width).requires_grad_(), torch.ones(width)
        gate, up, down = (
            (draw(*shape) * width**-0.5).requires_grad_()
            for shape in ((inner, width), (inner, width), (width, inner))
        )

        def step() -> None:
            normed = F.rms_norm(inputs, (width,), gain)
            active = F.silu(F.linear(normed, gate)) * F.linear(normed, up)
            output = inputs + F.linear(active, down)
            torch.autograd.grad(output.float().square().mean(), (inputs, gate, up, down))

        def step_in_bfloat16() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                step()

        ratio = _ratio(step, step_in_bfloat16)
        with onednn_for_float32() as other:
            return min(ratio, _ratio(step, step_in_bfloat16)) if other else ratio


def _ratio(first: Callable[[], object], second: Callable[[], object]) -> float:
    """The least time of the first over that of the second, tried in turns; of the processor, as
    other work on the machine says nothing about it."""
    times: tuple[list[float], list[float]] = [], []
    for turn in range(1 + REPEATS):
        for work, own in zip((first, second), times, strict=True):
            begun = time.thread_time()
            work()
            own.extend([time.thread_time() - begun] * bool(turn))  # the first does not count
    return min(times[0]) / max(min(times[1]), 1e-9)
