"""The small files by which processes agree on who does what: on any file system of ``fsspec``.

Needed of it: a file can be created so that of several processes exactly one succeeds (``O_EXCL`` on
POSIX, NFS from version 3 on; a conditional write on an object store), and what was written is seen
by the others within seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from teachers.atomic_files import temporary_name


class TaskFiles:
    """The files of one folder, by their names; ``location``: a path or an URL."""

    def __init__(self, location: str | Path) -> None:
        self._files, self._folder = fsspec.core.url_to_fs(str(location))
        self._local = isinstance(self._files, LocalFileSystem)

    def names(self) -> list[str]:
        """All of them."""
        try:
            listed = self._files.ls(self._folder, detail=False, **self._fresh)
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in listed]

    def read(self, name: str) -> bytes | None:
        """What a file holds; ``None``: it is not there."""
        try:
            return bytes(self._files.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def create(self, name: str, data: bytes) -> bool:
        """Whether this process, and none before it, has created a file."""
        try:
            self._in_folder(self._create, self._path(name), data)
        except FileExistsError:
            return False
        return True

    def write(self, name: str, data: bytes) -> None:
        """Write a file, or write it anew, so that it is read whole. What a machine that stops takes
        with it is found out again: nothing waits for the disk."""
        self._in_folder(self._write, self._path(name), data)

    def _create(self, path: str, data: bytes) -> None:
        if self._local:
            with Path(path).open("xb") as file:
                file.write(data)
        else:
            self._files.pipe_file(path, data, mode="create")

    def _write(self, path: str, data: bytes) -> None:
        if self._local:
            (temporary := temporary_name(Path(path))).write_bytes(data)
            temporary.replace(path)
        else:
            self._files.pipe_file(path, data)

    def _in_folder(self, act: Callable[[str, bytes], None], path: str, data: bytes) -> None:
        try:
            act(path, data)
        except FileNotFoundError:  # there is no folder yet, or another process found it empty
            self._files.makedirs(self._folder, exist_ok=True)
            act(path, data)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        try:
            self._files.rm_file(self._path(name))
        except FileNotFoundError:
            return

    @property
    def _fresh(self) -> dict[str, bool]:
        """What makes an object store's listing no remembered one."""
        return {} if self._local else {"refresh": True}

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"
