"""A file's bytes and text: unpacked if gzip, bounded, never the whole of it at once."""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from distill.errors import UserError
from teachers.base import Progress, no_progress

MAX_LINE_BYTES = 64 << 20  # of a line, or of a row in a JSON list
# What is packed may unpack to this many bytes, and to this many times the size of its file.
FREE_BYTES, MAX_RATIO = 256 << 20, 200
MOST_BLANK = 1 << 20  # lines, one after another
AT_ONCE = 1 << 20  # bytes
GZIP_MAGIC = b"\x1f\x8b"


class TextFile:
    """A file's text in parts, without a byte order mark, each time it is iterated; raises
    ``UserError`` as ``rows``. ``len``: its characters, once it was read."""

    def __init__(self, file: Path, what: str) -> None:
        self._file, self._what, self._length = file, what, 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[str]:
        return self.read()

    def read(self, tell: Progress = no_progress) -> Iterator[str]:
        """Read it; ``tell``: what share was."""
        length = 0
        for part in text_parts(self._file, self._what, tell):
            length += len(part)
            yield part
        self._length = length


def read_text(file: Path, what: str) -> str:
    """The whole of a text file, without a byte order mark; raises ``UserError`` as ``rows``."""
    return "".join(text_parts(file, what))


def require_size(path: Path, what: str, max_bytes: int) -> None:
    """Raise ``UserError`` for a file that is larger, or is not there."""
    with _opened(path, what):
        pass
    if path.stat().st_size > max_bytes:
        raise UserError(f"{what} {path}: larger than {max_bytes >> 20} MiB; give a smaller file")


class _Told(io.RawIOBase):
    """A file's bytes; tells what share of them was read."""

    def __init__(self, raw: io.FileIO, tell: Progress) -> None:
        self._raw, self._tell, self._seen = raw, tell, 0
        self._size = max(1, os.fstat(raw.fileno()).st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer) or 0
        self._seen += count
        self._tell(min(1.0, self._seen / self._size))
        return count


@contextmanager
def _opened(
    file: Path, what: str, place: Callable[[], str] = str, tell: Progress = no_progress
) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked if they are gzip; reading errors become ``UserError`` with the
    ``place`` then."""
    try:
        with file.open("rb", buffering=0) as raw:
            told = io.BufferedReader(_Told(raw, tell), AT_ONCE)
            packed = file.name.lower().endswith(".gz") or told.peek(2).startswith(GZIP_MAGIC)
            yield cast(BinaryIO, gzip.GzipFile(fileobj=told) if packed else told)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{what} {file}{place()} is damaged or cut off: {error}; get it again"
        ) from None
    except OSError as error:
        raise UserError(f"{what} {file} cannot be read: {error.strerror or error}") from None


def most_unpacked(file: Path) -> int:
    """How many bytes a file may unpack to."""
    return FREE_BYTES + MAX_RATIO * file.stat().st_size if file.exists() else 0


def bomb(file: Path, what: str) -> UserError:
    """The error of a file that unpacks to too much."""
    return UserError(
        f"{what} {file} unpacks to more than {MAX_RATIO} times its size; unpack it yourself if it "
        "can be trusted"
    )


def unpacked(file: Path, what: str, tell: Progress = no_progress) -> Iterator[bytes]:
    """A file's bytes, unpacked, in parts."""
    left = most_unpacked(file)
    with _opened(file, what, tell=tell) as stream:
        while part := stream.read(AT_ONCE):
            if (left := left - len(part)) < 0:
                raise bomb(file, what)
            yield part


def text_parts(file: Path, what: str, tell: Progress = no_progress) -> Iterator[str]:
    """A file's text in parts, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    fed = lines = 0
    for part in itertools.chain(unpacked(file, what, tell), [b""]):
        fed += len(part)
        try:
            text = decoder.decode(part, final=not part)
        except UnicodeDecodeError as error:
            raise _not_utf8(error, file, what, lines, fed - len(error.object)) from None
        if "\0" in text:
            line = lines + text.count("\n", 0, text.index("\0")) + 1
            raise _nul(f"{what} {file}, line {line}")
        lines += text.count("\n")
        yield text


def text_lines(file: Path, what: str, tell: Progress = no_progress) -> Iterator[str]:
    """The lines of a file with their ends; those longer than ``MAX_LINE_BYTES`` are refused, and
    more than ``MOST_BLANK`` blank ones."""
    start, number, blank, most = 0, 0, 0, most_unpacked(file)
    with _opened(file, what, lambda: f", line {number + 1}", tell) as stream:
        while raw := stream.readline(MAX_LINE_BYTES):
            if start + len(raw) > most:
                raise bomb(file, what)
            if len(raw) == MAX_LINE_BYTES:
                raise too_long(f"{what} {file}, line {number + 1}", MAX_LINE_BYTES)
            blank = blank + 1 if raw.isspace() else 0
            if blank > MOST_BLANK:
                raise UserError(
                    f"{what} {file}, line {number + 1}: {blank:,} blank lines; take them out"
                )
            try:
                line = raw.decode("utf-8" if start else "utf-8-sig")
            except UnicodeDecodeError as error:
                raise _not_utf8(error, file, what, number, start) from None
            if "\0" in line:
                raise _nul(f"{what} {file}, line {number + 1}")
            yield line
            number, start = number + 1, start + len(raw)


def too_long(where: str, most: int) -> UserError:
    """The error of a line or value of more than ``most`` bytes."""
    return UserError(
        f"{where}: longer than {most >> 20} MiB; divide it, or write its rows one a line (JSONL)"
    )


def _nul(where: str) -> UserError:
    return UserError(f"{where}: has a NUL, as UTF-16 and binary files have; convert it to UTF-8")


def _not_utf8(
    error: UnicodeDecodeError, file: Path, what: str, lines: int, start: int
) -> UserError:
    """The error of bytes that stand behind ``lines`` lines and ``start`` bytes."""
    line, at = lines + error.object[: error.start].count(b"\n") + 1, start + error.start
    kind = "UTF-16" if not at and error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "not UTF-8"
    return UserError(f"{what} {file}, line {line}: {kind} (byte {at}); convert it to UTF-8")
