"""Training on sequences of chat-like lengths, packed against padded: tokens per second, and the
losses of every step side by side.

    python -m tools.bench.packing [--size 256x6] [--vocab-size 4096] [--precision bf16] [--rounds 3]

The lengths are log-normal (median 90 tokens, up to 512); a fixed random bigram model, whose output
is a product of a thin state and a matrix, stands for the teacher, so that there is something to
learn and a sketch to keep. Every round trains the same new student once in each way, in turns, with
the same batches, guard and heads as a run:

- padded: each micro-batch to its longest sequence. Batches are of sequences of like length, as a
  run makes them.
- packed: one row, attention within each sequence.
- by tokens: packed, ``train.batch_tokens`` at the mean number of tokens of the other batches.
- in random order: padded, batches drawn without regard to length, as is usual elsewhere.

Speed is real tokens (not padding) per second of the process's own time over all steps but the
first, without the evaluations before and after them; the ratio to padded is the median over the
rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from distill.config.schema import LossConfig, TrainConfig
from distill.losses.objective import Objective
from distill.training.data import TrainingData, split
from distill.training.engine import TrainingJob, train
from distill.training.summary import TrainingSummary
from students.model.build import build_student, student_config
from students.model.shape import parse_size
from teachers.base import Tokens
from teachers.store.manifest import Manifest
from teachers.store.shared import SharedCodec
from teachers.store.store import SoftTargetStore
from teachers.targets.fit_codec import fit_sketch
from teachers.targets.recipe import compact_recipe
from teachers.targets.stored_arrays import Answer, reduce
from tools.machine import machine, machine_line, write_json

SIDES = ("padded", "packed", "by tokens", "in random order")
MEDIAN, SPREAD, SHORTEST, LONGEST = 90, 0.8, 8, 512
TEACHER_WIDTH, NUM_TOPK, PER_SHARD = 64, 16, 64
CHOICES = 64  # tokens that may follow a token in the text


@dataclass(frozen=True)
class PackingJob:
    """Sizes of student, data and batches."""

    size: str = "256x6"
    vocab_size: int = 4096
    sequences: int = 288
    batch: int = 16
    precision: str = "bf16"
    seed: int = 0


def chat_lengths(count: int, seed: int) -> np.ndarray:
    """Log-normal numbers of tokens."""
    draws = np.random.default_rng(seed).normal(np.log(MEDIAN), SPREAD, count)
    return np.exp(draws).round().clip(SHORTEST, LONGEST).astype(int)


def make_store(job: PackingJob, folder: Path) -> SoftTargetStore:
    """Text of a bigram model with its soft targets."""
    draw = torch.Generator().manual_seed(job.seed)
    states = torch.randn(job.vocab_size, TEACHER_WIDTH, generator=draw)
    matrix = torch.randn(job.vocab_size, TEACHER_WIDTH, generator=draw) * 3 / TEACHER_WIDTH**0.5
    following = torch.randint(0, job.vocab_size, (job.vocab_size, CHOICES), generator=draw)
    logits = (states[:, None] * matrix[following]).sum(dim=-1)
    weights = logits.softmax(dim=-1).double()
    weights = (weights / weights.sum(dim=-1, keepdim=True)).numpy()
    random, rows = np.random.default_rng(job.seed), list[Tokens]()
    for length in chat_lengths(job.sequences, job.seed):
        tokens = [int(random.integers(job.vocab_size))]
        while len(tokens) < length:
            choice = random.choice(CHOICES, p=weights[tokens[-1]])
            tokens.append(int(following[tokens[-1], choice]))
        rows.append(np.array(tokens, dtype=np.int32))

    def output_rows(start: int, stop: int) -> np.ndarray:
        return matrix[start:stop].numpy()

    recipe = compact_recipe(NUM_TOPK, job.vocab_size, TEACHER_WIDTH)
    sketch = fit_sketch(states, output_rows, job.vocab_size, recipe)
    identity = {"recipe": recipe.to_json(), "vocab_size": job.vocab_size, "lengths": "chat-like"}
    store = SoftTargetStore.create_or_open(folder, Manifest(identity, len(rows), PER_SHARD))
    store.write_shared_codec(SharedCodec({"final": sketch.basis}, sketch.head, sketch.kl))
    for shard in range(store.manifest.shards):
        some = rows[slice(*store.span(shard))]
        known = states[np.concatenate([row[:-1] for row in some])]
        answer = Answer(known @ matrix.T, known)
        store.write_shard(shard, some, reduce(answer, recipe, {"final": sketch.basis}))
    return store


class RandomOrder(TrainingData):
    """Batches drawn without regard to length."""

    def batches(self, epochs: int, batch_size: int) -> list[list[int]]:
        """See ``TrainingData``."""
        plan: list[list[int]] = []
        for epoch in range(epochs):
            order = np.random.default_rng([self.seed, epoch]).permutation(self.split.train).tolist()
            plan += [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
        return plan


@dataclass(frozen=True)
class Training:
    """One training: its summary, real tokens per second of its steps, and the loss of each."""

    summary: TrainingSummary
    speed: float
    losses: list[float]


def train_once(side: str, job: PackingJob, store: SoftTargetStore, folder: Path) -> Training:
    """A new student's training."""
    config = student_config(parse_size(job.size), vocab_size=job.vocab_size, context_length=LONGEST)
    config.verification_head = True
    student = build_student(config, job.seed)
    student.packs = side in ("packed", "by tokens")
    kind = RandomOrder if side == "in random order" else TrainingData
    data = kind(store, split(store, 0.05, job.seed), job.seed)
    if side == "by tokens":
        tokens = int(store.lengths()[data.split.train].mean() * job.batch)
        data = replace(data, batch_tokens=tokens)
    settings = TrainConfig(
        epochs=1,
        batch_size=job.batch,
        evaluations=2,
        learning_rate=1e-3,
        precision=job.precision,  # type: ignore[arg-type]  # checked there
    )
    folder.mkdir()
    objective = Objective(LossConfig(temperature=1.0))
    times: list[float] = []
    summary = train(
        TrainingJob(student, data, objective, settings, folder),
        lambda step, text: times.append(time.process_time()),
    )
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if line["kind"] == "train"]
    speed = (steps[-1]["tokens_seen"] - steps[0]["tokens_seen"]) / (times[-1] - times[0])
    return Training(summary, speed, [line["loss"] for line in steps])


