"""Tasks taken one by one: by one process each, again after it has died, until all are done."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest

from teachers.atomic_files import StoreError
from teachers.machine import machine
from teachers.store.tasks import DONE, FAILED, GIVEN_UP, Lease, Maker, Tasks, lease_name

NAMES = [f"part-{number}" for number in range(12)]
OTHER = Maker(host="elsewhere", machine="elsewhere.0", process=1)
SHORT = 0.3  # seconds of a lease


@pytest.fixture(params=["path", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder of tasks: on a disk, or as on an object store."""
    if request.param == "path":
        return str(tmp_path / "tasks")
    fsspec.filesystem("memory").store.clear()
    return "memory://tasks"


def abandoned(place: str, name: str, seconds: float = SHORT) -> Lease:
    """A task claimed on another machine, of which no more is heard."""
    other = Tasks(place, OTHER, 1e9)  # so long that it gives no sign of life
    lease = other.claim([name])
    assert lease is not None
    file = lease_name(name, lease.generation)
    content = json.loads(other.files.read(file) or b"") | {"seconds": seconds}
    other.files.write(file, json.dumps(content).encode())
    return lease


def test_every_task_is_done_once(place: str) -> None:
    """By many at once, in order where one is alone; who has done it is told."""
    made: Counter[str] = Counter()
    lock = threading.Lock()

    def work(number: int) -> None:
        tasks = Tasks(place, Maker(processor=f"worker {number}"), SHORT)
        for lease in tasks.each(NAMES, lambda left: None):
            with lease:
                with lock:
                    made[lease.name] += 1
                time.sleep(0.01)
                lease.finish({"number": number}, tokens=5)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == dict.fromkeys(NAMES, 1)
    tasks = Tasks(place)
    records = tasks.records()
    assert sorted(records) == sorted(NAMES) and not tasks.undone(NAMES) and not tasks.leases()
    for record in records.values():
        assert record["maker"]["processor"] == f"worker {record['number']}"
        assert record["maker"]["machine"] == machine() and record["begun"] <= record["ended"]
    assert {name for name in tasks.files.names() if not name.endswith(DONE)} == set()


def test_a_silent_process_is_replaced_by_exactly_one(place: str) -> None:
    """After its own time, and once; a process that gives signs of life keeps its task however
    long it takes, and a task that was done meanwhile is not taken at all."""
    abandoned(place, NAMES[0])
    watching = [Tasks(place, seconds=SHORT) for _ in range(6)]
    assert [tasks.claim(NAMES[:1]) for tasks in watching] == [None] * 6
    time.sleep(1.5 * SHORT)
    taken: list[Lease] = []
    barrier = threading.Barrier(6)

    def take(tasks: Tasks) -> None:
        barrier.wait()
        if (lease := tasks.claim(NAMES[:1])) is not None:
            taken.append(lease)

    threads = [threading.Thread(target=take, args=(tasks,)) for tasks in watching]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [lease.generation for lease in taken] == [1]
    for _ in range(4):  # it lives, so nobody takes it
        time.sleep(SHORT)
        assert [tasks.claim(NAMES[:1]) for tasks in watching] == [None] * 6
    taken[0].finish({})
    taken[0].release()
    assert watching[0].files.names() == [NAMES[0] + DONE]
    assert watching[1]._take(NAMES[0], 0) is None, "taken after a look that is out of date"
    assert watching[0].files.names() == [NAMES[0] + DONE]


def test_a_process_that_ended_on_this_machine_is_replaced_at_once(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another machine's process ids nothing is concluded."""
    gone = next(number for number in range(99_999, 1, -1) if not psutil.pid_exists(number))
    for maker, at_once in (
        (Maker(process=gone), True),
        (Maker(machine="x.0", process=gone), False),
    ):
        tasks = Tasks(place, maker, 60.0)
        assert tasks.claim(NAMES[:1]) is not None
        again = Tasks(place).claim(NAMES[:1])
        assert (again is not None) == at_once, maker
        if again is not None:
            again.release()


def test_a_task_that_kills_everyone_is_given_up(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After three takeovers, once nothing else is left to do; it is named, and tried again when its
    files are removed. The environment may say another number."""
    tasks, done = Tasks(place, seconds=SHORT), []
    lease = json.dumps({"maker": asdict(OTHER), "seconds": 0.0}).encode()
    for generation in range(4):
        tasks.files.create(lease_name(NAMES[0], generation), lease)
    with pytest.raises(StoreError, match=r"part-0 was given up: 4 processes .* remove .*again"):
        for one in tasks.each(NAMES[:3], lambda left: None):
            with one:
                one.finish({})
                done.append(one.name)
    assert done == NAMES[1:3]
    (failure,) = tasks.failures().values()
    assert failure[GIVEN_UP] and failure["maker"]["host"] == "elsewhere"
    monkeypatch.setenv("DISTILL_TAKEOVERS", "4")
    (taken,) = itertools.islice(Tasks(place).each(NAMES[:1], lambda left: None), 1)
    assert taken.generation == 4
    taken.release()
    tasks.files.remove(NAMES[0] + FAILED)
    (taken,) = itertools.islice(tasks.each(NAMES[:1], lambda left: None), 1)
    assert taken.generation == 0
    taken.release()


def test_failures_are_told_and_tried_last(place: str) -> None:
    """With the last words; a task that ends whoever tries it does not keep others from the rest."""
    tasks = Tasks(place, seconds=SHORT)
    with pytest.raises(ValueError, match="this one"):
        for lease in tasks.each(NAMES[:3], lambda left: None):
            with lease:
                raise ValueError("this one cannot be done")
    failure = tasks.failures()[NAMES[0]]
    assert failure["words"] == "ValueError: this one cannot be done"
    assert failure["maker"]["machine"] == machine()
    order = []
    for lease in tasks.each(NAMES[:3], lambda left: None):
        with lease:
            order.append(lease.name)
            lease.finish({})
    assert order == [NAMES[1], NAMES[2], NAMES[0]]
    with pytest.raises(KeyboardInterrupt):
        for lease in tasks.each(NAMES[3:], lambda left: None):
            with lease:
                raise KeyboardInterrupt
    assert tasks.leases() == {} and NAMES[3] + FAILED not in tasks.files.names()


def test_damaged_files_heal(place: str) -> None:
    """A lease of nonsense expires as any other; a record of nonsense counts as none; neither is
    ever an error."""
    tasks = Tasks(place, seconds=SHORT)
    nonsense: list[bytes] = [b"", b"{", b"[1]", b"\xff", b'{"seconds": "x", "maker": 3}']
    for name, data in zip(NAMES, nonsense, strict=False):
        tasks.files.write(lease_name(name, 0), data)
    some = NAMES[: len(nonsense)]
    told: list[int] = []
    for lease in tasks.each(some, told.append):
        with lease:
            assert lease.generation == 1
            lease.finish({})
    assert told and set(tasks.records()) == set(some)
    tasks.files.write(NAMES[0] + DONE, b"{")
    assert NAMES[0] not in tasks.records()


def test_what_one_makes_the_others_find(place: str) -> None:
    """``once``: made by one process, also where the first one dies over it."""
    abandoned(place, "codec")
    found: list[Any] = []
    made: list[int] = []

    def make() -> int:
        time.sleep(0.05)
        made.append(7)
        return 7

    def work() -> None:
        tasks = Tasks(place, seconds=SHORT)
        find = lambda: made[0] if made else None  # noqa: E731
        found.append(tasks.once("codec", find, make, lambda: None))

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [7] and found == [7] * 5 and Tasks(place).files.names() == []
