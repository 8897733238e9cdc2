"""How long a training takes from the command to its first steps, and in how much memory: on a
simulated store, whose soft targets are zeros in sparse files, against one of a single shard.

python -m tools.bench.train_start --tokens 1e9 [--store FOLDER]

Every shard is valid: its tokens are random, its checksum is right. ``--store``: where the simulated
store is kept and found again (tokens of 4 bytes are all that it takes on disk).
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
from pathlib import Path

import numpy as np
import psutil
import safetensors.numpy
import torch

from distill.config.loading import load_config
from distill.pipeline.capture import capture_only
from distill.runtime.progress import Console
from teachers.store.manifest import MANIFEST, Manifest, read_manifest
from teachers.store.shard_records import OWN_ARRAYS
from teachers.store.store import SHARED_CODEC, SoftTargetStore, array_digest
from teachers.store.teacher_record import TEACHER
from teachers.targets.distributions import Arrays
from tools.machine import machine, machine_line

LENGTH = 512  # tokens of a sequence
PER_SHARD = 256  # sequences
STEPS = 10  # that are waited for
BLOCK = 1 << 16  # bytes of a file that are left out if they are zeros
SETTINGS = ["--student-size", "128x2", "--safety-labels", "none", "--set", "student.init=random"]


def begin(folder: Path) -> SoftTargetStore:
    """A little store that the example teacher has filled."""
    config = load_config(
        None, {"data.samples": 8, "data.max_length": 32, "safety.labels": "none"}, []
    )
    return capture_only(config, folder, Console(quiet=True))


def simulate(folder: Path, shards: int, real: SoftTargetStore) -> SoftTargetStore:
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
    vocab_size = int(manifest.identity["vocab_size"])

    def write(shard: int) -> None:
        draw = np.random.default_rng(shard)
        tokens = draw.integers(0, vocab_size, PER_SHARD * LENGTH, np.int32)
        arrays: Arrays = {"tokens": tokens, "lengths": np.full(PER_SHARD, LENGTH), **zeros}
        path = store.shard_path(shard)
        seal = store._seal(path, arrays, codec)
        write_sparse(path, safetensors.numpy.save(arrays, metadata=seal))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for shard, _ in enumerate(pool.map(write, range(shards)), 1):
            if shard % 500 == 0:
                print(f"{shard:,} of {shards:,} shards are simulated", flush=True)
    return store


def write_sparse(path: Path, data: bytes) -> None:
    """Write a file without its zeros."""
    with path.open("wb") as file:
        for start in range(0, len(data), BLOCK):
            block = data[start : start + BLOCK]
            if block.count(0) != len(block):
                file.seek(start)
                file.write(block)
        file.truncate(len(data))


def measure(store: Path, out: Path) -> tuple[float, float, float]:
    """Seconds from the command to its first step, seconds of a step after it, and the most memory
    until then, in bytes."""
    command = [sys.executable, "-m", "distill", "train", str(store), "--out", str(out), *SETTINGS]
    with (out.with_suffix(".log")).open("wb") as log:
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            first = _wait(process, lambda: steps_of(out) >= 1) - begun
            last = _wait(process, lambda: steps_of(out) > STEPS) - begun
            memory = peak_of(process.pid)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait()
    return first, (last - first) / STEPS, memory


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
    parser.add_argument("--store", type=Path)
    options = parser.parse_args()
    print(machine_line(machine(torch.get_num_threads())))
    shards = -(-int(options.tokens) // (LENGTH * PER_SHARD))
    with tempfile.TemporaryDirectory() as root:
        place = Path(root)
        real, small, large = (
            begin(place / "real"),
            place / "small",
            options.store or place / "large",
        )
        simulate(small, 1, real)
        if not large.exists():
            simulate(large, shards, real)
        ends = []
        for name, store in (("small", small), ("large", large), ("large again", large)):
            ends.append(measure(store, place / f"run-{len(ends)}"))
            seconds, step, memory = ends[-1]
            sequences = read_manifest(store).sequences
            print(
                f"{name}: {sequences * LENGTH:,} tokens, first step after {seconds:.1f} s, "
                f"{step:.3f} s a step, {memory / 1e6:,.0f} MB at most"
            )
        more = max(end[2] for end in ends[1:]) - ends[0][2]
        print(f"the large store takes {more / 1e6:,.0f} MB more")


if __name__ == "__main__":
    main()
