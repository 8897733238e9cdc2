"""The recipe by measurement: one student on one store, and what a change of settings does to it.

    distill capture --teacher T.gguf --data text.txt --store STORE
    python -m tools.studies.recipe STORE T.gguf --student-size 25% --tokens 270000 --seeds 0,1,2 \\
      --vary loss.divergence=reverse_kl --vary 'train.batch_size=8 rate=0.7' --vary text=90000

The first row, ``usual``, is what ``distill run`` does with the store, the settings of ``--set`` and
as many steps as ``--tokens`` take; every ``--vary`` is a row that differs from it by one or more of

- ``section.key=value``: a setting of ``train`` or ``loss`` (``--set`` takes those of the student's
  shape, too);
- ``rate=F``: F times the peak learning rate that a run would choose;
- ``text=N``: only so many tokens of distinct text, learnt from again and again;
- ``begin=embeddings`` or ``random``: first weights that know only the teacher's token embeddings,
  or nothing, in place of those fitted to the teacher.

All rows of a seed begin with the same weights (but for ``begin``), see the same text in the same
order (but for ``text`` and the size of a step), and are scored on the same validation sequences,
which are the same for all seeds. KL is in nats per token at T = 1, over the stored tokens and the
rest as one; "over all" is over the whole vocabulary, as far as the stored targets know the tail.
Each result is a line of the JSON file as soon as it is there; a rerun does only what is missing.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console as RichConsole
from rich.table import Table

from distill.capture.ready_store import find_teacher, open_full_store, require_complete
from distill.config.loading import load_config
from distill.config.schema import RunConfig
from distill.errors import TrainingAborted, UserError
from distill.initialization.from_teacher import require_usable_weights, student_from_teacher
from distill.initialization.shape import new_student, student_shape
from distill.losses.hidden_states import pair_layers
from distill.losses.objective import build_objective
from distill.pipeline.stages import INITIALIZATION_SEQUENCES
from distill.runtime.progress import Console
from distill.training.data import TrainingData, split
from distill.training.engine import TrainingJob, train
from distill.training.optimizer import initial_learning_rate
from students.model.build import build_student
from students.model.decoder import SO8TForCausalLM
from students.model.interface import Student
from teachers.atomic_files import StoreError
from teachers.gguf.file import GGUFFile, TeacherFileError, read_gguf
from teachers.store.teacher_record import TeacherRecord
from tools.machine import machine, machine_line
from tools.studies.objectives import SPLIT_SEED, take_last_weights, whole_vocabulary_kl
from tools.studies.results import Results, run_missing, spread

BEGINNINGS = ("teacher", "embeddings", "random")
# Settings of these sections make a row; of ``student`` they are for all rows.
SECTIONS = ("train", "loss")
# What this tool decides itself, or does not do.
DECIDED = (
    "train.epochs",
    "train.steps",
    "train.batch_tokens",
    "train.learning_rate",
    "train.on_policy",
    "student.init",
    "student.base",
    "student.vocab",
)


@dataclass(frozen=True)
class ShortData(TrainingData):
    """Training data that ends once ``tokens`` have been learnt from, of the first ``text`` tokens
    of it alone, if that is not 0."""

    tokens: int = 0
    text: int = 0

    def batches(self, epochs: int, batch_size: int) -> list[list[int]]:
        """Whole batches with ``tokens`` tokens together, or a few more; as many epochs as that
        takes."""
        lengths, chosen, total = self.store.lengths() - 1, list[list[int]](), 0
        known, some = self.split.train, TrainingData(self.store, self.split, self.seed)
        if self.text:
            few = max(1, int((np.cumsum(lengths[known]) <= self.text).sum()))
            some = replace(some, split=replace(self.split, train=known[:few]))
        each = int(lengths[some.split.train].sum())
        for batch in some.batches(-(-self.tokens // each), batch_size):
            if total >= self.tokens:
                break
            chosen.append(batch)
            total += int(lengths[batch].sum())
        return chosen


@dataclass(frozen=True)
class Recipe:
    """A row: settings, and what is no setting (see the module)."""

    name: str
    config: RunConfig
    rate: float = 1.0
    text: int = 0
    begin: str = BEGINNINGS[0]

    def identity(self) -> dict[str, Any]:
        """See ``StudyRow``."""
        settings = {part: getattr(self.config, part) for part in SECTIONS}
        written = {part: value.model_dump(mode="json") for part, value in settings.items()}
        return written | {"rate": self.rate, "text": self.text, "begin": self.begin}


def recipe(name: str, settings: Sequence[str], size: str) -> Recipe:
    """The row that some ``key=value`` describe.

    Raises:
        UserError: an unknown key, one that would change nothing here, or a value out of range.
    """
    plain = [one for one in settings if "." in one.partition("=")[0]]
    other = dict(one.partition("=")[::2] for one in settings if one not in plain)
    for key in (one.partition("=")[0] for one in plain):
        if key in DECIDED or key.partition(".")[0] not in (*SECTIONS, "student"):
            raise UserError(f"{name}: {key} changes nothing here; see --help")
    usual = {"student.size": size, "safety.labels": "none", "train.evaluations": 2}
    config = load_config(None, usual, plain)
    try:
        rate, text = float(other.pop("rate", 1.0)), int(other.pop("text", 0))
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    begin = other.pop("begin", BEGINNINGS[0])
    if other or begin not in BEGINNINGS or not 0 < rate < math.inf or text < 0:
        raise UserError(
            f"{name}: write section.key=value, rate=F, text=N or begin={'|'.join(BEGINNINGS)}"
        )
    return Recipe(name, config, rate, text, begin)


def varied(setting: str, common: Sequence[str], size: str) -> Recipe:
    """The row of a ``--vary``.

    Raises:
        UserError: as ``recipe``; or it is of the student's shape, which all rows share.
    """
    own = setting.split()
    if any(one.startswith("student.") for one in own):
        raise UserError(f"{setting}: all rows train one student; give it to --set")
    return recipe(setting, [*common, *own], size)


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    data: ShortData
    teacher_record: TeacherRecord
    file: GGUFFile
    usual: Recipe
    begun: dict[tuple[str, int], Student] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """What a result depends on besides its row and seed."""
        return {
            "store": self.data.store.manifest.key,
            "held_out": len(self.data.split.held_out),
            "tokens": self.data.tokens,
            "student": self.usual.config.student.model_dump(mode="json"),
        }

    def beginning(self, begin: str, seed: int) -> SO8TForCausalLM:
        """A student before training."""
        if (begin, seed) not in self.begun:
            for key in [key for key in self.begun if key[1] != seed]:  # which is done
                del self.begun[key]
            self.begun[begin, seed] = self._begin(begin, seed)
        student = copy.deepcopy(self.begun[begin, seed])
        assert isinstance(student, SO8TForCausalLM)
        return student

    def _begin(self, begin: str, seed: int) -> Student:
        shape = student_shape(self.usual.config, self.teacher_record.info)
        if begin == "random":
            return build_student(shape, seed)
        if begin == "embeddings":
            return new_student(shape, seed, self.teacher_record.embeddings)
        known = self.data.split.train
        count = min(len(known), INITIALIZATION_SEQUENCES)
        some = known[np.linspace(0, len(known) - 1, count).astype(int)]
        sequences = [self.data.store.tokens(int(index)) for index in some]
        return student_from_teacher(shape, self.file, sequences, seed, lambda done, words: None)

    def measure(self, row: Recipe, seed: int) -> dict[str, Any]:
        """Train one student; what came of it."""
        student, train_config = self.beginning(row.begin, seed), row.config.train
        data = replace(self.data, seed=seed, text=row.text)
        steps = len(data.batches(1, train_config.batch_size))
        cpu = torch.device("cpu")
        validation = data.held_out(train_config.batch_size, cpu, student.packs)
        init = "teacher" if row.begin == "teacher" else "random"
        rate = row.rate * initial_learning_rate(train_config, student, init, validation, steps)
        config = train_config.model_copy(update={"learning_rate": rate})
        layers = self.teacher_record.info.layers
        objective = build_objective(row.config.loss, data.store, student, layers)
        with tempfile.TemporaryDirectory() as folder:
            job = TrainingJob(student, data, objective, config, Path(folder))
            try:
                summary = train(job, lambda step, text: None)
            except TrainingAborted as error:
                return {"failed": str(error)}
            take_last_weights(student, Path(folder))
        (_, before), (_, last) = summary.scores[0], summary.scores[-1]
        return {
            **vars(last),
            "kl_before": before.kl,
            "kl_over_all": whole_vocabulary_kl(student, data.held_out(1, student.device)),
            "peak_rate": rate,
            "optimizer": summary.optimizer,
            "precision": summary.precision,
            "steps": summary.steps,
            "tokens": summary.tokens_seen,
            "seconds": round(summary.seconds, 2),
        }


def results_table(rows: Sequence[Recipe], seeds: Sequence[int], results: Results) -> Table:
    """A line for each row, with how its KL differs from the first row's, seed by seed."""
    table = Table("recipe", "steps", "KL", "against usual", "KL over all", "same top token", "s")
    usual = {seed: results.find(rows[0], seed) for seed in seeds}
    for row in rows:
        lines = {seed: line for seed in seeds if (line := results.find(row, seed))}
        good = {seed: line for seed, line in lines.items() if "failed" not in line}
        for seed, line in lines.items():
            if seed not in good:
                table.add_row(row.name, f"seed {seed} failed: {line['failed']}")
        if not good:
            continue
        both = [seed for seed in good if "kl" in (usual[seed] or {})]
        differences = [good[seed]["kl"] / (usual[seed] or {})["kl"] - 1.0 for seed in both]
        over_all = [line["kl_over_all"] for line in good.values() if line["kl_over_all"]]
        table.add_row(
            row.name,
            f"{statistics.fmean(line['steps'] for line in good.values()):.0f}",
            spread([line["kl"] for line in good.values()]),
            " ".join(f"{value:+.1%}" for value in differences),
            spread(over_all) if over_all else "not known",
            spread([100.0 * line["agreement"] for line in good.values()], 1) + " %",
            f"{statistics.fmean(line['seconds'] for line in good.values()):.0f}",
        )
    return table


