"""How long a worker takes to join a large store, and how much memory: on a simulated one, whose
shards are sparse files. And how fast data is read and tokenized, in how much memory.

python -m tools.bench.worker_start --tokens 1e9 --rows 50000 200000
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch

from distill.capture.corpus import Corpus
from distill.capture.sequences.known import StoreLocation, data_settings, find_sequences
from distill.capture.sequences.stored import stored_corpus
from distill.config.loading import load_config
from teachers import example_teacher
from teachers.base import Sampling, no_progress
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.store.manifest import MANIFEST, SEQUENCES, TASKS, Manifest
from teachers.store.sequence_index import INDEX, Index, Item, Tally
from teachers.store.sequences import (
    PART_TOKENS,
    SequenceFiles,
    part_path,
    write_sequences,
)
from teachers.store.shard_records import is_unchanged, task_name, task_names
from teachers.store.store import SoftTargetStore
from teachers.store.tasks import Maker, Tasks
from teachers.targets.recipe import Recipe
from tools.machine import machine, machine_line, peak_memory

LENGTH = 512  # tokens of a sequence
PER_SHARD = 256  # sequences
POSITION_BYTES = 204
DONE = 0.6  # of the shards
WORKERS = 100


def simulate(folder: Path, tokens: int) -> Manifest:
    """A store of so many tokens, 60 % of it captured, with 100 workers at the rest."""
    per_part = PART_TOKENS // LENGTH
    count = -(-tokens // (LENGTH * per_part))
    item = Item((np.zeros(LENGTH, dtype=np.int32),), False)
    place = folder / SEQUENCES
    place.mkdir(parents=True)
    request = {"settings": data_settings(load_config(None, {}, [])), "files": []}
    index = Index(Sampling(max_length=LENGTH), Tally(), [], request)
    first = write_sequences(place, (item for _ in range(per_part)), index)
    for number in range(1, count):
        shutil.copyfile(part_path(place, 0), part_path(place, number))
    content = json.loads((place / INDEX).read_text())
    content["parts"] = [first.parts[0]] * count
    content["tally"] |= {"sequences": per_part * count, "tokens": per_part * count * LENGTH}
    (place / INDEX).write_text(json.dumps(content))
    identity = {"recipe": Recipe().to_json(), "vocab_size": 32000}
    manifest = Manifest(identity, per_part * count, PER_SHARD)
    (folder / MANIFEST).write_text(manifest.to_json())
    tasks = Tasks(folder / TASKS, Maker("simulated", 16, "0"))
    done = round(DONE * manifest.shards)
    for shard in range(done):
        path = folder / f"{task_name(shard)}.safetensors"
        with path.open("wb") as file:
            file.truncate(PER_SHARD * LENGTH * POSITION_BYTES)
        about = path.stat()
        record = {"bytes": about.st_size, "mtime_ns": about.st_mtime_ns, "tokens": 1}
        tasks.files.write(f"{task_name(shard)}.done", json.dumps(record).encode())
    for shard in range(done, done + WORKERS):
        tasks.files.write(f"{task_name(shard)}.0000.lease", b'{"seconds": 60.0}')
    return manifest


def join(folder: Path) -> tuple[int, int]:
    """What a worker does from its loaded teacher to its first shard's tokens; which shard that is
    and how many tokens it has."""
    found = find_sequences(StoreLocation(folder, folder, ""), load_config(None, {}, []))
    assert found is not None
    corpus = Corpus(SequenceFiles(*found), found[1].sampling, [], [])
    manifest = Manifest({"recipe": Recipe().to_json(), "vocab_size": 32000}, len(corpus), PER_SHARD)
    store = SoftTargetStore.create_or_open(folder, manifest)
    tasks = Tasks(folder / TASKS)
    names = task_names(manifest)
    numbers = {name: shard for shard, name in enumerate(names)}
    for name, record in tasks.records().items():
        assert is_unchanged(store.shard_path(numbers[name]), record)
    lease = tasks.claim(tasks.undone(names))
    assert lease is not None
    with lease:
        start, stop = store.span(numbers[lease.name])
        items = corpus.items[start:stop]
    return numbers[lease.name], sum(len(item.segments[0]) for item in items)


def read(rows: int, folder: Path) -> None:
    """Read so many rows of JSONL into a store, and say how that went."""
    chance, path = random.Random(0), folder / "data.jsonl"
    words = ("order", "gloves", "budget", "sample", "tank", "room", "please", "the", "of", "report")
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            text = " ".join(chance.choices(words, k=100))
            file.write(json.dumps({"text": f"{number} {text}"}) + "\n")
    config = load_config(None, {"data.path": str(path)}, [])
    place = StoreLocation(folder / "store", folder, "")
    with GGUFTeacher(example_teacher()) as teacher, peak_memory(torch.device("cpu")) as peak:
        begin = time.perf_counter()
        with stored_corpus(
            config, teacher, place, lambda make: make(no_progress), lambda: None
        ) as corpus:
            seconds = time.perf_counter() - begin
    tokens = corpus.tally.tokens
    print(
        f"{rows:,} rows ({path.stat().st_size / 1e6:.0f} MB): {tokens:,} tokens in {seconds:.1f} s "
        f"({tokens / seconds:,.0f} a second) with {peak.extra / 1e6:.0f} MB"
    )


def main() -> None:
    """Parse the command line, simulate and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=float, default=1e9)
    parser.add_argument("--rows", type=int, nargs="*", default=[])
    options = parser.parse_args()
    print(machine_line(machine(torch.get_num_threads())))
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "store"
        manifest = simulate(folder, int(options.tokens))
        size = sum(path.stat().st_size for path in folder.glob("shard-*"))
        print(
            f"{manifest.sequences * LENGTH:,} tokens, {manifest.shards:,} shards, "
            f"{size / 1e9:.0f} GB of them there"
        )
        before = psutil.Process().memory_info().rss
        with peak_memory(torch.device("cpu")) as peak:
            begin = time.perf_counter()
            shard, tokens = join(folder)
            seconds = time.perf_counter() - begin
        print(
            f"joined in {seconds:.2f} s with {peak.extra / 1e6:.0f} MB beyond the "
            f"{before / 1e6:.0f} MB of the imported program; shard {shard}, {tokens:,} tokens"
        )
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as root:
            read(rows, Path(root))


if __name__ == "__main__":
    main()
