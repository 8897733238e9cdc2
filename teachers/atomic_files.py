"""Files that appear whole or not at all, and folders that one process holds; without PyTorch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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


def is_temporary(path: Path) -> bool:
    """Whether a file is a lock, or what a killed writer may leave behind."""
    return path.name.startswith(LOCK) or (path.name.startswith(".") and ".tmp" in path.name)
