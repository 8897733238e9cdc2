"""Which machine and process this is, so that files say who made them; without PyTorch."""

from __future__ import annotations

import hashlib
import os
import re
import socket
from functools import cache
from pathlib import Path

import psutil

HOST_CHARACTERS = 32  # of a host's name in a file's name


@cache
def host() -> str:
    """This machine's name, of signs that any file's name may have."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", socket.gethostname())[:HOST_CHARACTERS] or "host"


@cache
def machine() -> str:
    """The machine as far as its process ids mean the same: of this name and start and, in a
    container, of these ids. Machines of one name are told apart by it."""
    parts = [socket.gethostname()]
    start, ids = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts.append(start.read_text() if start.exists() else str(round(psutil.boot_time())))
    parts.append(str(ids.stat().st_ino) if ids.exists() else "")
    return f"{host()}.{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:8]}"


def is_gone(where: str, process: int) -> bool:
    """Whether a process of the machine ``where`` is known to have ended: of other machines nothing
    is known."""
    return where == machine() and process != os.getpid() and not psutil.pid_exists(process)
