"""How long a training takes from the command to its first steps, and in how much memory: on a
simulated store, whose soft targets are zeros in sparse files, against one of a single shard.

python -m tools.bench.train_start --tokens 1e9 [--fresh] [--store FOLDER]

Tokens are random, and no sequence is like another. The records of the simulated store say that its
shards have been read back; with ``--fresh`` they do not, and each gets its checksum, which takes
the simulation 0.4 s of a processor per million tokens. ``--store``: where the simulated store is
kept and found again (4 bytes a token are all that it takes on disk). Beside the time stands the
processor's, which other work on the machine does not change much.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import safetensors.numpy
import torch

from distill.config.loading import load_config
from distill.pipeline.capture import capture_only
from distill.runtime.progress import Console
from teachers.base import Tokens
from teachers.store.manifest import MANIFEST, TASKS, Manifest, read_manifest
from teachers.store.shard_contents import contents_of
from teachers.store.shard_records import OWN_ARRAYS, READ_BACK, task_name
from teachers.store.store import SHARED_CODEC, SoftTargetStore, array_digest
from teachers.store.tasks import Tasks
from teachers.store.teacher_record import TEACHER
from teachers.targets.distributions import Arrays
from tools.machine import machine, machine_line

LENGTH = 512  # tokens of a sequence
PER_SHARD = 256  # sequences
STEPS = 10  # that are waited for
SETTINGS = ["--student-size", "128x2", "--safety-labels", "none", "--set", "student.init=random"]


def begin(folder: Path) -> SoftTargetStore:
    """A little store that the example teacher has filled."""
    config = load_config(
        None, {"data.samples": 8, "data.max_length": 32, "safety.labels": "none"}, []
    )
    return capture_only(config, folder, Console(quiet=True))


def simulate(folder: Path, shards: int, real: SoftTargetStore, fresh: bool) -> None:
    """A store of so many shards, with the codec and the teacher's record of a real one."""
    folder.mkdir(parents=True)
    manifest = Manifest(real.manifest.identity, shards * PER_SHARD, PER_SHARD)
    (folder / MANIFEST).write_text(manifest.to_json())
    for name in (SHARED_CODEC, TEACHER):
        shutil.copyfile(real.folder / name, folder / name)
    store, some = SoftTargetStore(folder, manifest), real.read_shard(0)
    assert some is not None
    rows = PER_SHARD * (LENGTH - 1)
    zeros = {
        name: np.zeros((rows, *array.shape[1:]), array.dtype)
        for name, array in some.items()
        if name not in OWN_ARRAYS
    }
    codec = array_digest(real.read_file(SHARED_CODEC) or {})
    tasks = Tasks(folder / TASKS)
    vocab_size = int(manifest.identity["vocab_size"])

    def of_tokens(tokens: Tokens) -> Arrays:
        lengths = np.full(PER_SHARD, LENGTH)
        return {
            "tokens": tokens,
            "lengths": lengths,
            **contents_of(tokens, lengths, vocab_size),
        }

    own_arrays = of_tokens(np.zeros(PER_SHARD * LENGTH, np.int32))
    first: Arrays = own_arrays | zeros
    seal = store._seal(store.shard_path(0), first, codec)
    whole = safetensors.numpy.save(first, metadata=seal)
    begin = 8 + int.from_bytes(whole[:8], "little")
    about = json.loads(whole[8:begin])

    def write(shard: int) -> None:
        path, draw = store.shard_path(shard), np.random.default_rng(shard)
        arrays = first | of_tokens(draw.integers(0, vocab_size, PER_SHARD * LENGTH, np.int32))
        own = store._seal(path, arrays if fresh else {}, codec)
        header = whole[:begin].replace(seal["sha256"].encode(), own["sha256"].encode())
        with path.open("wb") as file:
            file.write(header)
            for name in own_arrays:
                file.seek(begin + about[name]["data_offsets"][0])
                file.write(arrays[name].tobytes())
            file.truncate(len(whole))
        if not fresh:
            size = path.stat()
            known = {"bytes": size.st_size, "mtime_ns": size.st_mtime_ns, READ_BACK: True}
            tasks.set_record(task_name(shard), known)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for shard, _ in enumerate(pool.map(write, range(shards)), 1):
            if shard % 500 == 0:
                print(f"{shard:,} of {shards:,} shards are simulated", flush=True)


@dataclass(frozen=True)
class Start:
    """Seconds from the command to its first logged step, and of the processors until then; seconds
    of a step after it; the most memory of all, in bytes."""

    seconds: float
    processors: float
    step: float
    memory: float


def measure(store: Path, out: Path) -> Start:
    """Start a training, and end it after some steps."""
    command = [sys.executable, "-m", "distill", "train", str(store), "--out", str(out), *SETTINGS]
    with (out.with_suffix(".log")).open("wb") as log:
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            first = _wait(process, lambda: steps_of(out) >= 1)
            spent = psutil.Process(process.pid).cpu_times()
            last = _wait(process, lambda: steps_of(out) > STEPS)
            memory = peak_of(process.pid)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait()
    return Start(first - begun, spent.user + spent.system, (last - first) / STEPS, memory)


def _wait(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> float:
    while not reached():
        if process.poll() is not None:
            raise RuntimeError(f"the training ended with exit code {process.returncode}")
        time.sleep(0.02)
    return time.perf_counter()


def steps_of(out: Path) -> int:
    """How many steps a run has logged."""
    try:
        lines = (out / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return sum(json.loads(line)["kind"] == "train" for line in lines if line.endswith("}"))


def peak_of(process: int) -> float:
    """The most memory that a process has had; where the system does not say, what it has."""
    status = Path(f"/proc/{process}/status")
    if not status.exists():
        return float(psutil.Process(process).memory_info().rss)
    line = next(one for one in status.read_text().splitlines() if one.startswith("VmHWM"))
    return 1024.0 * int(line.split()[1])


def main() -> None:
    """Parse the command line, simulate and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=float, default=1e9)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--store", type=Path)
    options = parser.parse_args()
    print(machine_line(machine(torch.get_num_threads())))
    shards = -(-int(options.tokens) // (LENGTH * PER_SHARD))
    with tempfile.TemporaryDirectory() as root:
        place = Path(root)
        real, small = begin(place / "real"), place / "small"
        large = options.store or place / "large"
        simulate(small, 1, real, options.fresh)
        if not large.exists():
            simulate(large, shards, real, options.fresh)
        starts: list[Start] = []
        for name, store in (("small", small), ("large", large)):
            starts.append(start := measure(store, place / f"run-{name}"))
            print(
                f"{name}: {read_manifest(store).sequences * LENGTH:,} tokens, first step after "
                f"{start.seconds:.1f} s ({start.processors:.1f} s of the processors), "
                f"{start.step:.3f} s a step, {start.memory / 1e6:,.0f} MB at most",
                flush=True,
            )
        more = starts[1].memory - starts[0].memory
        print(f"the large store takes {more / 1e6:,.0f} MB more")


if __name__ == "__main__":
    main()
