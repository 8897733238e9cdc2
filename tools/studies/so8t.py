"""What the SO(8) gates, the terms of the group structure and the two heads do, and what they cost.

    python -m tools.studies.so8t ablation --json FILE.jsonl [--samples 1024] [--epochs 4] [--seeds
    0,1,2] [--only 'no-*'] python -m tools.studies.so8t cost --json FILE.json [--large-size 512x4]
    [--size 128x3]

**ablation** trains the same student again and again on one store of the example teacher (which
speaks; captured once), with one thing changed. It begins at random weights with the teacher's token
embeddings. For equal seed all variants have the same initial weights and order of data; all seeds
have the same validation sequences. ``no-gates``: both rotations of every gate are exactly the
identity and stay so (their parameters are zeroed and frozen), without the terms of the group
structure; what the gates alone do is its difference from ``no-terms`` (λ_so8t = 0, gates trained).
``10x-…``: does a term do anything when it is strong?

KL, agreement and all figures are of the last step's weights. Stability figures begin after the
warm-up: ``largest rise`` and ``spikes`` (steps more than 3 robust deviations above the median of
the 32 steps before) are of kd + ce, which all variants have in common (those of the whole loss are
in the file); the gradient norm is the student's before clipping, without the heads', its spread the
standard deviation over the mean. Effective rank (Roy & Vetterli 2007) and second difference are of
the final hidden states of validation sequences. Heads are calibrated and scored in PyTorch as a run
does: on safety prompts of other scenarios, on halves of the validation sequences. Verdict: mean
difference in KL from ``full`` seed by seed, in standard deviations of KL over seeds (pooled over
the two variants). Each result is a line of the file as soon as it is there; a rerun does only what
is missing.

**cost** times training steps on the CPU, in turns in one process, as the training loop takes them
(forward, backward, clipping and optimizer, and the figures of the rotations that are logged):
``plain`` has W_o without a gate, no terms, no heads; ``plain again`` is a second one like it and
shows the noise; ``gates`` has gates and terms; ``heads`` both heads and the safety prompts too.
Ratios are of the steps of one round, their median and quartiles. Then the speed of two exported
files in llama.cpp, with everything folded and of a plain student, in turns.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console as RichConsole

from distill.capture.ready_store import find_teacher
from distill.config.loading import load_config
from distill.config.schema import RunConfig
from distill.errors import UserError
from distill.heads.prompts import read_safety_prompts
from distill.heads.safety_data import SafetyData, safety_data
from distill.initialization.shape import student_shape
from distill.pipeline.capture import capture_only
from distill.pipeline.resolve import resolve
from distill.runtime.progress import Console
from distill.training.data import TrainingData, load_batch, split
from students.model.build import student_config
from students.model.shape import parse_size
from teachers.atomic_files import StoreError
from teachers.store.store import SoftTargetStore
from teachers.store.teacher_record import TeacherRecord, require_teacher_record
from tools.bench.so8t_cost import CostJob, cost_tables, measure_files, measure_steps
from tools.bench.step import StepJob, make_material
from tools.machine import machine, machine_line, write_json
from tools.studies.objectives import SPLIT_SEED, chosen_rows
from tools.studies.results import Results, run_missing
from tools.studies.so8t_ablation import Ablation, ablation_tables, all_variants


@dataclass(frozen=True)
class Material:
    """The store of the example teacher with what it keeps of it, and the safety prompts in its
    tokens."""

    run: RunConfig
    store: SoftTargetStore
    kept: TeacherRecord
    safety: SafetyData | None


def open_material(options: argparse.Namespace) -> Material:
    """Capture what is missing of the store.

    Raises:
        UserError, StoreError: a setting or the folder cannot be used.
    """
    wanted = {"student.size": options.size, "data.samples": options.samples}
    wanted |= {key: getattr(options, name, None) for key, name in TRAINING.items()}
    run = load_config(None, wanted, options.set, options.preset)
    console = Console()
    store = capture_only(run, options.store, console)
    kept = require_teacher_record(store)
    return Material(
        run, store, kept, safety_data(run, read_safety_prompts(run), kept.tokenizer, kept.info)
    )


def open_ablation(options: argparse.Namespace) -> Ablation:
    """What all variants share.

    Raises:
        UserError, StoreError: see ``open_material``.
    """
    some = open_material(options)
    info = some.kept.info
    gguf = find_teacher(None, info)
    run = resolve(some.run, info, some.kept.tokenizer, gguf, Console()).config
    data = TrainingData(some.store, split(some.store, run.data.held_out, SPLIT_SEED), SPLIT_SEED)
    beginnings = Path(tempfile.mkdtemp(prefix="bench-so8t-"))
    return Ablation(
        data, some.kept, options.size, run.train, run, some.kept, some.safety, beginnings
    )


def ablation(options: argparse.Namespace, console: RichConsole) -> None:
    """Train what is missing, show everything."""
    seeds = [int(seed) for seed in options.seeds.split(",")]
    bench = open_ablation(options)
    every = all_variants(bench.run.loss)
    chosen = {row.name for row in chosen_rows(every, options.only)}
    variants = [variant for variant in every if variant.name in chosen]
    results = Results(options.json, bench.settings())
    results.write({"machine": machine(torch.get_num_threads())})
    run_missing(bench, variants, seeds, results, console.print)
    lengths, held_out = bench.data.store.lengths(), bench.data.split.held_out
    console.print(
        f"{options.size}, {bench.config.epochs} epochs, seeds {options.seeds}, "
        f"{int((lengths[held_out] - 1).sum()):,} positions of {len(held_out)} validation sequences"
    )
    for table in ablation_tables(every[0], variants, seeds, results):
        console.print(table)


def cost_jobs(options: argparse.Namespace, some: Material) -> list[CostJob]:
    """The two sizes with what they learn from; the larger one has a made-up vocabulary and
    random text."""
    if some.safety is None:
        raise UserError(
            "cost needs the safety prompts; leave safety.labels and loss.lambda_safety as they are"
        )
    made_up = StepJob(
        size=options.large_size,
        batch=options.batch,
        tokens=options.tokens,
        vocab_size=options.vocab,
        teacher_width=options.teacher_width,
    )
    large = student_config(
        parse_size(made_up.size), vocab_size=made_up.vocab_size, context_length=made_up.tokens
    )
    parts = split(some.store, some.run.data.held_out, SPLIT_SEED)
    order = TrainingData(some.store, parts, SPLIT_SEED).batches(1, some.run.train.batch_size)
    batches = [load_batch(some.store, indices) for indices in order]
    words = f"V = {made_up.vocab_size:,}, {made_up.batch} × {made_up.tokens} tokens"
    return [
        CostJob(
            f"{made_up.size}, {words}",
            large,
            [make_material(made_up)[0]],
            some.safety.train,
            some.run,
            options.steps,
        ),
        CostJob(
            f"{options.size}, the example teacher's store",
            student_shape(some.run, some.kept.info),
            batches,
            some.safety.train,
            some.run,
            options.steps,
        ),
    ]


def cost(options: argparse.Namespace, console: RichConsole) -> None:
    """Time both sizes' steps and files, show and write everything."""
    here = machine(torch.get_num_threads())
    jobs = cost_jobs(options, open_material(options))
    result: dict[str, Any] = {"steps": [], "files": []}
    for job in jobs:
        result["steps"].append(measure_steps(job, options.rounds, options.warmup))
    for job in jobs:
        with tempfile.TemporaryDirectory(prefix="bench-so8t-") as name:
            result["files"].append(
                measure_files(job.title, job.shape, Path(name), options.quant, options.speed_rounds)
            )
    for table in cost_tables(result):
        console.print(table)
    if options.json:
        write_json(
            options.json,
            {"machine": here, "settings": jobs[0].run.model_dump(mode="json"), **result},
        )


