"""How far the capture of a store is, who works on it, and what went wrong; without PyTorch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from distill.errors import UserError
from distill.runtime.format import human_count, human_time
from distill.runtime.printable import markup
from distill.runtime.progress import Console
from teachers.store.manifest import MANIFEST, TASKS, read_manifest
from teachers.store.shard_records import task_names, totals
from teachers.store.tasks import GIVEN_UP, Tasks

SHOWN = 5  # failures
SILENT_SECONDS = 30.0  # after which it is said how long nothing was heard


@dataclass(frozen=True)
class Worker:
    """A process at work: on which task and since how many seconds, tokens per second of what it
    has done (``None``: nothing yet), and seconds since its last sign of life."""

    host: str
    process: int
    processor: str
    threads: int
    task: str
    seconds: float
    speed: float | None
    silent: float


@dataclass(frozen=True)
class Failure:
    """A task that an error has ended, the last words, and whether it is done by now."""

    task: str
    host: str
    words: str
    done: bool


@dataclass(frozen=True)
class Status:
    """``done``, ``claimed``, ``open`` and ``given_up`` shards of all; ``tokens_per_second``: now,
    or of a finished store from its first shard's beginning to its last one's end (0: not known);
    ``seconds_left``: ``None`` where nothing is known of the speed."""

    shards: int
    done: int
    claimed: int
    open: int
    given_up: int
    sequences: int
    tokens: int
    tokens_per_second: float
    seconds_left: float | None
    workers: list[Worker]
    failures: list[Failure]


def status_of(folder: Path) -> Status:
    """What the files of a store say.

    Raises:
        UserError: there is no store. StoreError: its manifest is damaged.
    """
    if not (folder / TASKS).is_dir() and not (folder / MANIFEST).exists():
        raise UserError(f"{folder} is no store; give the folder that `distill capture` fills")
    tasks = Tasks(folder / TASKS)
    records, leases, failures = tasks.records(), tasks.leases(), tasks.failures()
    # A process that died over what another has made since leaves its lease behind.
    leases = {task: lease for task, lease in leases.items() if not (folder / task).exists()}
    hopeless = {task for task, one in failures.items() if one.get(GIVEN_UP)} - records.keys()
    leases = {task: lease for task, lease in leases.items() if task not in hopeless}
    workers = [_worker(task, lease, records) for task, lease in leases.items()]
    failed = [
        Failure(task, _text(one, "host"), str(one.get("words", "")), task in records)
        for task, one in sorted(failures.items(), key=lambda pair: -_number(pair[1].get("ended")))
    ]
    speed = sum(worker.speed or 0.0 for worker in workers)
    if not (folder / MANIFEST).exists():  # the data is being read
        return Status(0, 0, 0, 0, 0, 0, 0, 0.0, None, workers, failed)
    manifest = read_manifest(folder)
    names = task_names(manifest)
    there = {path.stem for path in folder.glob("shard-*.safetensors")}
    claimed = sum(name in leases for name in names)
    done = sum(name in there and name not in leases for name in names)
    lost = sum(name in hopeless and name not in there for name in names)
    if done == manifest.shards:
        speed = _average(list(records.values()))
    whole = totals(records, manifest)
    seconds = None
    if speed and whole["sequences"]:
        left = whole["tokens"] / whole["sequences"] * (manifest.sequences - whole["sequences"])
        seconds = left / speed
    return Status(
        manifest.shards,
        done,
        claimed,
        manifest.shards - done - claimed - lost,
        lost,
        whole["sequences"],
        whole["tokens"],
        speed,
        0.0 if done == manifest.shards else seconds,
        workers,
        failed,
    )


def print_status(status: Status, folder: Path, console: Console) -> None:
    """One view of all workers."""
    share = status.done / status.shards if status.shards else 0.0
    left = "" if status.seconds_left is None else f", {human_time(status.seconds_left)} left"
    console.rich.print(
        f"{markup(str(folder))}: {status.done:,} of {status.shards:,} shards done ({share:.1%}), "
        f"{status.claimed:,} at work, {status.open:,} open"
        + f", {status.given_up:,} given up"
        * bool(status.given_up)
        if status.shards
        else f"{markup(str(folder))}: the data is being read"
    )
    if status.shards:
        finished = status.done == status.shards
        speed = f", {status.tokens_per_second:,.0f} tokens/s" + " on average" * finished
        if finished:
            left = ""
            speed *= bool(status.tokens_per_second)
        console.rich.print(f"{human_count(status.tokens)} tokens{speed}{left}")
    table = Table("host", "process", "processor", "threads", "works on", "for", "tokens/s")
    for worker in status.workers:
        silent = f", silent for {human_time(worker.silent)}"
        table.add_row(
            markup(worker.host),
            str(worker.process),
            markup(worker.processor),
            str(worker.threads),
            markup(worker.task),
            human_time(worker.seconds) + silent * (worker.silent > SILENT_SECONDS),
            "–" if worker.speed is None else f"{worker.speed:,.0f}",
        )
    if status.workers:
        console.rich.print(table)
    for failure in status.failures[:SHOWN]:
        after = "; done since" if failure.done else ""
        console.warn(f"{failure.task} failed on {failure.host}{after}: {failure.words}")
    if len(status.failures) > SHOWN:
        console.note(f"{len(status.failures) - SHOWN} more tasks have failed")


def _average(records: Sequence[Mapping[str, Any]]) -> float:
    """Tokens per second over all that was done; 0 where that is not known."""
    begun = min((_number(one.get("begun")) for one in records), default=0.0)
    ended = max((_number(one.get("ended")) for one in records), default=0.0)
    tokens = sum(_number(one.get("tokens")) for one in records)
    return tokens / (ended - begun) if 0 < begun < ended else 0.0


def _worker(
    task: str, lease: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]
) -> Worker:
    maker = lease.get("maker")
    own = [one for one in records.values() if maker and one.get("maker") == maker]
    spent = sum(_number(one.get("ended")) - _number(one.get("begun")) for one in own)
    tokens = sum(_number(one.get("tokens")) for one in own)
    now = time.time()
    return Worker(
        _text(lease, "host"),
        int(_number(_of(lease, "process"))),
        _text(lease, "processor"),
        int(_number(_of(lease, "threads"))),
        task,
        max(0.0, now - _number(lease.get("begun"), now)),
        tokens / spent if tokens and spent > 0 else None,
        max(0.0, now - _number(lease.get("time"), now)),
    )


def _of(content: Mapping[str, Any], name: str) -> object:
    maker = content.get("maker")
    return maker.get(name) if isinstance(maker, dict) else None


def _text(content: Mapping[str, Any], name: str) -> str:
    value = _of(content, name)
    return value if isinstance(value, str) else "unknown"


def _number(value: object, otherwise: float = 0.0) -> float:
    return float(value) if type(value) in (int, float) else otherwise  # type: ignore[arg-type]
