"""Where a student begins, compared at equal training tokens: random weights, the teacher's
embeddings, a head start.

    distill capture --teacher T.gguf --data text.txt --store STORE python -m
    tools.studies.initialization STORE T.gguf --size 128x3 --tokens 200000 [--seeds 0,1] [--rates
    1,0.5,0.25]

Every row trains the same shape on the same batches with the same schedule, drawn out over exactly
as many tokens, with the same validation sequences. ``random``: all weights random; ``embeddings``:
random but for the token embeddings; ``teacher``: ``distill.initialization.from_teacher``, at each
of ``--rates`` times the usual peak learning rate, the others at the usual. ``--betas``: shares of
cross-entropy in the loss. KL is per token on the validation sequences at T = 1, before training and
after each part of it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console as RichConsole
from rich.table import Table

from distill.capture.ready_store import open_full_store, require_complete
from distill.config.schema import LossConfig, RunConfig, TrainConfig
from distill.config.sources import StudentConfig
from distill.errors import UserError
from distill.initialization.from_teacher import student_from_teacher
from distill.initialization.shape import new_student, student_shape
from distill.losses.objective import build_objective
from distill.runtime.progress import Console
from distill.training.data import TrainingData, split
from distill.training.engine import TrainingJob, train
from distill.training.optimizer import peak_learning_rate
from distill.training.summary import TrainingSummary
from students.model.build import build_student
from students.model.config import SO8TConfig
from students.model.decoder import SO8TForCausalLM
from teachers.atomic_files import StoreError
from teachers.gguf.file import GGUFFile, TeacherFileError, read_gguf
from teachers.store.teacher_record import TeacherRecord
from tools.machine import machine, machine_line

SPLIT_SEED = 0
BEGINNINGS = ("random", "embeddings", "teacher")


@dataclass(frozen=True)
class ShortData(TrainingData):
    """Training data that ends once ``tokens`` have been learnt from."""

    tokens: int = 0

    def batches(self, epochs: int, batch_size: int) -> list[list[int]]:
        """Whole batches with ``tokens`` tokens together, or a few more; as many epochs as that
        takes."""
        lengths, chosen, total = self.store.lengths(), list[list[int]](), 0
        each = int((lengths[self.split.train] - 1).sum())
        for batch in super().batches(-(-self.tokens // each), batch_size):
            if total >= self.tokens:
                break
            chosen.append(batch)
            total += int((lengths[batch] - 1).sum())
        return chosen


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    data: ShortData
    teacher_record: TeacherRecord
    file: GGUFFile
    shape: SO8TConfig
    train: TrainConfig

    def beginning(self, name: str, seed: int) -> SO8TForCausalLM:
        """A student before training."""
        if name == "random":
            return build_student(self.shape, seed)
        if name == "embeddings":
            return new_student(self.shape, seed, self.teacher_record.embeddings)
        sequences = [self.data.store.tokens(int(index)) for index in self.data.split.train]
        return student_from_teacher(
            self.shape, self.file, sequences, seed, lambda done, words: None
        )

    def measure(
        self, beginning: SO8TForCausalLM, factor: float, seed: int, beta: float
    ) -> TrainingSummary:
        """Train a copy of a student; what came of it. ``beta``: the share of cross-entropy."""
        student = copy.deepcopy(beginning)
        rate = factor * peak_learning_rate(self.train, self.shape.hidden_size)
        heads = {"lambda_safety": 0.0, "lambda_verification": 0.0}
        weights = {"alpha": 1.0 - beta, "beta": beta}
        loss = LossConfig.model_validate({"temperature": 1.0, **weights, **heads})
        layers = self.teacher_record.info.layers
        objective = build_objective(loss, self.data.store, student, layers)
        config = self.train.model_copy(update={"learning_rate": rate})
        data = replace(self.data, seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            job = TrainingJob(student, data, objective, config, Path(folder))
            return train(job, lambda step, text: None)


def open_bench(options: argparse.Namespace) -> Bench:
    """The store, proved to be complete, and its teacher.

    Raises:
        StoreError, UserError, TeacherFileError, ValueError: one of them or a setting cannot be
        used.
    """
    store, teacher_record = open_full_store(options.store)
    require_complete(store, Console())
    student = StudentConfig(size=options.size, tie_embeddings=not options.untied)
    shape = student_shape(RunConfig(student=student), teacher_record.info)
    data = ShortData(store, split(store, 0.03, SPLIT_SEED), SPLIT_SEED, tokens=options.tokens)
    config = TrainConfig.model_validate(
        {
            "evaluations": options.evaluations,
            "precision": options.precision,
            "batch_size": options.batch_size,
        }
    )
    return Bench(data, teacher_record, read_gguf(options.teacher), shape, config)


def read_options() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path, help="folder that `distill capture` has filled")
    parser.add_argument("teacher", type=Path, help="GGUF file of its teacher")
    parser.add_argument("--size", default="128x3")
    parser.add_argument("--untied", action="store_true", help="an output matrix of its own")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--evaluations", type=int, default=5)
    parser.add_argument("--seeds", default="0")
    parser.add_argument(
        "--rates", default="1,0.5,0.25", help="of a head start, as shares of the usual peak"
    )
    parser.add_argument("--only", default=",".join(BEGINNINGS))
    parser.add_argument(
        "--betas", default="0.3", help="shares of cross-entropy in the loss, beside the KL"
    )
    parser.add_argument("--precision", default="fp32", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--batch-size", type=int, default=TrainConfig().batch_size)
    parser.add_argument("--json", type=Path, help="file that gets a line for each row")
    return parser, parser.parse_args()


def main() -> None:
    """Parse the command line, train every row, show the table."""
    parser, options = read_options()
    console = RichConsole(width=160, highlight=False)
    try:
        bench = open_bench(options)
        rates = [float(rate) for rate in options.rates.split(",")]
        betas = [float(beta) for beta in options.betas.split(",")]
    except (UserError, StoreError, TeacherFileError, ValueError) as error:
        parser.error(str(error))
    console.print(machine_line(machine(torch.get_num_threads())))
    table: Table | None = None
    for seed, name in itertools.product(
        map(int, options.seeds.split(",")), options.only.split(",")
    ):
        begin = time.perf_counter()
        beginning = bench.beginning(name, seed)
        seconds = time.perf_counter() - begin
        own_rates = rates if name == "teacher" else [1.0]
        for rate, beta in itertools.product(own_rates, betas):
            summary = bench.measure(beginning, rate, seed, beta)
            scores = dict(summary.scores)
            share = summary.tokens_seen / summary.steps
            if table is None:
                after = [f"KL at {step * share:,.0f}" for step in scores]
                table = Table(
                    "beginning", "rate", "β", "seed", *after, "agreement", "begins in", "trains in"
                )
            kl = [score.kl for score in scores.values()]
            agreement = scores[summary.steps].agreement
            table.add_row(
                name,
                f"{rate:g}",
                f"{beta:g}",
                str(seed),
                *(f"{value:.4f}" for value in kl),
                f"{agreement:.1%}",
                f"{seconds:.1f} s",
                f"{summary.seconds:.0f} s",
            )
            console.print(
                f"{name} at {rate:g} of the usual rate, β {beta:g}, seed {seed}: "
                f"KL {kl[0]:.4f} → {kl[-1]:.4f}, same top token {agreement:.1%}"
            )
            if options.json:
                line = {
                    "size": options.size,
                    "beginning": name,
                    "rate": rate,
                    "beta": beta,
                    "seed": seed,
                    "kl": kl,
                    "steps": list(scores),
                    "tokens": summary.tokens_seen,
                    "agreement": agreement,
                    "begin_seconds": seconds,
                    "train_seconds": summary.seconds,
                }
                with options.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    if table is not None:
        console.print(table)


if __name__ == "__main__":
    main()
