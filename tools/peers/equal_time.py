"""``distill run`` against TRL's ``GKDTrainer`` on a real teacher, in equal time.

    python -m tools.peers.equal_time TEACHER.gguf --data TEXT --out FOLDER
        [--student-size 25% --samples 400 --epochs 3 | --budget 20m] [--set KEY=VALUE ...]
        [--rates 1e-4,3e-4,1e-3] [--trial-seconds 150] [--clock wall|processor]
        [--trl-python PYTHON]

Ours is the command as a user starts it, everything included: capture, head start, training, heads,
export, proof, evaluation. TRL's trainer then gets as many seconds, from the start of its process to
the saved student, with the same teacher (the GGUF file as ``transformers`` dequantises it), the
same training sequences, and a student of the same architecture. It may choose: its first weights
are our head start's (for nothing), at one of ``--rates`` as its peak learning rate, or random, at
the highest of them; each gets a short training, and the best goes on to the long one. Both students
are judged by ``tools.peers.judge``.

On a machine that does other work beside, wall clock says little: ``--clock processor`` counts the
seconds of processor time of all threads and child processes instead, on both sides.

Every part writes a file when it is over and is skipped where that is there, so the same command
goes on after an interruption; a part that was interrupted begins anew, as half a measurement is
none.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from distill.errors import UserError
from distill.evaluation.scorers import Score
from distill.runs.folder import RunFolder
from teachers.atomic_files import StoreError
from teachers.errors import TeacherError
from teachers.gguf.file import TeacherFileError
from tools.machine import child_command, machine, machine_line, write_json
from tools.peers.judge import REPORTED, judge, reported, table_of
from tools.peers.live_distillation import PRECISIONS, faster_precision
from tools.peers.our_side import Taken, taken_by, write_beginning
from tools.peers.trl_environment import TRAINING, trl_python

CLOCKS = ("wall", "processor")
HEAD_START, RANDOM = "head start", "random"
SAVING_SECONDS = 2.0  # kept of TRL's time for writing its student


@dataclass(frozen=True)
class Comparison:
    """What is compared, and ``folder``, where everything is kept. ``ours``: more options of our
    run."""

    teacher: Path
    data: Path
    folder: Path
    size: str
    ours: list[str]
    batch_size: int
    precision: str
    clock: str
    threads: int
    python: Path

    @property
    def run(self) -> Path:
        """The folder of our run."""
        return self.folder / "ours" / "run"

    @property
    def first(self) -> Path:
        """Our student before training, for ``transformers``."""
        return self.folder / "first"

    @property
    def tokens(self) -> Path:
        """The training sequences."""
        return self.folder / "tokens.json"


def run_ours(job: Comparison) -> Taken:
    """The whole run of ours, or what it took if it is there.

    Raises:
        RuntimeError: it failed.
    """
    record = job.folder / "ours.json"
    if not record.exists():
        shutil.rmtree(job.run.parent, ignore_errors=True)
        job.run.parent.mkdir(parents=True)
        command = child_command(
            "distill", "run", "--teacher", job.teacher, "--student-size", job.size
        )
        command += ["--data", str(job.data), *job.ours, "--out", str(job.run)]
        write_json(record, asdict(taken_by(command, job.folder / "ours.log", job.threads)))
    return Taken(**json.loads(record.read_text(encoding="utf-8")))


def run_trl(
    job: Comparison, name: str, beginning: str, rate: float, seconds: float
) -> dict[str, Any]:
    """One training of TRL's in the folder ``name``, or what is known of it if it is there.

    Raises:
        RuntimeError: it failed.
    """
    folder = job.folder / "trl" / name
    record = folder / "result.json"
    if not record.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        spec = {
            "tokens": str(job.tokens),
            "teacher": str(job.teacher.parent),
            "teacher_gguf": job.teacher.name,
            "student": str(job.first),
            "random_seed": 0 if beginning == RANDOM else None,
            "out": str(folder / "student"),
            "marks": str(folder / "marks.json"),
            "seconds": seconds - SAVING_SECONDS,
            "began": time.time() if job.clock == "wall" else None,
            "batch_size": job.batch_size,
            "learning_rate": rate,
            "precision": job.precision,
        }
        write_json(folder / "job.json", spec)
        command = [str(job.python), *TRAINING, str(folder / "job.json")]
        taken = taken_by(command, folder / "log.txt", job.threads)
        marks = json.loads((folder / "marks.json").read_text(encoding="utf-8"))
        score = judge(job.run, {name: folder / "student"}, job.teacher)[name]
        known = {"beginning": beginning, "rate": rate} | asdict(taken) | marks
        write_json(record, known | {"score": asdict(score)})
    result: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return result


def best_choice(
    job: Comparison, rates: list[float], seconds: float, console: Console
) -> tuple[str, float]:
    """Where TRL's student begins best, and at which rate, after short trainings."""
    trials = []
    for beginning, rate in [*((HEAD_START, rate) for rate in rates), (RANDOM, max(rates))]:
        name = f"{beginning.replace(' ', '-')}-{rate:g}"
        trial = run_trl(job, name, beginning, rate, seconds)
        score = trial["score"]
        console.print(
            f"TRL, {beginning}, rate {rate:g}: {trial['steps']} steps in {trial['seconds']:.0f} s, "
            f"KL {score['kl']:.4f}, same top token {score['agreement']:.1%}"
        )
        trials.append((score["kl"], beginning, rate))
    _, beginning, rate = min(trials)
    return beginning, rate


