"""The headline job on all sides in one run: ``distill run`` against live ``transformers`` models.

Over 400 lines because the sides of the job, their measuring and their tables belong together.

    python -m tools.peers.headline [--teacher FILE.gguf] [--only ours live trl] [--repeats 3]
        [--trl-python PYTHON] [--json FILE]

The job: a teacher of 1024×8 (168 M random parameters, V = 32,064; Q8_0 for us, bfloat16 for the
other side), a student of 512×4 (45 M, untied), 100 sequences × 64 tokens × 5 epochs, batches of 4,
T = 3 throughout, α 0.7, β 0.3.

- ours: ``python -m distill run`` as a user starts it, in an empty folder, nothing reused. Measured
  from the start of the process until the exported and proved ``student.gguf`` has its name, and
  until the process ends (the evaluation is then done too). One sequence more is in the data,
  because one is held out.
- live: ``tools.peers.live_distillation``, a re-creation of TRL's GKD trainer at its forward-KL end,
  from the start of the process (imports included) until the trained student is saved in
  safetensors, and until the process ends. The teacher is loaded from a checkpoint that was saved
  before, as ours is.
- trl: ``tools.peers.trl_training``, TRL's ``GKDTrainer`` itself in its own environment, measured as
  live is. Its divergence is at T = 1 and has no cross-entropy beside it.

All have the same number of threads, take turns, and find their files in the page cache. Medians
count; where the machine does other work beside, the processor time says more than the clock. What
is not measured: making the random teachers and the data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from distill.errors import UserError
from distill.initialization.shape import likeness
from students.model.build import student_config
from students.model.shape import parse_size
from students.model.sizes import decoder_parameters
from teachers.base import Teacher, Tokens
from teachers.gguf.file import GGUFFile, read_gguf
from teachers.llama_cpp.teacher import GGUFTeacher
from tools.machine import (
    Timing,
    child_command,
    child_environment,
    machine,
    machine_line,
    timed,
    write_json,
)
from tools.models.random_teacher import QUANTS, shape_of, write
from tools.peers.live_distillation import (
    PRECISIONS,
    LiveJob,
    LlamaShape,
    faster_precision,
    make_teacher,
)
from tools.peers.trl_environment import TRAINING, trl_python

HELD_OUT = 1
EXPORT = "Export and prove"
DONE, ENDED = "to the finished student", "to the end of the process"
PROCESSOR = "processor time of all threads"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHARACTERS_AT_ONCE = 64


@dataclass(frozen=True)
class Job:
    """What both sides do; ``samples`` sequences of ``length`` tokens are trained on."""

    teacher: Path
    student: str = "512x4"
    samples: int = 100
    length: int = 64
    epochs: int = 5
    batch_size: int = 4
    temperature: float = 3.0
    alpha: float = 0.7
    beta: float = 0.3
    threads: int = 1
    settings: tuple[str, ...] = ()
    live_precision: str = "autocast"
    trl_python: Path | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.epochs * -(-self.samples // self.batch_size)


@dataclass(frozen=True)
class Material:
    """What is made before anything is measured."""

    data: Path
    tokens: Path
    live_teacher: Path
    student: LlamaShape


@dataclass(frozen=True)
class Measured:
    """Seconds of one run of one side: its parts in order, the two times that count, and the
    processor's."""

    parts: dict[str, float]
    done: float
    ended: float
    facts: dict[str, Any]


# -- what is made before --------------------------------------------------------------------------


def sequences_of_text(teacher: Teacher, count: int, length: int) -> tuple[list[str], list[Tokens]]:
    """Different texts of made-up words that make exactly ``length`` tokens each (BOS included),
    and those tokens."""
    start = [teacher.info.bos] if teacher.info.add_bos and teacher.info.bos is not None else []
    random = np.random.default_rng(0)
    texts: dict[str, Tokens] = {}
    while len(texts) < count:
        words = (
            "".join(random.choice(list(LETTERS), random.integers(2, 8))) for _ in range(2 * length)
        )
        text, wanted = " ".join(words), length - len(start)
        for begin in range(1, len(text), CHARACTERS_AT_ONCE):
            ends = range(begin, min(begin + CHARACTERS_AT_ONCE, len(text)))
            prefixes = [text[:end] for end in ends if text[end - 1] != " "]
            result = teacher.tokenize(prefixes, add_special=False, parse_special=False)
            fitting = {
                text: ids for text, ids in zip(prefixes, result, strict=True) if len(ids) == wanted
            }
            if fitting:
                chosen, ids = next(iter(fitting.items()))
                texts[chosen] = np.concatenate((np.array(start, dtype=np.int32), ids)).astype(
                    np.int32
                )
                break
            if min(map(len, result)) > wanted:
                break
    return list(texts), list(texts.values())