def open_bench(options: argparse.Namespace) -> tuple[Bench, list[Recipe]]:
    """The store, proved to be complete, its teacher, and the rows.

    Raises:
        StoreError, UserError, TeacherFileError, ValueError: one of them or a setting cannot be
        used, or they do not belong together.
    """
    size, settings = options.student_size, options.set
    rows = [recipe("usual", settings, size)]
    rows += [varied(one, settings, size) for one in options.vary]
    store, teacher_record = open_full_store(options.store)
    require_complete(store, Console())
    file = read_gguf(find_teacher(str(options.teacher), teacher_record.info) or options.teacher)
    shape = student_shape(rows[0].config, teacher_record.info)
    if any(row.begin == BEGINNINGS[0] for row in rows):
        require_usable_weights(shape, file)
    for row in rows:
        if row.config.loss.gamma and store.manifest.recipe.layers:
            layers = store.manifest.recipe.layers, shape.num_hidden_layers
            pair_layers(row.config.loss.layer_map, *layers, teacher_record.info.layers)
        elif "loss.gamma" in row.name:
            raise UserError(f"{row.name}: the store holds no layers; capture with targets.layers")
    parts = split(store, rows[0].config.data.held_out, SPLIT_SEED)
    data = ShortData(store, parts, SPLIT_SEED, tokens=options.tokens)
    return Bench(data, teacher_record, file, rows[0]), rows