def compare(
    job: Comparison, rates: list[float], trial_seconds: float, console: Console
) -> dict[str, Any]:
    """Do all parts that are not done yet, print and return the result.

    Raises:
        UserError, StoreError, TeacherFileError, TeacherError: the input cannot be used.
        RuntimeError: a side failed.
    """
    ours = run_ours(job)
    console.print(f"ours: {ours.seconds:.0f} s ({ours.cpu_seconds:.0f} s of processor time)")
    if not job.tokens.exists():
        shutil.rmtree(job.first, ignore_errors=True)
        write_beginning(job.run, job.tokens, job.first)
    beginning, rate = best_choice(job, rates, trial_seconds, console)
    seconds = ours.seconds if job.clock == "wall" else ours.cpu_seconds
    theirs = run_trl(job, "long", beginning, rate, seconds)
    console.print(
        f"TRL {theirs['versions']['trl']}, {beginning}, rate {rate:g}: {theirs['seconds']:.0f} s "
        f"({theirs['cpu_seconds']:.0f} s of processor time), {theirs['steps']} steps"
    )
    students = {"both before": job.first, "ours": RunFolder(job.run).plain}
    scores = judge(job.run, students, job.teacher)
    scores |= {"TRL": Score(**theirs["score"]), REPORTED: reported(job.run)}
    console.print(table_of(scores))
    share = scores["ours"].kl / scores["TRL"].kl
    console.print(f"[bold]our KL / TRL's in equal {job.clock} time: {share:.3f}[/]")
    result = {
        "machine": machine(job.threads),
        "clock": job.clock,
        "ours": asdict(ours),
        "trl": {key: value for key, value in theirs.items() if key not in ("score", "losses")},
        "scores": {name: asdict(score) for name, score in scores.items()},
        "share": share,
    }
    write_json(job.folder / "result.json", result)
    return result


def rates_of(text: str) -> list[float]:
    """Learning rates out of a list with commas; raises ``ValueError``."""
    rates = [float(part) for part in text.split(",")]
    if not all(0 < rate < 1 for rate in rates):
        raise ValueError(f"learning rates lie between 0 and 1, not {text}")
    return rates


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", type=Path, help="GGUF file")
    parser.add_argument("--data", type=Path, required=True, help="text, as for distill run")
    parser.add_argument("--out", type=Path, required=True, help="folder for all of it")
    parser.add_argument("--student-size", default="25%")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=3, help="of our run")
    parser.add_argument("--budget", help="of our run, which then chooses samples and epochs")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, of our run")
    parser.add_argument("--batch-size", type=int, default=16, help="of TRL's training")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default=faster_precision(), help="of TRL's training"
    )
    parser.add_argument("--rates", type=rates_of, default=[1e-4, 3e-4, 1e-3], help="for TRL")
    parser.add_argument("--trial-seconds", type=float, default=150.0, help="of each of its trials")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="by which time is equal")
    parser.add_argument("--trl-python", type=Path, help="a Python with TRL; else one is made")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args(arguments)
    for path in (chosen.teacher, chosen.data):
        if not path.exists():
            parser.error(f"{path} is not there")
    amount = ["--samples", str(chosen.samples), "--epochs", str(chosen.epochs)]
    if chosen.budget is not None:
        amount = ["--budget", chosen.budget]
    console = Console(width=110)
    try:
        python = trl_python(chosen.trl_python)
        chosen.out.mkdir(parents=True, exist_ok=True)
        job = Comparison(
            teacher=chosen.teacher.resolve(),
            data=chosen.data.resolve(),
            folder=chosen.out.resolve(),
            size=chosen.student_size,
            ours=[*amount, *(word for one in chosen.set for word in ("--set", one))],
            batch_size=chosen.batch_size,
            precision=chosen.precision,
            clock=chosen.clock,
            threads=chosen.threads,
            python=python,
        )
        console.print(machine_line(machine(chosen.threads)))
        compare(job, chosen.rates, chosen.trial_seconds, console)
    except (UserError, StoreError, TeacherFileError, TeacherError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
