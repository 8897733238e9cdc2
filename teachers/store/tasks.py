"""Tasks that several processes, on one machine or many, take one by one until all are done.

A task is claimed by creating ``NAME.0000.lease``, of which a file system lets one process alone be
the first. While it works, its process writes the lease anew again and again. One that stays as it
is for as long as it says itself has expired: whoever creates ``NAME.0001.lease`` takes it over,
again one process alone. ``NAME.done`` says that a task is done, by whom, and what came of it;
``NAME.failed`` the last words of a process that an error ended. A task at which one process after
another dies without a word is given up, which ``NAME.failed`` says too. Times are measured by the
watching process's own clock, so that clocks need not agree. That a task is done twice is possible
(a process that slept too long works on) and does no harm: both write the same bytes.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from teachers.atomic_files import StoreError
from teachers.machine import host, is_gone, machine
from teachers.store.task_files import TaskFiles

LEASE_SECONDS = 60.0  # without a sign of life, after which a task is anybody's again
LEASE_VARIABLE = "DISTILL_LEASE_SECONDS"  # in the environment: another such time
SHORTEST_LEASE, LONGEST_LEASE = 1.0, 86_400.0
TAKEOVERS = 3  # of one task; if the process after that dies too, the task is given up
TAKEOVERS_VARIABLE = "DISTILL_TAKEOVERS"  # in the environment: another such number
MOST_TAKEOVERS = 9999  # a lease's name has four digits
BEATS = 6  # signs of life in that time
FIRST_WAIT, LONGEST_WAIT = 0.2, 2.0  # seconds between looks at what others do
TOGETHER = 16  # files read at once: a network's delay counts once
WORDS = 500  # characters kept of what a process said last
LEASE = re.compile(r"(?P<task>.+)\.(?P<generation>\d{4})\.lease")
DONE, FAILED = ".done", ".failed"
GIVEN_UP = "given_up"  # in what is said of a failed task: nobody tries it again

Result = TypeVar("Result")


@dataclass(frozen=True)
class Maker:
    """Who works: shown, and kept with what it has made."""

    processor: str = ""
    threads: int = 0
    version: str = ""
    host: str = field(default_factory=host)
    machine: str = field(default_factory=machine)
    process: int = field(default_factory=os.getpid)


class Tasks:
    """The tasks of one folder, as one process sees them.

    ``seconds``: how long others wait for a sign of life of this process before they take over, if
    not as long as the environment says.

    Raises:
        StoreError: the environment says no such time, or no such number of takeovers.
    """

    def __init__(
        self, location: str | Path, maker: Maker | None = None, seconds: float | None = None
    ) -> None:
        self.files, self.location = TaskFiles(location), location
        self.maker = maker or Maker()
        self.seconds = seconds or _environment(
            LEASE_VARIABLE, LEASE_SECONDS, (SHORTEST_LEASE, LONGEST_LEASE), "seconds"
        )
        self._takeovers = _environment(
            TAKEOVERS_VARIABLE, TAKEOVERS, (0, MOST_TAKEOVERS), "takeovers of a task"
        )
        self._given_up: list[str] = []  # of the tasks that were last looked at
        self.begun, self.tokens = time.monotonic(), 0  # when this process began, what it has done
        self._watched: dict[
            str, tuple[bytes | None, float]
        ] = {}  # leases, and since when unchanged

    # -- claiming

    def claim(self, names: Sequence[str]) -> Lease | None:
        """Take the first of some tasks that is neither done nor at work, if there is one.

        What an error has ended before comes later: it may end every process that tries it. What a
        silent process has begun comes last.
        """
        listed = set(self.files.names())
        held = _generations(listed)
        left = [name for name in names if name + DONE not in listed]
        free = [name for name in left if name not in held]
        free.sort(key=lambda name: name + FAILED in listed)
        for name in free:
            if (lease := self._take(name, 0)) is not None:
                return lease
        self._given_up = []
        for name in left:
            if name in held and self._expired(name, held[name]):
                if held[name] >= self._takeovers:
                    self._give_up(name, held[name])
                    continue
                lease = self._take(name, held[name] + 1)
                if lease is not None:
                    return lease
        return None

    def _give_up(self, name: str, generation: int) -> None:
        """Say that a task has ended all who tried it."""
        self._given_up.append(name)
        if (before := _content(self.files.read(name + FAILED) or b"")).get(GIVEN_UP):
            return
        last = _content(self.files.read(lease_name(name, generation)) or b"").get("maker")
        words = f"{generation + 1} processes in turn have died at it without a word"
        if before:
            words += f"; one before them said: {before.get('words')}"
        content = {"maker": last, "ended": time.time(), "words": words, GIVEN_UP: True}
        self.files.write(name + FAILED, _json(content))

    def _require_hope(self, names: Sequence[str]) -> None:
        """Raise ``StoreError`` if all these tasks are given up."""
        if names and set(names) <= set(self._given_up):
            count, first = len(names), names[0]
            words = _content(self.files.read(first + FAILED) or b"").get("words")
            others = f" (and {count - 1} more)" if count > 1 else ""
            raise StoreError(
                f"{first}{others} was given up: {words}. Find out why (too little memory?), remove "
                f"{self.location}/{first}.* and run the same command again"
            )

    def _take(self, name: str, generation: int) -> Lease | None:
        lease = Lease(self, name, generation)
        if not lease.begin():
            return None
        if name + DONE in self.files.names():  # just now, by another
            lease.release()
            return None
        return lease

    def _expired(self, name: str, generation: int) -> bool:
        """Whether a lease has been as it is for too long, or its process ended on this machine."""
        file = lease_name(name, generation)
        data = self.files.read(file)
        since = self._watched.get(file)
        now = time.monotonic()
        if since is None or since[0] != data:
            self._watched[file] = since = (data, now)
        if data is None:
            return False  # given back: it is free at the next look
        content = _content(data)
        maker = content["maker"] if isinstance(content.get("maker"), dict) else {}
        process = maker.get("process")
        if type(process) is int and is_gone(str(maker.get("machine")), process):
            return True
        seconds = content.get("seconds")  # of a damaged lease, or one just being created, ours
        return now - since[1] > (seconds if type(seconds) is float else self.seconds)

    def each(self, names: Sequence[str], waiting: Callable[[int], None]) -> Iterator[Lease]:
        """Leases of some tasks, one after another, each to be used in a ``with`` block, until all
        are done, by whomever; ``waiting`` is told how many are not, as long as others work on
        these.

        Raises:
            StoreError: those that are left were given up.
        """
        pause = FIRST_WAIT
        while left := self.undone(names):
            if (lease := self.claim(left)) is not None:
                pause = FIRST_WAIT
                yield lease
                continue
            self._require_hope(left)
            waiting(len(left))
            time.sleep(pause)
            pause = min(LONGEST_WAIT, 1.5 * pause)

    def once(
        self,
        name: str,
        find: Callable[[], Result | None],
        make: Callable[[], Result],
        waiting: Callable[[], None],
    ) -> Result:
        """What ``find`` finds or, by one process alone, ``make`` makes; the others wait for it."""
        found = self.claimed(name, find, waiting)
        if not isinstance(found, Lease):
            return found
        with found:
            return make()

    def claimed(
        self, name: str, find: Callable[[], Result | None], waiting: Callable[[], None]
    ) -> Result | Lease:
        """What ``find`` finds, or the lease to make it."""
        pause = FIRST_WAIT
        while (found := find()) is None:
            if (lease := self.claim([name])) is not None:
                if (found := find()) is None:
                    return lease
                lease.release()
                return found
            self._require_hope([name])
            waiting()
            time.sleep(pause)
            pause = min(LONGEST_WAIT, 1.5 * pause)
        return found

    # -- what is done

    def undone(self, names: Sequence[str]) -> list[str]:
        """Those of some tasks that are not done."""
        listed = set(self.files.names())
        return [name for name in names if name + DONE not in listed]

    def records(self) -> dict[str, dict[str, Any]]:
        """What is known of each task that is done; nothing of one whose file is damaged."""
        return self._all(DONE)

    def record(self, name: str) -> dict[str, Any]:
        """The same of one task."""
        return _content(self.files.read(name + DONE) or b"")

    def set_record(self, name: str, record: dict[str, Any]) -> None:
        """Write what is known of a task that is done."""
        self.files.write(name + DONE, _json(record))

    def failures(self) -> dict[str, dict[str, Any]]:
        """The last error that each task has met."""
        return self._all(FAILED)

    def leases(self) -> dict[str, dict[str, Any]]:
        """What the processes at work say of themselves, by the tasks they are at."""
        listed = set(self.files.names())
        held = {
            name: generation
            for name, generation in _generations(listed).items()
            if name + DONE not in listed
        }
        contents = self._contents([lease_name(*pair) for pair in held.items()])
        return dict(zip(held, contents, strict=True))

    def _all(self, ending: str) -> dict[str, dict[str, Any]]:
        files = sorted(name for name in self.files.names() if name.endswith(ending))
        found = zip(files, self._contents(files), strict=True)
        return {file.removesuffix(ending): content for file, content in found if content}

    def _contents(self, files: Sequence[str]) -> list[dict[str, Any]]:
        if not files:
            return []
        with ThreadPoolExecutor(TOGETHER) as pool:
            return [_content(data or b"") for data in pool.map(self.files.read, files)]

    def reopen(self, name: str) -> None:
        """Take back that a task is done."""
        self.files.remove(name + DONE)


class Lease:
    """One task while this process works on it; ends with the block that it is used in."""

    def __init__(self, tasks: Tasks, name: str, generation: int) -> None:
        self.name, self.generation = name, generation
        self._tasks = tasks
        self._begun, self._beats = time.time(), 0
        self._writing, self._ended = threading.Lock(), threading.Event()

    def begin(self) -> bool:
        """Claim the task, and give signs of life from then on; whether no other process has it."""
        created = self._tasks.files.create(self._file, self._data())
        if created:
            threading.Thread(target=self._beat, daemon=True).start()
        return created

    def finish(self, record: dict[str, Any], tokens: int = 0) -> None:
        """Say that the task is done: by whom, and what came of it; ``tokens``: how many were
        worked on for it."""
        tasks = self._tasks
        tasks.tokens += tokens
        content = {"maker": asdict(tasks.maker), "begun": self._begun, "ended": time.time()}
        tasks.set_record(self.name, content | record)

    def release(self) -> None:
        """Leave the task: to whoever wants it, unless it is done."""
        with self._writing:
            self._ended.set()
        for generation in range(self.generation + 1):
            self._tasks.files.remove(lease_name(self.name, generation))

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Within, an error is remembered as the last words on this task."""
        try:
            yield
        except Exception as error:
            with suppress(OSError):  # the error at hand says more
                self._fail(error)
            raise

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.release()
            return
        with suppress(OSError):  # the error at hand says more
            if isinstance(error, Exception):
                self._fail(error)
            self.release()

    def _fail(self, error: Exception) -> None:
        words = " ".join(f"{type(error).__name__}: {error}".split())[-WORDS:]
        content = {"maker": asdict(self._tasks.maker), "ended": time.time(), "words": words}
        self._tasks.files.write(self.name + FAILED, _json(content))

    def _beat(self) -> None:
        while not self._ended.wait(self._tasks.seconds / BEATS):
            with self._writing:
                if self._ended.is_set():
                    return
                self._beats += 1
                # A disk that refuses this for a while costs at most that another process takes the
                # task too; one that refuses for good ends the task itself.
                with suppress(OSError):
                    self._tasks.files.write(self._file, self._data())

    @property
    def _file(self) -> str:
        return lease_name(self.name, self.generation)

    def _data(self) -> bytes:
        tasks = self._tasks
        return _json(
            {
                "maker": asdict(tasks.maker),
                "seconds": tasks.seconds,
                "begun": self._begun,
                "beat": self._beats,
                "time": time.time(),
                "tokens": tasks.tokens,
                "working": time.monotonic() - tasks.begun,
            }
        )


def _environment(variable: str, usual: float, limits: tuple[float, float], what: str) -> float:
    """A number that the environment may set otherwise."""
    given = os.environ.get(variable, str(usual))
    try:
        number = float(given)
    except ValueError:
        number = -1.0
    if not limits[0] <= number <= limits[1]:
        raise StoreError(
            f"{variable}={given!r} in the environment: give {limits[0]:.0f} to {limits[1]:.0f} "
            f"{what}"
        )
    return number


def lease_name(task: str, generation: int) -> str:
    """The file of a task's lease: the first one, or that of whoever took over."""
    return f"{task}.{generation:04d}.lease"


def _generations(names: Collection[str]) -> dict[str, int]:
    """The last lease of each task at work."""
    found: dict[str, int] = {}
    for name in names:
        if (parts := LEASE.fullmatch(name)) is not None:
            task, generation = parts["task"], int(parts["generation"])
            found[task] = max(generation, found.get(task, 0))
    return found


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _content(data: bytes) -> dict[str, Any]:
    """What a file says; nothing if it is damaged, or just being created."""
    try:
        content = json.loads(data)
    except ValueError:  # JSON, UTF-8
        return {}
    return content if isinstance(content, dict) else {}
