"""Training of a tiny student with everything on, on the pretended GPU, at any vocabulary.

``python -m tests.support.pretended_gpu.training`` prints the table of docs/benchmarks.md;
``--where`` the lines that wait, copy or launch too.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from distill.config.schema import LossConfig, TrainConfig
from distill.heads.prompt_set import PromptSet
from distill.heads.prompts import SafetyPrompt
from distill.losses.objective import Objective
from distill.training import checkpoint_timer
from distill.training.data import TrainingData, split
from distill.training.engine import TrainingJob, train
from teachers.store.manifest import Manifest
from teachers.store.shared import SharedCodec
from teachers.store.store import SoftTargetStore
from teachers.targets.distributions import Arrays
from teachers.targets.output_head import OutputHead
from teachers.targets.recipe import NODES, TINY_VOCABULARY, Recipe
from teachers.targets.state_codec import Basis
from tests.support.pretended_gpu import Watched, training_on_gpu
from tests.support.students import make_student

VOCABULARIES = (512, 32_000, 262_144)
LENGTHS = (128, 112, 96, 80)  # of the sequences, in turn
BATCH, RANK, LAYERS = 8, 16, 4
CONFIG = TrainConfig(epochs=1, batch_size=BATCH, evaluations=2, learning_rate=0.01)
LOSS = LossConfig(temperature=1.0)


def random_store(folder: Path, vocab: int, lengths: Sequence[int]) -> SoftTargetStore:
    """Soft targets with a sketch of the tail, drawn at random: only their shapes matter."""
    recipe = Recipe(num_topk=16, sketch_bytes=RANK)
    identity = {"recipe": recipe.to_json(), "vocab_size": vocab}
    store = SoftTargetStore.create_or_open(folder, Manifest(identity, len(lengths), len(lengths)))
    draw = np.random.default_rng(0)
    positions = sum(lengths) - len(lengths)
    first = draw.integers(vocab, size=(positions, 1))
    ids = (first + np.arange(16) * (vocab // 16)) % vocab
    arrays: Arrays = {
        "topk_ids": ids.astype(np.uint16 if vocab <= TINY_VOCABULARY else np.int32),
        "topk_logits": np.tile(-0.5 * np.arange(16, dtype=np.float16), (positions, 1)),
        "tail": np.tile(np.log(vocab) - 6 * np.array(NODES, np.float32), (positions, 1)),
        "sketch": draw.integers(256, size=(positions, RANK)).astype(np.uint8),
        "sketch_scale": np.ones(positions, np.float16),
    }
    eye, ones = torch.eye(RANK), torch.ones(RANK)
    matrix = torch.from_numpy(draw.normal(size=(vocab, RANK)).astype(np.float16)).float()
    head = OutputHead(matrix, torch.zeros(vocab))
    basis = Basis(torch.zeros(RANK), eye, eye, ones, torch.full((RANK,), 8, dtype=torch.uint8))
    store.write_shared_codec(SharedCodec({"final": basis}, head))
    store.write_shard(0, [draw.integers(vocab, size=n).astype(np.int32) for n in lengths], arrays)
    return store


def make_prompts() -> PromptSet:
    """Eight prompts, to be allowed and to be refused."""
    labels = ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0))
    prompts = [SafetyPrompt(str(n), str(n), "", labels[n % 2]) for n in range(8)]
    return PromptSet(prompts, [np.arange(1, 6 + n, dtype=np.int32) for n in range(8)], 0)


def job(folder: Path, vocab: int, steps: int, lengths: Sequence[int] = LENGTHS) -> TrainingJob:
    """A student of width 16 with both heads; ``lengths`` of its sequences, in turn."""
    count = BATCH * steps + 4
    sizes = [lengths[number % len(lengths)] for number in range(count)]
    store = random_store(folder / "store", vocab, sizes)
    parts = split(store, 4 / count, 0)
    data = TrainingData(store, parts, 0, make_prompts(), prompts_every=2, prompts_together=4)
    (folder / "run").mkdir(parents=True, exist_ok=True)
    student = make_student(16, LAYERS, vocab, heads=True)
    return TrainingJob(student, data, Objective(LOSS), CONFIG, folder / "run")


@dataclass
class StepCounts:
    """What one optimizer step waits for, moves over the bus and launches."""

    syncs: Counter[tuple[str, str]]
    bytes: Counter[str]
    launches: Counter[str]

    @classmethod
    def until_now(cls, seen: Watched) -> StepCounts:
        return cls(seen.syncs.copy(), seen.bytes.copy(), seen.launches.copy())

    def since(self, before: StepCounts) -> StepCounts:
        return StepCounts(
            self.syncs - before.syncs, self.bytes - before.bytes, self.launches - before.launches
        )


def counted(one: TrainingJob) -> list[StepCounts]:
    """Train, and count each step but the first and the last, which do other things too."""
    never = patch.object(checkpoint_timer, "CHECKPOINT_SECONDS", math.inf)
    with never, training_on_gpu() as seen:
        sums: list[StepCounts] = []
        train(one, lambda step, note: sums.append(StepCounts.until_now(seen)))
    return [later.since(before) for before, later in pairwise(sums)][:-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--where", action="store_true")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    arguments = parser.parse_args()
    print(f"{'V':>8} {'waits':>6} {'bytes':>12} {'launches':>9}   (the worst of some steps)")
    for vocab in arguments.vocabularies:
        with tempfile.TemporaryDirectory() as folder:
            steps = counted(job(Path(folder), vocab, 6))
        worst: list[Any] = [
            max(sum(getattr(step, name).values()) for step in steps)
            for name in ("syncs", "bytes", "launches")
        ]
        print(f"{vocab:8} {worst[0]:6} {worst[1]:12,} {worst[2]:9}", flush=True)
        if arguments.where:
            for name in ("syncs", "bytes", "launches"):
                print(f"  {name}:")
                for place, count in getattr(steps[-1], name).most_common(40):
                    print(f"    {count:10,}  {place}")


if __name__ == "__main__":
    main()
