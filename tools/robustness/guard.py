"""The guard, put to the test.

    python -m tools.robustness.guard faults STORE       every fault, with the guard and without
    python -m tools.robustness.guard healthy STORE …    sound trainings: how often it intervenes
    python -m tools.robustness.guard cost STORE            steps with and without it, in turns

STORE is a folder of soft targets (``distill capture``).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from distill.config.schema import TrainConfig
from distill.training.optimizer import peak_learning_rate
from tools.machine import machine, machine_line, write_json
from tools.robustness.faults import FAULTS
from tools.robustness.guarded_training import (
    CHECKPOINT,
    Job,
    Outcome,
    Times,
    run_job,
    timed,
    weighing_seconds,
)

CHECKPOINT_WORDS = "poisoned checkpoint on resume"
app = typer.Typer(add_completion=False, no_args_is_help=True)


def run_all(jobs: Sequence[Job], workers: int, console: Console) -> list[Outcome]:
    """Run trainings in several processes, with progress."""
    outcomes = []
    begin = time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for number, outcome in enumerate(pool.map(run_job, jobs), 1):
            outcomes.append(outcome)
            left = (time.monotonic() - begin) / number * (len(jobs) - number)
            if number % max(1, len(jobs) // 20) == 0:
                console.print(f"  {number}/{len(jobs)}, {left:.0f} s left")
    return outcomes


@app.command()
def faults(
    store: Path,
    seeds: int = 10,
    epochs: int = 6,
    size: str = "64x2",
    only: Annotated[list[str] | None, typer.Option()] = None,
    workers: int = 2,
    output: Path | None = None,
) -> None:
    """Every fault for every seed, with the guard and without, and the same training without a
    fault."""
    console = Console(width=160)
    console.print(machine_line(machine(workers)))
    width, layers = map(int, size.split("x"))
    chosen = only or [*FAULTS, CHECKPOINT]
    clean_jobs = [Job(str(store), (width, layers), seed, epochs) for seed in range(seeds)]
    jobs = clean_jobs + [replace(job, fault=name) for name in chosen for job in clean_jobs]
    jobs += [replace(job, guard=False) for job in jobs if job.fault not in (None, CHECKPOINT)]
    outcomes = run_all(jobs, workers, console)
    clean = {one.job.seed: one.kl for one in outcomes if one.job.fault is None}
    least, most, mean = min(clean.values()), max(clean.values()), statistics.fmean(clean.values())
    console.print(f"clean: validation KL {mean:.3f} ({least:.3f} to {most:.3f})")
    console.print(_fault_table(chosen, outcomes, clean))
    if output is not None:
        write_json(
            output, {"machine": machine(workers), "outcomes": [asdict(one) for one in outcomes]}
        )


def _fault_table(names: Iterable[str], outcomes: list[Outcome], clean: dict[int, float]) -> Table:
    table = Table(
        "fault",
        "detected",
        "steps until then",
        "named",
        "rolled back · skipped",
        "KL / clean",
        "without the guard",
    )
    for name in names:
        guarded = [one for one in outcomes if one.job.fault == name and one.job.guard]
        bare = [one for one in outcomes if one.job.fault == name and not one.job.guard]
        ratios = [
            one.kl / clean[one.job.seed] if one.ended == "finished" else math.inf for one in guarded
        ]
        lags = [one.lag for one in guarded if one.lag is not None]
        table.add_row(
            FAULTS[name].words if name in FAULTS else CHECKPOINT_WORDS,
            f"{len(lags)} of {len(guarded)}",
            f"{min(lags)}–{max(lags)}" if lags else "",
            f"{sum(bool(one.named) for one in guarded)}",
            f"{_count(guarded, 'rollback')} · {_count(guarded, 'skip_step')}",
            f"{statistics.fmean(ratios):.3f}, at most {max(ratios):.3f}",
            _without(bare, clean),
        )
    return table


def _count(outcomes: Iterable[Outcome], action: str) -> int:
    return sum(one.events.get(action, 0) for one in outcomes)


def _without(outcomes: list[Outcome], clean: dict[int, float]) -> str:
    if not outcomes:
        return "the same: the check is the checkpoint's"
    stopped = sum(one.ended != "finished" for one in outcomes)
    ratios = [one.kl / clean[one.job.seed] for one in outcomes if one.ended == "finished"]
    words = [f"{stopped} of {len(outcomes)} stop"] if stopped else []
    if ratios:
        words.append(f"KL × {statistics.median(ratios):.2f}, at most {max(ratios):.2f}")
    return "; ".join(words)


@app.command()
def healthy(
    stores: list[Path],
    size: str = "64x2",
    epochs: int = 6,
    seeds: int = 5,
    rates: str = "0.1,0.3,1,2,4",
    workers: int = 2,
    output: Path | None = None,
) -> None:
    """Trainings without a fault at several learning rates (times the usual one), with the guard
    and without."""
    console = Console(width=160)
    console.print(machine_line(machine(workers)))
    width, layers = map(int, size.split("x"))
    usual = peak_learning_rate(TrainConfig(), width)
    jobs = [
        Job(str(store), (width, layers), seed, epochs, None, guard, float(rate) * usual)
        for store in stores
        for rate in rates.split(",")
        for seed in range(seeds)
        for guard in (True, False)
    ]
    outcomes = run_all(jobs, workers, console)
    table = Table(
        "store",
        "learning rate",
        "runs",
        "validation KL",
        "rollbacks",
        "skipped",
        "clipped",
        "same bytes as without",
    )
    for store in stores:
        for rate in rates.split(","):
            mine = [
                one
                for one in outcomes
                if one.job.store == str(store) and one.job.rate == float(rate) * usual
            ]
            pairs = [(a, b) for a, b in zip(mine[::2], mine[1::2], strict=True)]
            quiet = [(a, b) for a, b in pairs if not a.events]
            counts = [
                sum(a.events.get(action, 0) for a, _ in pairs)
                for action in ("rollback", "skip_step", "clip")
            ]
            table.add_row(
                store.name,
                f"{rate} × {usual:.2g}",
                str(len(pairs)),
                f"{min(a.kl for a, _ in pairs):.3f}–{max(a.kl for a, _ in pairs):.3f}",
                *map(str, counts),
                f"{sum(a.weights == b.weights for a, b in quiet)} of {len(quiet)} without an event",
            )
    console.print(table)
    if output is not None:
        write_json(
            output, {"machine": machine(workers), "outcomes": [asdict(one) for one in outcomes]}
        )


@app.command()
def cost(
    store: Path,
    size: str = "128x3",
    steps: int = 100,
    batch: int = 16,
    rounds: int = 5,
    threads: int = 2,
) -> None:
    """The same steps with the guard and without, in turns, in one process; the first round is not
    counted.

    The last line is the steadiest: only what differs is timed, from the gradient to the stepped
    weights, against the whole step. Processor time does not mind other programs on the machine, and
    says most with ``--threads 1``.
    """
    console = Console(width=120)
    console.print(machine_line(machine(threads)))
    torch.set_num_threads(threads)
    width, layers = map(int, size.split("x"))
    times: dict[bool, list[Times]] = {True: [], False: []}
    for turn in range(rounds + 1):
        for guard in (True, False) if turn % 2 else (False, True):
            seconds = timed(Job(str(store), (width, layers), 0, 1, guard=guard), steps, batch)
            if turn:
                times[guard].append(seconds)
    console.print(f"{size}, {steps} steps of {batch} sequences, {rounds} rounds")
    for kind, name in (("wall", "by the clock"), ("processor", "processor time")):
        result = {guard: [getattr(one, kind) for one in many] for guard, many in times.items()}
        ratios = sorted(on / off for on, off in zip(result[True], result[False], strict=True))
        middle = {guard: statistics.median(many) / steps * 1000 for guard, many in result.items()}
        console.print(
            f"  {name}: {middle[False]:.1f} ms a step without the guard, {middle[True]:.1f} ms "
            "with it; "
            f"ratio {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )
    more = sorted(on.update - off.update for on, off in zip(times[True], times[False], strict=True))
    whole = statistics.median(one.wall for one in times[False])
    middle_more = statistics.median(more)
    console.print(
        f"  from gradient to stepped weights: {middle_more / steps * 1000:.2f} ms a step more with "
        "the guard, "
        f"{middle_more / whole:.2%} of a step ({more[0] / whole:.2%} to {more[-1] / whole:.2%})"
    )
    deep = weighing_seconds(Job(str(store), (width, layers), 0, 1))
    console.print(
        f"  deep figures of all weights, at each evaluation: {deep * 1000:.0f} ms, as much as "
        f"{deep / (whole / steps):.1f} steps"
    )


if __name__ == "__main__":
    app()
