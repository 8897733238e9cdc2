"""What a run found: ``results.json`` and the table a person reads."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from distill.config import RunConfig
from distill.console import Console, human_bytes, human_count
from distill.engine import TrainingSummary
from distill.errors import UserError
from distill.evaluate import Evaluation
from distill.prove import Proof
from distill.run_folder import RunFolder
from students.export import rotation_figures
from students.model import SO8TForCausalLM
from teachers.base import TeacherInfo
from teachers.store import SoftTargetStore


@dataclass(frozen=True)
class Outcome:
    """Everything the stages of a run found. ``speeds``: prompt and generation tokens per second."""

    config: RunConfig
    teacher: TeacherInfo
    student: SO8TForCausalLM
    store: SoftTargetStore
    store_reused: bool
    training: TrainingSummary
    proof: Proof
    evaluation: Evaluation
    speeds: dict[str, tuple[float, float]]


def build_results(
    outcome: Outcome, file_bytes: int, seconds: dict[str, float], environment: dict[str, Any]
) -> dict[str, Any]:
    """The content of ``results.json``. KL and cross-entropy are in nats per token at temperature 1."""
    teacher = {key: value for key, value in asdict(outcome.teacher).items() if key != "chat_template"}
    training = outcome.training
    scores = {"teacher": outcome.evaluation.teacher, **outcome.evaluation.models}
    return {
        "teacher": teacher,
        "student": {
            "size": outcome.config.student.size,
            "parameters": outcome.student.num_parameters(),
            "file_bytes": file_bytes,
            "quant": outcome.proof.quant,
        },
        "soft_targets": {
            "folder": str(outcome.store.folder),
            "sequences": len(outcome.store),
            "tokens": int(outcome.store.lengths().sum()),
            "bytes": outcome.store.bytes_on_disk(),
            "reused": outcome.store_reused,
            **outcome.store.manifest.identity,
        },
        "training": {
            "steps": training.steps,
            "tokens_seen": training.tokens_seen,
            "seconds": round(training.seconds, 3),
            "continued_from_step": training.continued_from,
            "precision": training.precision,
            "held_out": [{"step": step, **asdict(score)} for step, score in training.scores],
        },
        "evaluation": {
            "positions": outcome.evaluation.positions,
            **{name: asdict(score) | {"perplexity": score.perplexity} for name, score in scores.items()},
        },
        "proof": outcome.proof.to_json(),
        "rotations": rotation_figures(outcome.student),
        "tokens_per_second": {
            name: {"prompt": round(prompt, 1), "generation": round(generation, 1)}
            for name, (prompt, generation) in outcome.speeds.items()
        },
        "stage_seconds": seconds,
        "environment": environment,
    }


def print_table(folder: RunFolder, console: Console) -> None:
    """Print the run's results, read from ``results.json``.

    Raises:
        UserError: the file is damaged.
    """
    try:
        console.rich.print(_table(folder.read_results()))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{folder.results_file} is damaged ({error!r}); delete it and run again") from None
    _print_files(folder, console)


def _table(results: dict[str, Any]) -> Table:
    teacher, student, evaluation = results["teacher"], results["student"], results["evaluation"]
    speeds = results["tokens_per_second"]
    before, after, reference = (evaluation[name] for name in ("before", "exported", "teacher"))

    table = Table(title=f"{teacher['name']} → {student['size']} SO8T", title_justify="left")
    for column, justify in (("", "left"), ("teacher", "right"), ("student", "right"), ("", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_row(
        "parameters",
        human_count(teacher["parameters"]),
        human_count(student["parameters"]),
        f"{teacher['parameters'] / student['parameters']:.1f}× fewer",
    )
    table.add_row(
        "file size",
        human_bytes(teacher["file_bytes"]),
        human_bytes(student["file_bytes"]),
        f"{teacher['file_bytes'] / student['file_bytes']:.1f}× smaller ({student['quant']})",
    )
    table.add_row(
        "KL to teacher (nats/token)", "0", f"{after['kl']:.3f}", f"{before['kl']:.3f} before training"
    )
    table.add_row(
        "same top token", "100 %", f"{after['agreement']:.1%}", f"{before['agreement']:.1%} before training"
    )
    table.add_row(
        "perplexity, held-out text",
        f"{reference['perplexity']:.2f}",
        f"{after['perplexity']:.2f}",
        f"{before['perplexity']:,.0f} before training",
    )
    table.add_row(
        "llama.cpp, writing (tokens/s)",
        f"{speeds['teacher']['generation']:,.0f}",
        f"{speeds['student']['generation']:,.0f}",
        f"{speeds['student']['generation'] / speeds['teacher']['generation']:.1f}×",
    )
    table.add_row(
        "llama.cpp, reading (tokens/s)",
        f"{speeds['teacher']['prompt']:,.0f}",
        f"{speeds['student']['prompt']:,.0f}",
        f"{speeds['student']['prompt'] / speeds['teacher']['prompt']:.1f}×",
    )
    return table


def _print_files(folder: RunFolder, console: Console) -> None:
    file = shlex.quote(str(folder.gguf))
    for title, text in (
        ("Files", f"{folder.gguf}   (everything of the run: {folder.path})"),
        ("Chat", f"{_program()} chat {file}"),
        ("Elsewhere", f"llama-cli -m {file}"),
    ):
        console.rich.print(f"[bold]{title:<10}[/] {escape(text)}", soft_wrap=True)


def _program() -> str:
    """How this program was called, so that the printed command works where it is read."""
    called = Path(sys.argv[0])
    if called.name not in ("distill", "distill.exe"):
        return f"{shlex.quote(sys.executable)} -m distill"
    on_path = shutil.which(called.name)
    if on_path is not None and Path(on_path).resolve() == called.resolve():
        return "distill"
    return shlex.quote(str(called))
