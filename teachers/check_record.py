"""What the self-check of llama.cpp found on this machine, remembered so that it is paid for once.

One small JSON file for each library and processor, in the user's cache folder. It holds nothing that cannot be found
again: a damaged or foreign one counts as none.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import platformdirs

from teachers.llama_library import fingerprint, library_version, processor


@dataclass(frozen=True)
class CheckRecord:
    """The outcome for one library on one processor.

    Attributes:
        extra_buffers: whether llama.cpp runs with its extra CPU buffers (AMX, repacked weights), its default.
        reason: why it does not; empty where it does.
        verified: tensor types whose results were compared between both ways and agree; ``gpu:`` before a
            type whose results on a GPU agree with the processor's.
        time: when it was written, ISO 8601 in UTC.
        library: the package's version, for people.
        processor: its name, for people.
    """

    extra_buffers: bool = True
    reason: str = ""
    verified: frozenset[str] = frozenset()
    time: str = ""
    library: str = ""
    processor: str = ""


# Of this process, so that where nothing can be kept the check is still made only once.
of_this_process: dict[str, CheckRecord] = {}


def record_path() -> Path:
    """Where this machine's record is kept.

    Raises:
        OSError: there is no home folder, and so no cache folder.
    """
    folder = platformdirs.user_cache_path("distill")
    if not folder.is_absolute():  # "~" stays as it is where no home folder is known
        raise FileNotFoundError(f"no home folder (HOME), and XDG_CACHE_HOME is not set: {folder}")
    return folder / f"llama-cpp-{fingerprint()[:16]}.json"


def read_record() -> CheckRecord:
    """What is remembered for this library and processor; an empty record where nothing is."""
    key = fingerprint()
    if key not in of_this_process:
        of_this_process[key] = _read()
    return of_this_process[key]


def keep_record(record: CheckRecord) -> None:
    """Remember ``record`` in this process and, where there is a place for it, for the next.

    Raises:
        OSError: nothing can be written there; this process remembers all the same.
    """
    cpu = processor()
    record = replace(
        record,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        library=library_version() or "",
        processor=cpu.name,
    )
    of_this_process[fingerprint()] = record
    path = record_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = asdict(record) | {"verified": sorted(record.verified)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def forget_record() -> None:
    """Forget what is remembered for this library and processor, so that it is found again.

    Raises:
        OSError: the file is there and cannot be deleted; this process has forgotten it all the same.
    """
    of_this_process[fingerprint()] = CheckRecord()
    record_path().unlink(missing_ok=True)


def _read() -> CheckRecord:
    try:
        content: Any = json.loads(record_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return CheckRecord()  # none yet, no place for one, or damaged: the check is made again
    try:
        record = CheckRecord(**content | {"verified": frozenset(content["verified"])})
    except (TypeError, KeyError):
        return CheckRecord()
    texts = (record.reason, record.time, record.library, record.processor, *record.verified)
    sound = type(record.extra_buffers) is bool and all(isinstance(text, str) for text in texts)
    return record if sound else CheckRecord()
