"""Files that appear whole or not at all, and folders that one process holds; without PyTorch."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from teachers.machine import is_gone, machine

FORGOTTEN_SECONDS = 86_400.0  # a temporary file that nobody has written to for so long is left over
LOCK = ".lock"


class StoreError(ValueError):
    """A store that cannot be used as asked; names the folder, the reason and the remedy."""


@contextmanager
def exclusive(folder: Path, rank: int = 0) -> Iterator[None]:
    """Hold a folder for this process alone; the lock ends with the process, however it ends.

    Processes of one launch that share the work hold it under their ``rank``, one each.

    Raises:
        StoreError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / (f"{LOCK}.{rank}" if rank else LOCK))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise StoreError(
            f"{folder} is in use by another process; wait for it or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether a process holds the folder (the first of its launch, if there are several)."""
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    lock.release()
    return False


def write_whole(path: Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    """Write a file, in one piece or several, so that it appears complete or not at all, also when
    the machine stops."""
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failing write() does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Where to write a file that gets its name when it is whole; no other process writes there,
    nor another machine's."""
    return path.with_name(f".{path.name}.{machine()}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders of processes that have ended. Those of other machines
    are left for a day: they may still be written."""
    for path in folder.glob(".*.tmp"):
        *_, host, start, process, _ = ("", "", "", *path.name.split("."))
        number = int(process) if process.isdigit() else 0
        try:
            forgotten = time.time() - path.stat().st_mtime > FORGOTTEN_SECONDS
            if not (forgotten or is_gone(f"{host}.{start}", number)):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        except FileNotFoundError:  # another process was faster, or it has its name by now
            continue


def is_temporary(path: Path) -> bool:
    """Whether a file is a lock, or what a killed writer may leave behind."""
    return path.name.startswith(LOCK) or (path.name.startswith(".") and ".tmp" in path.name)
