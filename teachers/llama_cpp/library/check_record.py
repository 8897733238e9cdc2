"""The result of llama.cpp's self-check on this machine, remembered so that it is paid for once.

One small JSON file for each library and processor, in the user's cache folder; a damaged one counts
as none.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import filelock

from teachers.atomic_files import write_whole
from teachers.cache import cache_folder
from teachers.llama_cpp.library.build import fingerprint, library_version, processor

LOCK_SECONDS = 5.0
MOST_BYTES = 1 << 20  # of a record's file


@dataclass(frozen=True)
class CheckRecord:
    """The result for one library on one processor.

    Attributes:
        extra_buffers: whether llama.cpp runs with its extra CPU buffers (AMX, repacked weights),
            its default.
        from_bytes: files of this size or more run without them all the same, for want of memory;
            0 for none.
        reason: why not, after "llama.cpp …"; empty where it does.
        failed: tensor types of the file that showed it.
        verified: tensor types whose results agree with and without; those of a GPU are named with
            its devices first.
        time: when it was written, ISO 8601 in UTC.
        library: the package's version, for people.
        processor: its name, for people.
    """

    extra_buffers: bool = True
    from_bytes: int = 0
    reason: str = ""
    failed: frozenset[str] = frozenset()
    verified: frozenset[str] = frozenset()
    time: str = ""
    library: str = ""
    processor: str = ""

    def allows_extra_buffers(self, file_bytes: int) -> bool:
        """Whether a file of this size runs with extra buffers."""
        return self.extra_buffers and not 0 < self.from_bytes <= file_bytes

    def without_fault(self) -> CheckRecord:
        """The same, but for a fault that is gone."""
        return replace(self, extra_buffers=True, from_bytes=0, reason="", failed=frozenset())


# Of this process, so that where nothing can be kept the check is still made only once.
of_this_process: dict[str, CheckRecord] = {}


def record_path() -> Path:
    """Where this machine's record is kept.

    Raises:
        OSError: there is no home folder, and so no cache folder.
    """
    return cache_folder() / f"llama-cpp-{fingerprint()[:16]}.json"


def read_record() -> CheckRecord:
    """What is remembered for this library and processor; an empty record where nothing is."""
    key = fingerprint()
    if key not in of_this_process:
        of_this_process[key] = _read() or CheckRecord()
    return of_this_process[key]


def change_record(change: Callable[[CheckRecord], CheckRecord]) -> None:
    """Remember what ``change`` makes of the record, in this process and for the next ones.

    Other processes may do so at the same time: ``change`` is applied to what is there by then.

    Raises:
        OSError: nothing can be written there; this process remembers all the same.
    """
    of_this_process[fingerprint()] = _described(change(read_record()))
    path = record_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(path.with_suffix(".lock"), timeout=LOCK_SECONDS):
            record = _described(change(_read() or read_record()))
            of_this_process[fingerprint()] = record
            _write(record, path)
    except filelock.Timeout:
        raise OSError(f"{path} is locked by another process") from None


def _described(record: CheckRecord) -> CheckRecord:
    """The record with when and where it is made."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return replace(record, time=now, library=library_version() or "", processor=processor().name)


def _write(record: CheckRecord, path: Path) -> None:
    sets = {"verified": sorted(record.verified), "failed": sorted(record.failed)}
    text = json.dumps(asdict(record) | sets, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, text.encode("utf-8"))


def _read() -> CheckRecord | None:
    """The record in the file; nothing where there is none, or a damaged one."""
    try:
        path = record_path()
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
            return None
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        sets = {name: frozenset(content[name]) for name in ("verified", "failed")}
        record = CheckRecord(**content | sets)
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return None
    return record if _is_sound(record) else None


def _is_sound(record: CheckRecord) -> bool:
    """Whether a record has the right types, no terminal control, and a reason if it needs one."""
    for field in fields(record):
        if type(getattr(record, field.name)) is not type(field.default):
            return False
    names = record.verified | record.failed
    if not all(isinstance(name, str) for name in names):
        return False
    in_order = record.extra_buffers and not record.from_bytes
    printable = all(text.isprintable() for text in (record.reason, record.time, *names))
    return printable and (in_order or bool(record.reason and record.time))
