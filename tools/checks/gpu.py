"""What this project does on your own GPU, in ten minutes at the most.

    python -m tools.checks.gpu [--json FILE]

Four checks, each in a process and with a time limit of its own; one that fails or takes too long
does not stop the others.

- demo: the example teacher becomes a student on the GPU, which is proved as always.
- base: a student made of a base of Phi-3.5-mini's shape (random weights, NF4, as many layers as
  there is time for) takes a training step at 512 tokens, within 12 GB and what was estimated.
- step: a new student of half a billion parameters: tokens a second, and what share of the rate of
  one large matrix product that is.
- capture: soft targets with all layers of the teacher on the GPU, against bare ``llama_decode``.

It ends with one table, and exit code 0, 1 (a check failed) or 2 (there is no CUDA device).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from distill.base_models.base_model import load_base_student, open_base
from distill.base_models.memory_advice import how_to_fit
from distill.base_models.memory_estimate import memory_of, settings_of
from distill.base_models.new_student_memory import estimate_new
from distill.commands.exit_codes import EXIT_OURS, EXIT_USER
from distill.config.loading import load_config
from distill.config.schema import RunConfig
from distill.pipeline.probes import step_seconds
from distill.pipeline.run import run
from distill.runs.folder import RunPaths
from distill.runtime.device import device_memory
from distill.runtime.progress import Console as RunConsole
from teachers.gguf.file import read_gguf, tokenizer_fields
from tools.bench.capture import BARE, capture_seconds
from tools.bench.step import StepJob, Trainee, make_material, our_loss
from tools.machine import (
    child_command,
    child_environment,
    machine,
    machine_line,
    peak_memory,
    write_json,
)
from tools.models.make_base import make_large
from tools.models.random_teacher import Shape, write

GPU_BYTES = 12_000_000_000
ESTIMATE_OFF = 0.15  # of the measured peak, that an estimate may be below it
STEPS = 5
HALF_A_BILLION = StepJob(size="1536x16", device="cuda")
TEACHER = Shape(width=1024, layers=8, feed_forward=2816, heads=16)
PRODUCT_ROWS = 8192  # of the square matrices whose product's rate counts as the device's

Figures = dict[str, float | str]
"""What a check found, by name; sizes in bytes, times in seconds."""


class CheckFailed(Exception):
    """What a check found is not as it ought to be; says what."""


@dataclass(frozen=True)
class Sizes:
    """How much is done: ``demo``: settings of the run; ``base_width``, at most ``base_layers``, as
    many as are written in ``base_seconds``, of ``length`` tokens; ``teacher``: of the base and of
    the capture."""

    demo: tuple[str, ...] = ("student.size=128x3", "data.samples=2048", "train.epochs=4")
    gpu_layers: int = -1
    base_width: int = 3072
    base_layers: int = 32
    base_seconds: float = 60.0
    four_bits: bool = True
    length: int = 512
    step: StepJob = HALF_A_BILLION
    product_rows: int = PRODUCT_ROWS
    teacher: Shape = TEACHER
    sequences: int = 32


def check_demo(sizes: Sizes, device: torch.device, folder: Path) -> Figures:
    """The whole way from teacher to proved student."""
    settings = [*sizes.demo, f"teacher.gpu_layers={sizes.gpu_layers}"]
    start = time.perf_counter()
    made = run(load_config(None, {}, settings), RunPaths(out=folder / "demo"), RunConsole())
    results = made.read_results()
    before, after = (results["evaluation"][name]["kl"] for name in ("before", "exported"))
    figures: Figures = {
        "seconds": time.perf_counter() - start,
        "kl before": before,
        "kl of the file": after,
        "F32 file against PyTorch": results["f32_proof"]["max_logit_difference"],
        "precision": results["training"]["precision"],
    }
    if not after < before:
        raise CheckFailed(f"the student's KL rose from {before:.3f} to {after:.3f}")
    return figures


def check_base(sizes: Sizes, device: torch.device, folder: Path) -> Figures:
    """A training step of a base within 12 GB, and the estimate of its memory."""
    teacher = folder / "teacher.gguf"
    write(
        teacher, replace(sizes.teacher, width=256, heads=4, layers=1, feed_forward=256), "q8_0", 0
    )
    layers = _affordable_layers(sizes, teacher, folder)
    base = folder / "base"
    make_large(base, teacher=teacher, width=sizes.base_width, layers=layers)
    config = load_config(
        None,
        {"student.base": str(base), "student.load_in_4bit": sizes.four_bits},
        [
            f"data.max_length={sizes.length}",
            "safety.labels=none",
            "train.gradient_checkpointing=true",
        ],
    )
    fields, vocab_size = tokenizer_fields(read_gguf(teacher)), sizes.teacher.vocab_size
    opened = open_base(config, fields, vocab_size)

    def total(settings: RunConfig) -> int:
        return memory_of(opened.config, settings, vocab_size, device).total

    count = config.train.batch_size
    while total(config) > GPU_BYTES and config.train.accumulation < count:
        train = config.train.model_copy(update={"accumulation": 2 * config.train.accumulation})
        config = config.model_copy(update={"train": train})
    if ways := how_to_fit(GPU_BYTES, config, total):
        raise CheckFailed(f"the estimate does not fit into 12 GB: {'; '.join(ways)}")
    together = -(-count // config.train.accumulation)
    job = StepJob(batch=together, tokens=sizes.length, vocab_size=vocab_size, teacher_width=256)
    config = _alone(config, together)
    with peak_memory(device) as peak:
        student = load_base_student(opened, config, vocab_size)
        seconds = step_seconds(student, make_material(job)[0], config)
    estimate = total(config)
    figures: Figures = {
        "layers": layers,
        "sequences at once": together,
        "tokens a second": 1 / seconds,
        "peak": peak.most,
        "estimated": estimate,
        "estimate / peak": estimate / peak.most,
    }
    return _within(figures)


def _affordable_layers(sizes: Sizes, teacher: Path, folder: Path) -> int:
    """As many layers as are written in time: by how long one takes beside the tables."""
    times = []
    for layers in (1, 2):
        start = time.perf_counter()
        make_large(folder / f"{layers}", teacher=teacher, width=sizes.base_width, layers=layers)
        times.append(time.perf_counter() - start)
    each = max(1e-3, times[1] - times[0])
    return max(1, min(sizes.base_layers, int((sizes.base_seconds - times[0]) / each)))


def _alone(config: RunConfig, together: int) -> RunConfig:
    """The settings of a step that is one micro-batch."""
    train = config.train.model_copy(update={"batch_size": together, "accumulation": 1})
    return config.model_copy(update={"train": train})


def _within(figures: Figures) -> Figures:
    """The figures, if the estimate of the peak is not too small."""
    if float(figures["estimate / peak"]) < 1 - ESTIMATE_OFF:
        raise CheckFailed(f"the estimate is below the peak: {_words(figures)}")
    if float(figures["peak"]) > GPU_BYTES:
        raise CheckFailed(f"it took more than 12 GB: {_words(figures)}")
    return figures


def check_step(sizes: Sizes, device: torch.device, folder: Path) -> Figures:
    """Tokens a second of a new student's step, and its memory against the estimate."""
    job = replace(sizes.step, device=str(device))
    batch, _ = make_material(job)
    with peak_memory(device) as peak:
        trainee = Trainee(job, our_loss(job, batch.to(device)))
        trainee.step()
        seconds = min(trainee.seconds() for _ in range(STEPS))
    student = trainee.student
    settings = settings_of(RunConfig(), student.config.hidden_size, job.vocab_size, device)
    narrow = torch.bfloat16 if job.precision == "bf16" else None
    settings = replace(
        settings,
        sequences=job.batch,
        length=job.tokens,
        checkpointing=False,
        autocast=narrow,
        prompt_tokens=0,
        safety_head=False,
        verification_head=False,
    )
    estimate = estimate_new(student.config, settings).total
    tokens = job.batch * job.tokens / seconds
    operations = 6 * student.parameter_count() * tokens
    return {
        "parameters": student.parameter_count(),
        "tokens a second": tokens,
        "share of a large product's rate": operations / _product_rate(sizes.product_rows, device),
        "peak": peak.most,
        "estimated": estimate,
        "estimate / peak": estimate / peak.most,
    }


