"""Kills a training at random moments, again and again, and compares what comes out with an
undisturbed one.

    python -m tools.robustness.kill_training --kills 20

Once: ``distill capture`` makes a small store with the example teacher, and ``distill train`` makes
a student from it as any user does, undisturbed: the reference. Then the same command, into fresh
folders, is killed with SIGKILL (its whole process group) and started again until it finishes. The
moments are uniform over the steps of the training, plus a random part of a step; in every third one
the kill waits for the next checkpoint to be begun. Weights, exported file and metrics must be equal
to the reference's byte for byte, and training must have continued where it was saved.

The killed processes save every 0.3 s instead of every 30 s, else this would take hours: they are
started through a few lines that set ``distill.training.checkpoint_timer.CHECKPOINT_SECONDS`` and
``SAVING_SHARE`` before ``distill.cli.main()``. Nothing else about them is changed. A kill counts
where training had begun and its last checkpoint was not there yet.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from distill.runs.folder import latest_checkpoint
from tools.machine import child_command, child_environment

FREQUENT = """
from distill.training import checkpoint_timer
checkpoint_timer.CHECKPOINT_SECONDS, checkpoint_timer.SAVING_SHARE = 0.3, 1.0
from distill.cli import main
main()
"""
COMPARED = ("student/model.safetensors", "student.gguf", "metrics.jsonl")
AT_A_CHECKPOINT = 3  # every third kill
POLL_SECONDS = 0.001
TAIL_BYTES = 4096
PATIENCE_SECONDS = 600.0


@dataclass(frozen=True)
class Kill:
    """One kill: the last step logged, the checkpoint to continue from (0: none), and what it
    hit."""

    run: int
    step: int
    checkpoint: int
    while_saving: bool
    counts: bool


@dataclass(frozen=True)
class Job:
    """How large the training is."""

    samples: int
    max_length: int
    size: str
    epochs: int
    threads: int

    def capture(self, store: Path) -> list[str]:
        """The command that makes the store."""
        settings = ("--set", f"data.max_length={self.max_length}")
        where = ("--samples", str(self.samples), "--store", str(store))
        return child_command("distill", "capture", *where, *settings)

    def arguments(self, store: Path, out: Path) -> list[str]:
        """The arguments of the training."""
        sizes = ("--student-size", self.size, "--epochs", str(self.epochs))
        return ["train", str(store), "--out", str(out), *sizes]


def frequent_command(arguments: Sequence[str]) -> list[str]:
    """``distill`` with checkpoints at short intervals."""
    return [sys.executable, "-c", FREQUENT, *arguments]


def differences(reference: Path, result: Path) -> list[str]:
    """Which of the compared files are missing or not equal to the byte."""
    return [
        name
        for name in COMPARED
        if not (result / name).exists()
        or (result / name).read_bytes() != (reference / name).read_bytes()
    ]


def last_step(metrics: Path) -> int:
    """The last step logged as done, 0 where there is none."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except ValueError:  # cut off, at the beginning or at the end
            continue
        if entry["kind"] == "train":
            return int(entry["step"])
    return 0


def is_saving(folder: Path) -> bool:
    """Whether a checkpoint is being written, or was when its writer died."""
    return any((folder / "checkpoints").glob(".step-*.tmp"))


def saved_step(folder: Path) -> tuple[int, bool]:
    """The step of the newest complete checkpoint (0: none) and whether it is the training's
    last."""
    newest = latest_checkpoint(folder / "checkpoints")
    if newest is None:
        return 0, False
    content = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    return int(content["step"]), bool(content["finished"])


class Training:
    """One process that trains, in a group of its own."""

    def __init__(self, command: Sequence[str], folder: Path, threads: int) -> None:
        self.folder = folder
        self.metrics = folder / "metrics.jsonl"
        self.before = self._file()
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(
            command,
            env=child_environment(threads),
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            start_new_session=True,
        )

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:  # we are interrupted ourselves
            self.kill()
        self.errors.close()

    def _file(self) -> int | None:
        return self.metrics.stat().st_ino if self.metrics.exists() else None

    @property
    def begun(self) -> bool:
        """Whether this process trains: it begins by writing the metrics anew."""
        return self._file() not in (None, self.before)

    def reaches(self, step: int, at_checkpoint: bool) -> bool:
        """Wait until it has done ``step`` (and then begins a checkpoint); false where it ends
        before."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.process.poll() is None:
            there = self.begun and last_step(self.metrics) >= step
            if there and (not at_checkpoint or is_saving(self.folder)):
                return True
            if time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"nothing has happened for {PATIENCE_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)
        return False

    def kill(self) -> None:
        """SIGKILL for the whole process group."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def finish(self) -> None:
        """Wait for its end, which must be a good one."""
        self.process.wait()
        if self.process.returncode != 0:
            self.errors.seek(0)
            raise RuntimeError(
                f"exit {self.process.returncode}: {self.errors.read().decode(errors='replace')}"
            )


