"""What a student made of a base costs and gains: LoRA over NF4, LoRA alone, and all weights of the
base.

    python -m tools.studies.adapter STORE [--kinds llama,qwen2] [--workdir DIR] [--json FILE]
    python -m tools.studies.adapter STORE --rates 0.25,0.5,1,2,4 [--ways qlora]   # learning rates

STORE is a folder that ``distill capture`` has filled from the example teacher. The bases are made
by ``tools.models.make_base`` (DIR/KIND, used again where it is there). Every training has a process
of its own, the same data, batches and seed, and computes layers again in the backward pass;
``--set`` changes settings of all of them.

- qlora, lora: as ``distill run --student-base`` trains, with gates, heads and guard; in NF4, or the
  base as it is;
- full: all weights in float32, by the same loss of soft targets and labels, without gates, heads
  and guard.

KL is of validation, against the stored targets. Tokens per second: median of the steps. Memory: the
process's peak beyond what it had before the model was loaded, when a tiny model had been trained
already, so that code is not counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from distill.capture.ready_store import find_teacher, open_full_store, require_complete
from distill.errors import TrainingAborted, UserError
from distill.runtime.format import human_bytes, human_count
from distill.runtime.progress import Console as Stages
from teachers.atomic_files import StoreError
from tools.machine import machine, machine_line, write_json
from tools.models.make_base import Kind, make_base
from tools.studies.adapter_training import QLORA, USUAL_RATES, WAYS, Figures, Job, measure

KINDS: tuple[Kind, ...] = get_args(Kind)


def measure_apart(job: Job) -> Figures:
    """``measure`` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, job).result()


def prepare_base(folder: Path, kind: Kind) -> Path:
    """The base of this kind in ``folder``, made if it is not there."""
    path = folder / kind
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as name:
            make_base(Path(name) / kind, kind).replace(path)  # whole or not at all
    return path


# -- tables ---------------------------------------------------------------------------------------


def ways_table(result: Sequence[Figures]) -> Table:
    """A row for every kind and way; memory as ``Figures`` has it."""
    table = Table("kind", "way")
    for name in (
        "learning rate",
        "parameters",
        "trained",
        "share",
        "validation KL",
        "fall",
        "tokens/s",
    ):
        table.add_column(name, justify="right")
    for name in ("state", "peak", "of it beyond", "F32 file off by", "checkpoint"):
        table.add_column(name, justify="right")
    for one in result:
        exported = ("", "")
        if one.logit_difference is not None and one.checkpoint_bytes is not None:
            exported = (f"{one.logit_difference:.1e}", human_bytes(one.checkpoint_bytes))
        table.add_row(
            one.job.kind,
            one.job.way,
            f"{one.learning_rate:.2g}",
            human_count(one.parameters),
            human_count(one.trained),
            f"{one.trained / one.parameters:.1%}",
            f"{one.kl_before:.4f} → {one.kl_after:.4f}",
            f"{one.fall:.1%}",
            f"{one.tokens_per_second:,.0f}",
            *(human_bytes(size) for size in (one.state_bytes, one.peak_bytes)),
            human_bytes(one.peak_bytes - one.before_bytes),
            *exported,
        )
    return table


def rates_table(result: Sequence[Figures], rates: Sequence[float]) -> Table:
    """A row for every kind and way: the KL after training at each of the ``rates``, where it
    came to its end."""
    rates = sorted(rates)
    table = Table("kind", "way", *(f"× {rate:g}" for rate in rates), "best")
    for kind, way in dict.fromkeys((one.job.kind, one.job.way) for one in result):
        mine = {one.job.rate: one for one in result if (one.job.kind, one.job.way) == (kind, way)}
        best = min(mine, key=lambda rate: mine[rate].kl_after)
        cells = [f"{mine[rate].kl_after:.4f}" if rate in mine else "aborted" for rate in rates]
        table.add_row(kind, way, *cells, f"× {best:g} ({mine[best].learning_rate:.2g})")
    return table


# -- command line ---------------------------------------------------------------------------------


def jobs_of(
    store: Path, bases: dict[Kind, Path], ways: Sequence[str], rates: Sequence[float], **same: Any
) -> list[Job]:
    """Every kind in every way, at each of the ``rates`` or else at the way's own."""
    return [
        Job(str(store), str(base), kind, way, rate, **same)
        for kind, base in bases.items()
        for way in ways
        for rate in rates or [USUAL_RATES[way]]
    ]


def _check_store(folder: Path) -> None:
    """See that a store is whole, and of the teacher whose vocabulary the bases have.

    Raises:
        StoreError: it is not whole.
        UserError: it is of another teacher.
    """
    store, kept = open_full_store(folder)
    require_complete(store, Stages(quiet=True))
    if find_teacher(None, kept.info) is None:
        raise UserError(
            f"store {folder} is of {kept.info.name}; the bases have the example teacher's "
            "vocabulary: "
            "run `distill capture` without --teacher, and give its store"
        )


def _chosen(text: str, known: Sequence[str], option: str) -> list[Any]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(
            f"{option} {unknown[0]!r} is unknown; choose among {', '.join(known)}"
        )
    return names


def _multiples(text: str | None) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")] if text is not None else []
    except ValueError:
        rates = [0.0]
    if not all(0.0 < rate < float("inf") for rate in rates):
        raise typer.BadParameter(f"--rates {text!r}: give numbers above 0, such as 0.5,1,2")
    return rates


def main(
    store: Path,
    kinds: str = ",".join(KINDS),
    ways: Annotated[str | None, typer.Option(help="qlora,lora,full; with --rates qlora")] = None,
    rates: Annotated[
        str | None, typer.Option(help="learning rates to compare, times the usual one")
    ] = None,
    steps: Annotated[int, typer.Option(min=2)] = 200,
    batch: Annotated[int, typer.Option(min=1, help="sequences in a step")] = 16,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    workdir: Annotated[Path | None, typer.Option(help="where the bases are, or will be")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="figures as JSON")] = None,
) -> None:
    """Train a student of each kind of base in each way, and say what it cost and gained."""
    console = Console(width=190, highlight=False)
    multiples, chosen = _multiples(rates), _chosen(kinds, KINDS, "--kinds")
    chosen_ways = _chosen(ways or (QLORA if multiples else ",".join(WAYS)), WAYS, "--ways")
    disable_progress_bar()  # of writing a base
    about = machine(threads)
    console.print(machine_line(about))
    same = {"steps": steps, "batch": batch, "seed": seed, "threads": threads}
    result: list[Figures] = []
    with tempfile.TemporaryDirectory(prefix="bench-adapter-") as name:
        try:
            _check_store(store)
            bases = {kind: prepare_base(workdir or Path(name), kind) for kind in chosen}
            jobs = jobs_of(
                store, bases, chosen_ways, multiples, settings=tuple(settings or ()), **same
            )
            for job in jobs:
                try:
                    one = measure_apart(job)
                except TrainingAborted as error:  # such a rate is a result too
                    console.print(f"{job.kind} {job.way} × {job.rate:g}: {error}")
                    continue
                result.append(one)
                console.print(
                    f"{job.kind} {job.way} × {job.rate:g}: KL {one.kl_before:.4f} → "
                    f"{one.kl_after:.4f}"
                )
        except (UserError, StoreError) as error:
            raise typer.BadParameter(str(error)) from None
    if multiples:
        console.print(rates_table(result, multiples))
    console.print(ways_table(result))
    if output is not None:
        write_json(output, {"machine": about, "figures": [one.to_json() for one in result]})


if __name__ == "__main__":
    typer.run(main)