def teacher_shape(file: GGUFFile) -> LlamaShape:
    """The Llama of a GGUF teacher's sizes."""
    architecture = file.value("general.architecture")

    def number(key: str, default: int | None = None) -> int:
        return int(file.value(f"{architecture}.{key}", default))

    heads = number("attention.head_count")
    return LlamaShape(
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        width=number("embedding_length"),
        layers=number("block_count"),
        heads=heads,
        key_value_heads=number("attention.head_count_kv", heads),
        feed_forward=number("feed_forward_length"),
        context_length=number("context_length"),
        tied="output.weight" not in file.tensors,
    )


def prepare(job: Job, folder: Path) -> Material:
    """Write the data, the live teacher, and warm up what both sides import."""
    teacher_is = teacher_shape(read_gguf(job.teacher))
    with GGUFTeacher(job.teacher, threads=job.threads) as teacher:
        like_teacher = likeness(teacher.info)
        texts, tokens = sequences_of_text(teacher, job.samples + HELD_OUT, job.length)
    data, ids, live_teacher = folder / "data.jsonl", folder / "tokens.npy", folder / "live-teacher"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    np.save(ids, np.stack(tokens[: job.samples]))
    make_teacher(teacher_is, live_teacher, job.live_precision)
    like = student_config(
        parse_size(job.student),
        vocab_size=teacher_is.vocab_size,
        context_length=teacher_is.context_length,
        tie_embeddings=False,
        like=like_teacher,
    )
    print(f"student {job.student}: {decoder_parameters(like, gates=True) / 1e6:.1f} M parameters")
    student = LlamaShape(
        vocab_size=like.vocab_size,
        width=like.hidden_size,
        layers=like.num_hidden_layers,
        heads=like.num_attention_heads,
        key_value_heads=like.num_key_value_heads,
        feed_forward=like.intermediate_size,
        context_length=like.max_position_embeddings,
    )
    for module in ("distill", "tools.peers.live_distillation"):
        subprocess.run(
            child_command(module, "--help"),
            env=child_environment(job.threads),
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return Material(data, ids, live_teacher, student)


# -- one process of each side ---------------------------------------------------------------------


def our_command(job: Job, material: Material, out: Path) -> list[str]:
    """The command line, as a user would write it."""
    settings = {
        "student.tie_embeddings": "false",
        "data.max_length": job.length,
        "data.held_out": 1e-6,  # one sequence, the least there is
        "train.batch_size": job.batch_size,
        "loss.temperature": job.temperature,
        "loss.alpha": job.alpha,
        "loss.beta": job.beta,
        # What the other side does not do either.
        "student.init": "embeddings",
        "safety.labels": "none",
        "loss.lambda_verification": 0,
    }
    chosen = [f"{key}={value}" for key, value in settings.items()] + list(job.settings)
    return child_command(
        "distill",
        "run",
        "--teacher",
        job.teacher.resolve(),
        "--student-size",
        job.student,
        "--data",
        material.data,
        "--samples",
        str(job.samples + HELD_OUT),
        "--epochs",
        str(job.epochs),
        "--out",
        out,
        *(word for setting in chosen for word in ("--set", setting)),
    )


def stages_and_gaps(stages: dict[str, float], timing: Timing) -> dict[str, float]:
    """The stages of a run in order, what lies before each, and the two times that count.

    A stage prints its line when it is over.
    """
    parts: dict[str, float] = {}
    last = 0.0
    for name, seconds in stages.items():
        ends = [moment for line, moment in timing.lines.items() if line.startswith(f"✓ {name} ")]
        if ends:
            parts[f"before: {name}"] = max(0.0, ends[0] - seconds - last)
        parts[name] = seconds
        if name == EXPORT:
            parts[DONE] = timing.done
        last = ends[0] if ends else last + seconds
    parts["end"] = timing.ended - last
    return parts | {DONE: timing.done, ENDED: timing.ended, PROCESSOR: timing.cpu_seconds}


def measure_ours(job: Job, material: Material, folder: Path) -> Measured:
    """One whole run of ours in an empty folder.

    Raises:
        RuntimeError: it failed, or did other work than this job.
    """
    out = folder / "run"
    timing = timed(our_command(job, material, out), folder, job.threads, out / "student.gguf")
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    training, targets = results["training"], results["soft_targets"]
    expected = {
        "steps": job.steps,
        "tokens_seen": job.epochs * job.samples * (job.length - 1),
        "continued_from_step": 0,
    }
    result = {key: training[key] for key in expected}
    if result != expected or targets["reused"] or targets["sequences"] != job.samples + HELD_OUT:
        raise RuntimeError(f"another job than wanted was done: {result}, not {expected}; {targets}")
    parts = stages_and_gaps(results["stage_seconds"], timing)
    facts = {
        "precision": training["precision"],
        "training_loop_seconds": training["seconds"],
        "student_parameters": results["student"]["parameters"],
        "teacher_parameters": results["teacher"]["parameters"],
        "threads": results["environment"]["threads"],
        "proof": results["proof"],
    }
    return Measured(parts, timing.done, timing.ended, facts)


def measure_live(job: Job, material: Material, folder: Path) -> Measured:
    """One whole run with live models, written anew.

    Raises:
        RuntimeError: it failed, or did other work than this job.
    """
    spec = LiveJob(
        tokens=str(material.tokens),
        teacher=str(material.live_teacher),
        out=str(folder / "student"),
        marks=str(folder / "marks.json"),
        student=material.student,
        epochs=job.epochs,
        batch_size=job.batch_size,
        temperature=job.temperature,
        alpha=job.alpha,
        beta=job.beta,
        learning_rate=0.5 / material.student.width,
        precision=job.live_precision,
    )
    spec.write(folder / "job.json")
    command = child_command("tools.peers.live_distillation", folder / "job.json")
    return _measure_other(job, command, folder)


def measure_trl(job: Job, material: Material, folder: Path) -> Measured:
    """One whole run of TRL's trainer.

    Raises:
        RuntimeError: it failed, or did other work than this job.
    """
    tokens, shape = folder / "tokens.json", folder / "shape"
    write_json(tokens, np.load(material.tokens).tolist())
    material.student.config().save_pretrained(shape)
    spec = {
        "tokens": str(tokens),
        "teacher": str(material.live_teacher),
        "student": str(shape),
        "random_seed": 0,
        "out": str(folder / "student"),
        "marks": str(folder / "marks.json"),
        "epochs": job.epochs,
        "batch_size": job.batch_size,
        "learning_rate": 0.5 / material.student.width,
        "precision": job.live_precision,
    }
    write_json(folder / "job.json", spec)
    command = [str(job.trl_python), *TRAINING, str(folder / "job.json")]
    return _measure_other(job, command, folder)


def _measure_other(job: Job, command: list[str], folder: Path) -> Measured:
    """A process that writes its student and then ``marks.json`` into ``folder``."""
    timing = timed(command, folder, job.threads, folder / "marks.json")
    result = json.loads((folder / "marks.json").read_text(encoding="utf-8"))
    if result["steps"] != job.steps or not (folder / "student" / "model.safetensors").exists():
        raise RuntimeError(f"another job than wanted was done: {result}")
    parts, last = {}, timing.begin
    for name, moment in result.pop("ends").items():
        parts[name], last = moment - last, moment
    done = last - timing.begin
    parts |= {DONE: done, "end": timing.ended - done, ENDED: timing.ended}
    parts[PROCESSOR] = timing.cpu_seconds
    return Measured(parts, done, timing.ended, result | {"precision": job.live_precision})


SIDES: dict[str, Callable[[Job, Material, Path], Measured]] = {
    "ours": measure_ours,
    "live": measure_live,
    "trl": measure_trl,
}


# -- the comparison -------------------------------------------------------------------------------


def compare(
    job: Job, material: Material, sides: list[str], repeats: int
) -> dict[str, list[Measured]]:
    """Let the sides take turns, the first one changing, each time in an empty folder."""
    runs: dict[str, list[Measured]] = {side: [] for side in sides}
    for number in range(repeats):
        for side in sides if number % 2 == 0 else sides[::-1]:
            with tempfile.TemporaryDirectory(prefix=f"headline-{side}-") as name:
                measured = SIDES[side](job, material, Path(name))
            runs[side].append(measured)
            times = f"{measured.done:.2f} s, {measured.ended:.2f} s to the end"
            print(f"{side} {number + 1}/{repeats}: {times}", flush=True)
    return runs


def medians(runs: list[Measured]) -> dict[str, float]:
    """The median of every part."""
    return {name: statistics.median(run.parts[name] for run in runs) for name in runs[0].parts}


def summary(runs: dict[str, list[Measured]]) -> dict[str, Any]:
    """Medians of every part, and ours as a share of each other side's where both were measured."""
    result: dict[str, Any] = {side: medians(measured) for side, measured in runs.items()}
    for side in runs.keys() - {"ours"} if "ours" in runs else ():
        result[f"ours / {side}"] = {
            name: result["ours"][name] / result[side][name] for name in (DONE, ENDED, PROCESSOR)
        }
    return result


def show(
    job: Job, runs: dict[str, list[Measured]], result: dict[str, Any], console: Console
) -> None:
    """Print the tables."""
    repeats = len(next(iter(runs.values())))
    for side, measured in runs.items():
        facts = measured[0].facts
        table = Table(
            title=f"{side} ({facts['precision']}, {facts['student_parameters'] / 1e6:.1f} "
            "M-parameter student)",
            title_justify="left",
        )
        table.add_column("part")
        table.add_column("median, s", justify="right")
        table.add_column("from – to", justify="right")
        for name, seconds in result[side].items():
            every = [run.parts[name] for run in measured]
            style = "bold" if name in (DONE, ENDED, PROCESSOR) else ""
            table.add_row(
                name, f"{seconds:.2f}", f"{min(every):.2f} – {max(every):.2f}", style=style
            )
        console.print(table)
    console.print(
        f"{job.samples} sequences × {job.length} tokens × {job.epochs} epochs, batch "
        f"{job.batch_size}; "
        f"{repeats} runs of each side"
    )
    for sides in sorted(result.keys() - runs.keys()):
        for name, ratio in result[sides].items():
            console.print(f"[bold]{sides}, {name}: {ratio:.3f}[/] ({1 / ratio:.2f} times as fast)")


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--teacher", type=Path, help="GGUF teacher; without it a random one is made"
    )
    parser.add_argument("--shape", default="1024x8", help="of the random teacher, WIDTHxLAYERS")
    parser.add_argument("--vocab", type=int, default=32064, help="of the random teacher")
    parser.add_argument(
        "--quant", choices=sorted(QUANTS), default="q8_0", help="of the random teacher"
    )
    parser.add_argument("--student-size", default="512x4")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=list(SIDES), nargs="+", default=list(SIDES))
    parser.add_argument("--trl-python", type=Path, help="a Python with TRL; else one is made")
    parser.add_argument("--live-precision", choices=PRECISIONS, default=faster_precision())
    parser.add_argument(
        "--set", action="append", default=[], help="a further setting of `distill run`"
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and measure."""
    parser = options()
    chosen = parser.parse_args(arguments)
    try:
        python = trl_python(chosen.trl_python) if "trl" in chosen.only else None
    except UserError as error:
        parser.error(str(error))
    found_machine = machine(chosen.threads)
    console = Console(width=110)
    console.print(machine_line(found_machine))
    with tempfile.TemporaryDirectory(prefix="headline-") as name:
        folder = Path(name)
        teacher = chosen.teacher or folder / f"random-{chosen.shape}.gguf"
        if chosen.teacher is None:
            write(teacher, shape_of(chosen.shape, chosen.vocab), chosen.quant, 0)
        job = Job(
            teacher=teacher,
            student=chosen.student_size,
            samples=chosen.samples,
            length=chosen.length,
            epochs=chosen.epochs,
            batch_size=chosen.batch_size,
            threads=chosen.threads,
            settings=tuple(chosen.set),
            live_precision=chosen.live_precision,
            trl_python=python,
        )
        runs = compare(job, prepare(job, folder), chosen.only, chosen.repeats)
    result = summary(runs)
    show(job, runs, result, console)
    if chosen.json:
        content = {
            "machine": found_machine,
            "job": vars(job) | {"teacher": str(teacher), "trl_python": str(python)},
            "medians": result,
            "runs": {side: [vars(run) for run in measured] for side, measured in runs.items()},
        }
        write_json(chosen.json, content)


if __name__ == "__main__":
    main()
