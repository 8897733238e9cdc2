"""The machine before a run: processor, memory and disk, each ok, slow or broken."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distill.runtime.format import human_bytes
from distill.runtime.progress import Console
from teachers.llama_cpp.library.build import FEATURES, processor

Level = Literal["ok", "slow", "broken"]

LEAST_MEMORY, ROOMY_MEMORY = 5 << 28, 4 << 30  # the demo takes 1.2 GB (docs/benchmarks.md)
LEAST_DISK, ROOMY_DISK = 200 << 20, 5 << 30


@dataclass(frozen=True)
class Finding:
    """What was checked, its state and a remedy; ``facts``: values for other programs."""

    name: str
    level: Level
    text: str
    remedy: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def processor_finding() -> Finding:
    """The processor, its cores, and those of its features that the kernels used here look for."""
    cpu, cores = processor(), usable_cores()
    seen = [ours for ours, theirs in FEATURES.items() if theirs in cpu.features]
    seen += [name.upper() for name in ("asimd", "sve", "bf16", "i8mm") if name in cpu.features]
    text = (
        f"{cpu.name}, {cores} core{'s' * (cores != 1)}; {', '.join(seen) or 'features not known'}"
    )
    facts = {"name": cpu.name, "cores": cores, "features": seen, "system": platform.platform()}
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    remedy = "one core: a run takes about twice as long as on two" if cores == 1 else ""
    if x86 and cpu.features and "AVX2" not in seen:
        remedy = "without AVX2 everything takes several times as long"
    return Finding("processor", "slow" if remedy else "ok", text, remedy, facts)


def usable_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_finding() -> Finding:
    """Memory that is free for a run, within what a container is allowed."""
    import psutil  # here, so that `distill doctor` can say that it is missing

    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    for limit, used in container_limits():
        total, available = min(total, limit), max(0, min(available, limit - used))
    text = f"{human_bytes(available)} free of {human_bytes(total)}"
    facts = {"total_bytes": total, "available_bytes": available}
    if available < LEAST_MEMORY:
        needed = f"the example needs {human_bytes(LEAST_MEMORY)}"
        remedy = f"{needed}: close other programs or use another machine"
        return Finding("memory", "broken", text, remedy, facts)
    if available < ROOMY_MEMORY:
        remedy = "enough for the example; `distill plan` says what your own run needs"
        return Finding("memory", "slow", text, remedy, facts)
    return Finding("memory", "ok", text, "", facts)


def container_limits(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[tuple[int, int]]:
    """Limit and use in bytes of this process's control group, for each cgroup version.

    Reclaimable file cache is not counted. ``groups`` names the groups, mounted at ``root``; a
    container may see its own at the root.
    """
    try:
        lines = groups.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            folder, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        for group in (folder / path.lstrip("/"), folder):
            limit, used = (_whole_number(group / name) for name in names)
            if limit is not None:
                limits.append((limit, max(0, (used or 0) - _kept_files(group))))
                break
    return limits


def _kept_files(group: Path) -> int:
    """Bytes of files that a control group holds in memory and has not used lately."""
    try:
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return 0
    stats = dict(line.split(" ", 1) for line in lines if " " in line)
    return int(stats.get("total_inactive_file") or stats.get("inactive_file") or 0)


def _whole_number(path: Path) -> int | None:
    """The number in a file; nothing where it is not there, or says "max"."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdigit() else None


def disk_finding() -> Finding:
    """Room in the current folder, the default group of runs, and whether it is writable."""
    try:
        folder = Path.cwd()
    except FileNotFoundError:
        return Finding(
            "disk", "broken", "the current folder has been deleted", "go to another folder"
        )
    free = shutil.disk_usage(folder).free
    text = f"{human_bytes(free)} free in {folder}"
    facts = {"folder": str(folder), "free_bytes": free}
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        text = f"{folder} cannot be written to ({error.strerror})"
        remedy = "a run's folder is made here: go to another folder, or name one with --out"
        return Finding("disk", "broken", text, remedy, facts)
    if free < LEAST_DISK:
        remedy = "free some space, or go to a folder on another disk"
        return Finding("disk", "broken", text, remedy, facts)
    if free < ROOMY_DISK:
        remedy = "enough for the example; `distill plan` says what a run keeps"
        return Finding("disk", "slow", text, remedy, facts)
    return Finding("disk", "ok", text, "", facts)


def warn_of_machine(console: Console) -> None:
    """Say in a line each what of the processor and memory makes a run slow, or impossible."""
    for finding in (processor_finding(), memory_finding()):
        if finding.level != "ok":
            console.warn(f"{finding.name}: {finding.text}; {finding.remedy}. See `distill doctor`")
