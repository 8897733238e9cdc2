"""The log's chain: lines that each carry the hash of the one before, appended whole or not at all.

``audit.jsonl`` holds one JSON object per line in canonical form (keys sorted, no spaces, ASCII):
``sequence`` from 0, ``time`` (UTC), ``event``, ``content``, ``previous`` (SHA-256 of the bytes of
the line before, without its newline; zeros in the first) and ``hash`` (SHA-256 of this line's
canonical form without ``hash``). ``audit.head`` holds the number of lines and the SHA-256 of the
last: a chain alone cannot show that its end was cut off.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from distill.errors import UserError
from teachers.atomic_files import LOCK, write_whole

LOG, HEAD = "audit.jsonl", "audit.head"
FIELDS = {"content", "event", "hash", "previous", "sequence", "time"}
RECOVERED = "recovered"
ZEROS = "0" * 64
LONGEST = 1 << 24  # bytes of one line
BLOCK = 1 << 16
PATIENCE_SECONDS = 60.0  # another process holds the log for milliseconds

Entry = tuple[str, Mapping[str, Any]]
"""An event's name and content."""


def sha256(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Head:
    """The end of a log: its number of lines and the SHA-256 of the last, in hexadecimal."""

    lines: int = 0
    sha256: str = ZEROS


@dataclass(frozen=True)
class _Tail:
    """The end of a log's file: bytes up to the last newline, the last whole line, the rest."""

    whole: int
    line: bytes
    torn: int
    torn_sha256: str


def canonical(value: Any) -> bytes:
    """A value's one form in the log; raises ``ValueError`` for a non-finite number."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return text.encode("ascii")


def sealed(line: Mapping[str, Any]) -> bytes:
    """A line's bytes, without newline, from all its fields but ``hash``."""
    return canonical({**line, "hash": sha256(canonical(dict(line)))})


def parse(line: bytes) -> dict[str, Any] | None:
    """The fields of a line in canonical form, or nothing if it is none; its hash is not checked."""
    try:
        fields = json.loads(line)
        if not isinstance(fields, dict) or fields.keys() != FIELDS or canonical(fields) != line:
            return None
    except (ValueError, RecursionError):
        return None
    sequence = fields["sequence"]
    texts = all(isinstance(fields[name], str) for name in ("event", "hash", "previous", "time"))
    whole = isinstance(sequence, int) and not isinstance(sequence, bool) and sequence >= 0
    return fields if texts and whole and isinstance(fields["content"], dict) else None


def has_log(folder: Path) -> bool:
    """Whether a log was begun in this folder, also where only its head is left."""
    return (folder / LOG).exists() or (folder / HEAD).exists()


def read_head(folder: Path) -> Head | None:
    """What ``audit.head`` says, nothing where it is missing; a damaged one has −1 lines."""
    try:
        data = (folder / HEAD).read_bytes()
    except FileNotFoundError:
        return None
    try:
        head = Head(**json.loads(data))
        sound = type(head.lines) is int and head.lines > 0 and isinstance(head.sha256, str)
        return head if sound and _head_bytes(head) == data else Head(-1)
    except (ValueError, TypeError, RecursionError):
        return Head(-1)


def read_lines(folder: Path) -> Iterator[bytes]:
    """The lines of an existing log with their newlines; overlong ones in pieces."""
    with (folder / LOG).open("rb") as file:
        while line := file.readline(LONGEST + 1):
            yield line


def last_event(folder: Path, names: Collection[str]) -> str | None:
    """The last event in a folder's log that is one of these. The whole log is read."""
    last = None
    for line in read_lines(folder) if (folder / LOG).exists() else ():
        fields = parse(line.removesuffix(b"\n"))
        if fields is not None and fields["event"] in names:
            last = fields["event"]
    return last


def append(folder: Path, entries: Sequence[Entry]) -> Head:
    """Append lines to a folder's log, which may be new, in one write, synced to disk.

    Reads only the log's end. A partial line of a killed process is cut off; that, or a head that
    contradicts the log, is recorded in a line of its own (``recovered``) before the new ones.

    Raises:
        UserError: other processes hold the log for a minute.
        OSError: the disk refuses; nothing was added, and nothing of the log is lost.
    """
    with _locked(folder):
        path = folder / LOG
        try:
            path.touch()
            with path.open("r+b", buffering=0) as file:
                head = _append(file, read_head(folder), entries)
        except OSError as error:
            error.filename = error.filename or str(path)  # a failing write() does not say where
            raise
        write_whole(folder / HEAD, _head_bytes(head))
    return head


def _append(file: BinaryIO, named: Head | None, entries: Sequence[Entry]) -> Head:
    """Write the lines behind the last whole one; returns the new head."""
    tail = _read_tail(file)
    head = _head_of(file, tail)
    if tail.torn or not _follows(head, tail, named):
        recovery = {"cut_bytes": tail.torn, "cut_sha256": tail.torn_sha256}
        recovery |= {f"head_{name}": value for name, value in asdict(named or Head()).items()}
        entries = [(RECOVERED, recovery), *entries]
    lines, previous = [], head.sha256
    for sequence, (event, content) in enumerate(entries, head.lines):
        line = sealed(
            {
                "sequence": sequence,
                "time": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
                "event": event,
                "content": plain(content),
                "previous": previous,
            }
        )
        if len(line) > LONGEST:
            raise ValueError(f"a line of {len(line)} bytes is too long for the log ({event})")
        lines.append(line + b"\n")
        previous = sha256(line)
    _write(file, tail, b"".join(lines))
    return Head(head.lines + len(lines), previous)


def _write(file: BinaryIO, tail: _Tail, data: bytes) -> None:
    """Replace what follows the last whole line by ``data``, synced; all of it or nothing."""
    try:
        file.seek(tail.whole)
        left = memoryview(data)
        while left:
            left = left[file.write(left) :]
        file.truncate()
        os.fsync(file.fileno())
    except OSError:
        file.truncate(tail.whole + tail.torn)
        raise


def _read_tail(file: BinaryIO) -> _Tail:
    """Read a log's end, backwards as far as its last line goes."""
    size = start = file.seek(0, os.SEEK_END)
    data = b""
    while start and data.count(b"\n") < 2:
        step = min(max(BLOCK, len(data)), start)
        start -= step
        data = _read_at(file, start, step) + data
    end = data.rfind(b"\n")
    if end < 0:
        return _Tail(0, b"", size, sha256(data) if size else ZEROS)
    torn = data[end + 1 :]
    line = data[data.rfind(b"\n", 0, end) + 1 : end]
    return _Tail(start + end + 1, line, len(torn), sha256(torn) if torn else ZEROS)


def _read_at(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    parts = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _head_of(file: BinaryIO, tail: _Tail) -> Head:
    """Where the log ends by its own last line; lines are counted only where that cannot be read."""
    if not tail.whole:
        return Head()
    fields = parse(tail.line)
    if fields is not None:
        return Head(fields["sequence"] + 1, sha256(tail.line))
    file.seek(0)
    blocks: Iterable[bytes] = iter(lambda: file.read(BLOCK), b"")
    return Head(sum(block.count(b"\n") for block in blocks), sha256(tail.line))


def _follows(head: Head, tail: _Tail, named: Head | None) -> bool:
    """Whether ``head`` is the named one or later: a kill may come before the head is written."""
    if named is None:
        return head.lines <= 1
    if named.lines == head.lines - 1:
        fields = parse(tail.line)
        return fields is not None and fields["previous"] == named.sha256
    return named == head or 0 < named.lines < head.lines


def _head_bytes(head: Head) -> bytes:
    return canonical(asdict(head)) + b"\n"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the log for this process and thread alone."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / f"{LOCK}.audit", timeout=PATIENCE_SECONDS)
    try:
        lock.acquire(poll_interval=0.005)
    except filelock.Timeout:
        raise UserError(
            f"{folder / LOG} has been held by another process for {PATIENCE_SECONDS:.0f} seconds; "
            "wait for it or stop it, and try again"
        ) from None
    try:
        yield
    finally:
        lock.release()


def plain(value: Any) -> Any:
    """A value as logged: non-finite numbers become null; paths keep only their last part, since
    where files lie is private. Raises ``TypeError`` for what JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str):
        return value.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    if value is None or isinstance(value, int):
        return value
    raise TypeError(f"{type(value).__name__} in the log")