def _product_rate(rows: int, device: torch.device) -> float:
    """Operations a second of one large product in bfloat16."""
    left, right = (torch.ones(rows, rows, dtype=torch.bfloat16, device=device) for _ in range(2))
    there = torch.get_device_module(device)
    times = []
    for _ in range(STEPS):
        there.synchronize()
        start = time.perf_counter()
        left @ right
        there.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * rows**3 / min(times)


def check_capture(sizes: Sizes, device: torch.device, folder: Path) -> Figures:
    """Soft targets against bare ``llama_decode``, both with the same layers on the GPU."""
    path = folder / "captured.gguf"
    write(path, sizes.teacher, "q8_0", 0)
    length = min(128, sizes.length)
    _, times = capture_seconds(path, 3, sizes.sequences, length, sizes.gpu_layers)
    tokens = sizes.sequences * length
    return {
        "llama_decode, tokens a second": tokens / times[BARE],
        **{
            f"{name} / llama_decode": times[BARE] / seconds
            for name, seconds in times.items()
            if name != BARE
        },
    }


Check = Callable[[Sizes, torch.device, Path], Figures]
# With the seconds that each may take, ten minutes together.
CHECKS: dict[str, tuple[Check, float]] = {
    "demo": (check_demo, 170.0),
    "base": (check_base, 230.0),
    "step": (check_step, 80.0),
    "capture": (check_capture, 110.0),
}


