"""What the benchmarks share: the machine in words, child processes with a fixed number of
threads, peak memory."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from distill.runtime.cpu import return_freed_memory
from teachers.llama_cpp.library.build import processor

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "llama-cpp-python", "accelerate", "numpy", "safetensors")
SAMPLE_SECONDS = 0.002
WATCH_SECONDS = 0.01


def machine(threads: int) -> dict[str, Any]:
    """Processor, memory, threads and versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": processor().name,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": gpu,
        "load_before": [round(value, 2) for value in os.getloadavg()]
        if hasattr(os, "getloadavg")
        else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: result for name in PACKAGES if (result := _version(name))},
    }


def machine_line(result: dict[str, Any]) -> str:
    """``machine`` in one line."""
    packages = ", ".join(f"{name} {number}" for name, number in result["packages"].items())
    return (
        f"{result['gpu'] or result['cpu']} ({result['capability']}), {result['cores']} cores, "
        f"{result['threads']} threads, "
        f"{result['memory_bytes'] / 2**30:.0f} GiB, Python {result['python']}, {packages}"
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def child_command(module: str, *arguments: str | Path) -> list[str]:
    """The command of one of the project's modules in an own process."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def child_environment(threads: int) -> dict[str, str]:
    """The environment of such a process: the project is found from anywhere, nothing is looked
    up on a network."""
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONPATH": search,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


@dataclass(frozen=True)
class Timing:
    """One process: its start as ``time.time()``; seconds until the wanted file was there, until
    each line was printed, and until the process ended; what it took of the processor, its own
    children included."""

    begin: float
    done: float
    lines: dict[str, float]
    ended: float
    cpu_seconds: float


def children_seconds() -> float:
    """Seconds of processor time of all child processes that have ended, and of theirs."""
    times = os.times()
    return times.children_user + times.children_system


def timed(
    command: list[str],
    folder: Path,
    threads: int,
    wanted: Path,
    watch: Callable[[int], None] = lambda process: None,
) -> Timing:
    """Run a command in ``folder`` and watch for its lines and for ``wanted``; ``watch`` gets the
    process's id again and again.

    Raises:
        RuntimeError: it failed; says what it printed last.
    """
    log, lines = folder / "log.txt", dict[str, float]()
    done, before = None, children_seconds()
    with log.open("wb") as stream:
        begin = time.time()
        process = subprocess.Popen(
            command, cwd=folder, env=child_environment(threads), stdout=stream, stderr=stream
        )
        try:
            while process.poll() is None:
                now = time.time() - begin
                if done is None and wanted.exists():
                    done = now
                for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
                    lines.setdefault(line, now)
                watch(process.pid)
                time.sleep(WATCH_SECONDS)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        ended = time.time() - begin
    if process.returncode != 0 or not wanted.exists():
        last = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{last}")
    used = children_seconds() - before
    return Timing(begin, ended if done is None else done, lines, ended, used)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` readably."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass
class Peak:
    """Bytes in use before a block, and the most while it ran."""

    before: int = 0
    most: int = 0

    @property
    def extra(self) -> int:
        """What the block needed beyond what was there."""
        return self.most - self.before


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Peak memory of a block, in bytes: allocated by PyTorch on a device, the process's resident
    set on a CPU.

    Linux's own peak, reset at the beginning, is exact; elsewhere the resident set is sampled every
    2 ms.
    """
    peak = Peak()
    if device.type != "cpu":
        there = torch.get_device_module(device)
        there.synchronize()
        there.empty_cache()
        there.reset_peak_memory_stats()
        peak.before = there.memory_allocated()
        yield peak
        there.synchronize()
        peak.most = there.max_memory_allocated()
        return
    return_freed_memory()  # else a block could use it without being seen to
    peak.before = peak.most = psutil.Process().memory_info().rss
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        with _sampled(peak):
            yield peak
        return
    yield peak
    peak.most = max(peak.before, _resident_peak())


def _resident_peak() -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("this system does not tell a process's peak memory")


@contextmanager
def _sampled(peak: Peak) -> Iterator[None]:
    process, over = psutil.Process(), threading.Event()

    def watch() -> None:
        while not over.is_set():
            peak.most = max(peak.most, process.memory_info().rss)
            time.sleep(SAMPLE_SECONDS)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