def read_options() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path, help="folder that `distill capture` has filled")
    parser.add_argument("teacher", type=Path, help="GGUF file of its teacher")
    parser.add_argument("--student-size", default="128x3")
    parser.add_argument("--tokens", type=int, default=200_000, help="that each row learns from")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--set", action="append", default=[], help="a setting of all rows")
    parser.add_argument("--vary", action="append", default=[], help="settings of one more row")
    parser.add_argument(
        "--json", type=Path, help="file of results, one a line; continued where it is there"
    )
    return parser, parser.parse_args()


def main() -> None:
    """Parse the command line, train what is missing, show everything."""
    parser, options = read_options()
    console = RichConsole(width=160, highlight=False)
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
        if min(seeds) < 0 or options.tokens < 1:
            parser.error("--seeds and --tokens are numbers from 0 and from 1")
        if options.json and not options.json.absolute().parent.is_dir():
            parser.error(f"--json {options.json}: there is no such folder")
        bench, rows = open_bench(options)
    except (UserError, StoreError, TeacherFileError, ValueError) as error:
        parser.error(str(error))
    here = machine(torch.get_num_threads())
    results = Results(options.json, bench.settings())
    results.write({"machine": here})
    run_missing(bench, rows, seeds, results, console.print)
    console.print(machine_line(here))
    console.print(results_table(rows, seeds, results))


if __name__ == "__main__":
    main()
