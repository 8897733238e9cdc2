"""What is remembered of each shard once it was written or checked: size, time and contents, so that
nobody has to read all of it again to know that it is whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teachers.store.manifest import Manifest
from teachers.store.shard_contents import CONTENTS

if TYPE_CHECKING:  # with PyTorch, which is not needed to see how far a capture is
    from teachers.targets.distributions import Arrays

# Of a shard, beside one row of a target for each position.
OWN_ARRAYS = ("tokens", "lengths", "keep", *CONTENTS)

READ_BACK = "read_back"  # in a shard's record: all of it was read since it was written, and right


def task_name(shard: int) -> str:
    """The task of capturing a shard."""
    return f"shard-{shard:05d}"


def shard_path(folder: Path, shard: int) -> Path:
    """Where a shard of a store lies."""
    return folder / f"{task_name(shard)}.safetensors"


def task_names(manifest: Manifest) -> list[str]:
    """The tasks of all shards, in order."""
    return [task_name(shard) for shard in range(manifest.shards)]


def shard_record(path: Path, sha256: str, arrays: Arrays) -> dict[str, Any]:
    """What to remember of a shard that is whole; ``arrays``: it holds these, with that checksum."""
    about = path.stat()
    lengths = arrays["lengths"]
    targets = [rows for name, rows in arrays.items() if name not in OWN_ARRAYS]
    return {
        "bytes": about.st_size,
        "mtime_ns": about.st_mtime_ns,
        "sha256": sha256,
        "sequences": len(lengths),
        "tokens": int(lengths.sum()),
        "positions": len(targets[0]),
    }


def is_unchanged(path: Path, record: Mapping[str, Any] | None) -> bool:
    """Whether a shard is there as it was when the record was made."""
    if record is None:
        return False
    try:
        about = path.stat()
    except FileNotFoundError:
        return False
    return record.get("bytes") == about.st_size and record.get("mtime_ns") == about.st_mtime_ns


def totals(records: Mapping[str, Mapping[str, Any]], manifest: Manifest) -> dict[str, int]:
    """Sequences, tokens, positions and bytes of all shards that are done."""
    done = [records[name] for name in task_names(manifest) if name in records]
    names = ("sequences", "tokens", "positions", "bytes")
    return {name: sum(_count(record.get(name)) for record in done) for name in names}


def _count(value: object) -> int:
    return value if type(value) is int else 0