@dataclass(frozen=True)
class Outcome:
    """A check's end: ``problem``: why it failed, or nothing."""

    name: str
    seconds: float
    figures: Figures
    problem: str = ""


def in_own_process(name: str, command: list[str], answer: Path, limit: float) -> Outcome:
    """Run a check's command for so many seconds at most; what it found is in ``answer`` then."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            command,
            env=child_environment(torch.get_num_threads()),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            child.wait(limit)
            problem = "" if child.returncode == 0 else f"exit code {child.returncode}"
        except subprocess.TimeoutExpired:
            problem = f"was not done after {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # with what it has started
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        log.seek(0)
        last = log.read().decode("utf-8", errors="replace").strip().splitlines()[-1:]
    seconds = time.perf_counter() - start
    if not problem:
        return Outcome(name, seconds, json.loads(answer.read_text(encoding="utf-8")))
    return Outcome(name, seconds, {}, ": ".join([problem, *last]))


def run_checks(folder: Path, command: Callable[[str, Path], list[str]]) -> list[Outcome]:
    """Every check in turn; ``command``: of one, that writes what it found to a file."""
    outcomes = []
    for name, (_, limit) in CHECKS.items():
        answer = folder / f"{name}.json"
        outcomes.append(in_own_process(name, command(name, answer), answer, limit))
    return outcomes


def show(outcomes: list[Outcome], console: Console) -> None:
    """Print the table."""
    table = Table("check", "", "seconds", "figures")
    for one in outcomes:
        text = one.problem or _words(one.figures)
        table.add_row(one.name, "failed" if one.problem else "passed", f"{one.seconds:.0f}", text)
    console.print(table)


def _words(figures: Figures) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in figures.items())


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return (
        f"{value / 1e9:.2f} G"
        if value >= 1e8
        else f"{value:,.0f}"
        if value >= 100
        else f"{value:.3g}"
    )


def main(
    file: Annotated[Path | None, typer.Option("--json", help="where the figures go")] = None,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run every check on the first CUDA device and print one table."""
    console = Console()
    if not torch.cuda.is_available():
        console.print("there is no CUDA device that PyTorch sees; `distill doctor` says more")
        raise typer.Exit(EXIT_USER)
    device = torch.device("cuda", torch.cuda.current_device())
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        folder = Path(name)
        if only is not None:
            assert file is not None
            try:
                write_json(file, CHECKS[only][0](Sizes(), device, folder))
            except CheckFailed as failure:
                console.print(str(failure), soft_wrap=True)
                raise typer.Exit(EXIT_OURS) from None
            return
        about = machine(torch.get_num_threads())
        size, label = device_memory(device)
        console.print(machine_line(about), f"{label}, {size / 1e9:.1f} GB")

        def command(check: str, answer: Path) -> list[str]:
            return child_command("tools.checks.gpu", "--only", check, "--json", answer)

        outcomes = run_checks(folder, command)
    show(outcomes, console)
    if file is not None:
        write_json(file, {"machine": about, "checks": [vars(one) for one in outcomes]})
    if any(one.problem for one in outcomes):
        raise typer.Exit(EXIT_OURS)


if __name__ == "__main__":
    typer.run(main)