def disturbed(
    run: int, training: Sequence[str], out: Path, job: Job, moments: Sequence[Moment]
) -> list[Kill]:
    """Train into ``out`` with one kill at each moment that comes, and then to the end."""
    kills: list[Kill] = []
    for moment in moments:
        with Training(training, out, job.threads) as process:
            if not process.reaches(moment.step, moment.at_checkpoint):
                process.finish()
                return kills
            if not moment.at_checkpoint:
                time.sleep(moment.delay)
            process.kill()
        saved, finished = saved_step(out)
        kills.append(
            Kill(run, last_step(out / "metrics.jsonl"), saved, is_saving(out), not finished)
        )
    with Training(training, out, job.threads) as process:
        process.finish()
    return kills


def judge(run: int, kills: Sequence[Kill], reference: Path, out: Path) -> list[str]:
    """What is wrong with a run: files that differ, or a checkpoint that the last process did not
    continue from."""
    wrong = [f"run {run}: {name} differs" for name in differences(reference, out)]
    continued = read_training(out)["continued_from_step"]
    if kills and kills[-1].counts and continued != kills[-1].checkpoint:
        wrong.append(f"run {run}: continued from step {continued}, not {kills[-1].checkpoint}")
    return wrong


def read_training(out: Path) -> dict[str, Any]:
    """What a finished run's results say about its training."""
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return dict(results["training"])


@dataclass(frozen=True)
class Moment:
    """When to kill: ``delay`` seconds after a step, or when the next checkpoint after it is
    begun."""

    step: int
    delay: float
    at_checkpoint: bool


def draw_moments(
    chance: random.Random, count: int, steps: int, step_seconds: float
) -> list[Moment]:
    """Moments of one run, in order of steps: uniform over the training."""
    drawn = sorted(chance.randrange(steps) for _ in range(count))
    forms = [place % AT_A_CHECKPOINT == AT_A_CHECKPOINT - 1 for place in range(count)]
    chance.shuffle(forms)
    return [
        Moment(step, chance.uniform(0.0, step_seconds), form)
        for step, form in zip(drawn, forms, strict=True)
    ]


def kill_and_compare(root: Path, job: Job, options: argparse.Namespace, console: Console) -> bool:
    """Do everything in ``root``; whether all students were equal to the undisturbed one."""
    store, reference = root / "store", root / "reference"
    environment = child_environment(job.threads)
    subprocess.run(job.capture(store), check=True, env=environment, stdout=subprocess.DEVNULL)
    undisturbed = child_command("distill", *job.arguments(store, reference))
    subprocess.run(undisturbed, check=True, env=environment, stdout=subprocess.DEVNULL)
    training = read_training(reference)
    steps, seconds = training["steps"], training["seconds"]
    console.print(f"undisturbed: {steps} steps in {seconds:.1f} s")
    chance, kills, wrong, run = random.Random(options.seed), list[Kill](), list[str](), 0
    while sum(kill.counts for kill in kills) < options.kills:
        run += 1
        out = root / f"killed-{run}"
        moments = draw_moments(chance, options.kills_per_run, steps, seconds / steps)
        made = disturbed(run, frequent_command(job.arguments(store, out)), out, job, moments)
        kills += made
        result = judge(run, made, reference, out)
        wrong += result
        hit = ", ".join(f"{kill.step}→{kill.checkpoint}{'*' * kill.while_saving}" for kill in made)
        verdict = f"[bold red]{'; '.join(result)}[/]" if result else "equal"
        console.print(f"run {run}: killed at {hit or 'no step'}; {verdict}")
        if not made and run >= options.kills:
            raise RuntimeError(
                "no kill hits the training; make it longer with --samples or --epochs"
            )
    report(kills, run, wrong, console)
    return not wrong


def report(kills: Sequence[Kill], runs: int, wrong: Sequence[str], console: Console) -> None:
    """What was done and what came of it."""
    counted = [kill for kill in kills if kill.counts]
    table = Table(title="SIGKILL while training", title_justify="left", show_header=False)
    for name, value in (
        ("kills while training", f"{len(counted)} in {runs} runs"),
        (
            "at steps",
            ", ".join(str(kill.step) for kill in sorted(counted, key=lambda kill: kill.step)),
        ),
        ("while a checkpoint was written", f"{sum(kill.while_saving for kill in counted)}"),
        ("continued from a checkpoint", f"{sum(kill.checkpoint > 0 for kill in counted)}"),
        ("begun again from step 0", f"{sum(kill.checkpoint == 0 for kill in counted)}"),
        ("kills after the last checkpoint (not counted)", f"{len(kills) - len(counted)}"),
        (f"{', '.join(COMPARED)}", "; ".join(wrong) if wrong else "identical in every run"),
    ):
        table.add_row(name, value)
    console.print(table)


def main() -> None:
    """Parse the command line, kill and compare; exit status 1 where something differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kills-per-run", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--student-size", default="64x2")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder to work in and to leave as it is, instead of a temporary one",
    )
    options = parser.parse_args()
    job = Job(
        options.samples, options.max_length, options.student_size, options.epochs, options.threads
    )
    console = Console(width=120, highlight=False)
    if options.keep:
        options.keep.mkdir(parents=True)
        equal = kill_and_compare(options.keep, job, options, console)
    else:
        with tempfile.TemporaryDirectory() as root:
            equal = kill_and_compare(Path(root), job, options, console)
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