TRAINING = {
    "data.held_out": "held_out",
    "data.max_length": "max_length",
    "train.epochs": "epochs",
    "train.evaluations": "evaluations",
}


def command_line() -> argparse.ArgumentParser:
    """The two sub-commands."""
    shape: Any = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument(
        "--size", default="128x3", help="student of the example teacher, WIDTHxLAYERS"
    )
    both.add_argument("--max-length", type=int, help="tokens of a sequence at most")
    both.add_argument("--store", type=Path, help="folder of the store (default: under runs/stores)")
    both.add_argument("--preset", default="recommended", choices=("recommended", "formula"))
    both.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any setting of a run"
    )
    both.add_argument("--threads", type=int, help="of PyTorch and llama.cpp")
    both.add_argument(
        "--json", type=Path, help="file of results (ablation: one a line, continued if there)"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    trains = commands.add_parser("ablation", parents=[both], help="what each part does; resumable")
    trains.add_argument(
        "--samples", type=int, default=1024, help="sequences that the teacher speaks"
    )
    trains.add_argument("--epochs", type=int, default=4)
    trains.add_argument("--evaluations", type=int, default=2)
    trains.add_argument("--held-out", type=float, default=0.1, help="share of the sequences")
    trains.add_argument("--seeds", default="0,1,2")
    trains.add_argument("--only", help="names of variants, with * and ?, separated by commas")
    times = commands.add_parser(
        "cost", parents=[both], help="seconds of a step, speed of the exported file"
    )
    times.add_argument("--samples", type=int, default=256, help="sequences that the teacher speaks")
    usual = StepJob(size="512x4", batch=16, tokens=256, vocab_size=32000, teacher_width=256)
    times.add_argument("--large-size", default=usual.size, help="student of a made-up vocabulary")
    times.add_argument(
        "--batch", type=int, default=usual.batch, help="sequences of a step of that student"
    )
    times.add_argument("--tokens", type=int, default=usual.tokens, help="tokens of each of them")
    times.add_argument("--vocab", type=int, default=usual.vocab_size)
    times.add_argument("--teacher-width", type=int, default=usual.teacher_width)
    times.add_argument(
        "--rounds", type=int, default=6, help="rounds that count, of some steps of each side"
    )
    times.add_argument(
        "--steps", type=int, default=2000, help="of the training that the steps stand for"
    )
    times.add_argument("--warmup", type=int, default=1, help="rounds before that do not")
    times.add_argument("--speed-rounds", type=int, default=10, help="of both exported files")
    times.add_argument("--quant", default="q8_0", choices=("f32", "f16", "q8_0"))
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and measure."""
    parser = command_line()
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = RichConsole(width=170, highlight=False)
    console.print(machine_line(machine(torch.get_num_threads())))
    try:
        ablation(options, console) if options.command == "ablation" else cost(options, console)
    except (UserError, StoreError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
