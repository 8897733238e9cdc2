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
from typing import Any

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
LEAST_SECONDS = 0.04
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
    gain: float | None = None
    with suppress(OSError):
        if (known := _read(record_path(width))) is not None:
            return known
        with _alone(record_path(width)):  # side by side, processes would disturb each other
            if (known := _read(record_path(width))) is None:
                gain = measured_gain(width)
                remember(width, gain)
                known = gain >= GAIN
            return known
    return (measured_gain(width) if gain is None else gain) >= GAIN


def record_path(width: int) -> Path:
    """Where the answer for a width is kept.

    Raises:
        OSError: there is no home folder, and so no cache folder.
    """
    digest = hashlib.sha256(json.dumps(_key(width)).encode()).hexdigest()
    return cache_folder() / f"precision-{digest[:16]}.json"


def remember(width: int, gain: float) -> None:
    """Keep what was measured for a width.

    Raises:
        OSError: nothing can be written there.
    """
    record = {"bfloat16": gain >= GAIN, "gain": round(gain, 3), "key": _key(width)}
    path = record_path(width)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=2).encode())


def _key(width: int) -> list[Any]:
    cpu = processor()
    return [cpu.name, sorted(cpu.features), str(torch.__version__), os.environ.get(ISA), width]


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
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

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

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
    """The least time of the first over that of the second, tried in turns."""
    times = [(_seconds(first), _seconds(second)) for _ in range(1 + REPEATS)][1:]
    return min(one for one, _ in times) / min(other for _, other in times)


def _seconds(work: Callable[[], object]) -> float:
    """Time of the processor that some work takes; other work on the machine says nothing about it.

    Some systems count it in steps of 16 ms, so short work is done several times.
    """
    begun, count, spent = time.thread_time(), 0, 0.0
    while spent < LEAST_SECONDS:
        work()
        count, spent = count + 1, time.thread_time() - begun
    return spent / count
