"""Several workers fill one store while they are killed, stopped for longer than their lease and
slowed down at random; what comes out is compared with the store of one undisturbed worker.

python -m tools.robustness.kill_capture --kills 100 --workers 8
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from teachers.atomic_files import is_temporary
from teachers.store.manifest import TASKS
from teachers.store.tasks import Tasks

TEXTS = 4000  # sixteen shards
LEASE_SECONDS = 6.0
STALLS = 0.2  # of all disturbances: a worker is stopped, and goes on when its lease has expired


def start(folder: Path, data: Path, *, slow: bool = False) -> subprocess.Popen[bytes]:
    """A capture as a user starts it."""
    command = [sys.executable, "-m", "distill", "capture", "--data", str(data), "--store"]
    settings = {"OMP_NUM_THREADS": "1", "DISTILL_LEASE_SECONDS": str(LEASE_SECONDS)}
    settings["DISTILL_TAKEOVERS"] = "9999"  # nobody is to blame but this program
    return subprocess.Popen(
        ["nice", "-n", "15" if slow else "0", *command, str(folder)],
        env=os.environ | settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # with the teacher's process, which is disturbed with it
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store but what says who does what."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and TASKS not in path.relative_to(folder).parts and not is_temporary(path)
    }


def disturbed(
    folder: Path, data: Path, workers: int, kills: int, chance: random.Random
) -> Counter[str]:
    """Fill a store with workers of whom at most ``kills`` are killed; what was done to them."""
    running = [start(folder, data, slow=number == 0) for number in range(workers)]
    stalled: dict[int, float] = {}  # by process, when it goes on
    counts: Counter[str] = Counter()
    while any(worker.poll() is None for worker in running):
        time.sleep(chance.uniform(0.2, 2.0))
        now = time.monotonic()
        for process in [one for one, until in stalled.items() if until < now]:
            _signal(process, signal.SIGCONT)
            del stalled[process]
        makers = [lease.get("maker", {}) for lease in Tasks(folder / TASKS).leases().values()]
        at_work = {maker.get("process") for maker in makers}
        awake = [one for one in running if one.poll() is None and one.pid not in stalled]
        awake = [one for one in awake if one.pid in at_work]  # not one that is just starting
        if awake and counts["killed"] < kills:
            victim = chance.choice(awake)
            if chance.random() < STALLS:
                _signal(victim.pid, signal.SIGSTOP)
                stalled[victim.pid] = now + chance.uniform(0.5, 2.0) * LEASE_SECONDS
                counts["stalled"] += 1
            else:
                _signal(victim.pid, signal.SIGKILL)
                victim.wait()
                counts["killed"] += 1
        for place, worker in enumerate(running):
            code = worker.poll()
            assert code in (None, 0, -signal.SIGKILL), f"exit code {code}"
            if code == -signal.SIGKILL:
                running[place] = start(folder, data, slow=place == 0)
    return counts


def _signal(process: int, number: int) -> None:
    """Send a signal to a worker and its teacher."""
    try:
        os.killpg(process, number)
    except ProcessLookupError:  # it has just ended
        return


def main() -> None:
    """Parse the command line, disturb and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as root:
        data = Path(root) / "data.jsonl"
        words = [
            chance.choice(("order", "gloves", "budget", "sample", "tank", "room"))
            for _ in range(40)
        ]
        lines = [" ".join(chance.sample(words, 30)) + f" {index}" for index in range(TEXTS)]
        data.write_text("\n".join(json.dumps({"text": line}) for line in lines), encoding="utf-8")
        begin = time.monotonic()
        whole = Path(root) / "whole"
        assert start(whole, data).wait() == 0
        print(f"one worker, undisturbed: {time.monotonic() - begin:.0f} s", flush=True)
        expected, counts, stores = contents(whole), Counter[str](), 0
        while counts["killed"] < options.kills:
            folder, begin = Path(root) / f"store-{stores}", time.monotonic()
            left = options.kills - counts["killed"]
            counts += disturbed(folder, data, options.workers, left, chance)
            stores += 1
            _compare(folder, expected)
            print(
                f"{counts['killed']} killed, {counts['stalled']} stalled, {stores} stores of "
                f"{len(Tasks(folder / TASKS).records())} shards, equal to the undisturbed one; "
                f"{time.monotonic() - begin:.0f} s",
                flush=True,
            )


def _compare(folder: Path, expected: dict[str, bytes]) -> None:
    """See that nothing is lost, nothing doubled, and every byte as without disturbance."""
    assert contents(folder) == expected, "a store differs"
    records = Tasks(folder / TASKS).records()
    shards = [name for name in expected if name.startswith("shard-")]
    assert len(records) == len(shards), "a shard is open"


if __name__ == "__main__":
    main()