def compare(job: PackingJob, sides: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    """Every side's figures, the first the one that the others are compared with."""
    values: dict[str, list[Training]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as place:
        store = make_store(job, Path(place) / "store")
        for turn in range(rounds + 1):  # the first one warms up
            for side in sides if turn % 2 else reversed(sides):
                result = train_once(side, job, store, Path(place) / f"{side} {turn}")
                values[side] += [result] if turn else []
    first, figures = values[sides[0]], {}
    for side, results in values.items():
        ratios = sorted(a.speed / b.speed for a, b in zip(results, first, strict=True))
        summary, losses, others = results[0].summary, results[0].losses, first[0].losses
        same = len(losses) == len(others)
        apart = [abs(a - b) / abs(b) for a, b in zip(losses, others, strict=False)]
        figures[side] = {
            "tokens_per_second": statistics.median(one.speed for one in results),
            "ratio": statistics.median(ratios),
            "least_ratio": ratios[0],
            "greatest_ratio": ratios[-1],
            "padding": summary.padding,
            "steps": summary.steps,
            "last_kl": summary.scores[-1][1].kl,
            "largest_loss_difference": max(apart) if same else float("nan"),
        }
    return figures


def table_of(figures: dict[str, dict[str, float]], title: str) -> Table:
    """The figures as a table."""
    table = Table(title=title, title_justify="left")
    for name in ("", "tokens/s", "ratio", "padding", "steps", "KL at the end", "losses differ by"):
        table.add_column(name)
    for side, row in figures.items():
        table.add_row(
            side,
            f"{row['tokens_per_second']:,.0f}",
            f"{row['ratio']:.2f} ({row['least_ratio']:.2f}–{row['greatest_ratio']:.2f})",
            f"{row['padding']:.1%}",
            f"{row['steps']:.0f}",
            f"{row['last_kl']:.4f}",
            f"{row['largest_loss_difference']:.1e}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    usual = PackingJob()
    parser.add_argument("--size", default=usual.size)
    parser.add_argument("--vocab-size", type=int, default=usual.vocab_size)
    parser.add_argument("--sequences", type=int, default=usual.sequences)
    parser.add_argument("--batch", type=int, default=usual.batch)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default=usual.precision)
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["padded", "packed"])
    parser.add_argument("--json", type=Path)
    given = vars(parser.parse_args(arguments))
    rounds, sides, path = given.pop("rounds"), given.pop("sides"), given.pop("json")
    job = PackingJob(**given)
    here = machine(torch.get_num_threads())
    figures = compare(job, sides, rounds)
    title = f"{job.size}, {job.vocab_size:,} tokens, {job.precision}, {job.batch} sequences a step"
    console = Console()
    console.print(machine_line(here), soft_wrap=True)
    console.print(table_of(figures, title))
    if path is not None:
        write_json(path, {"job": given, "machine": here, "figures": figures})


if __name__ == "__main__":
    main()
