"""The table at the end of a run."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from distill.errors import UserError
from distill.evaluation.scorers import STORED_TARGETS
from distill.runs.folder import RunFolder
from distill.runtime.format import human_bytes, human_count
from distill.runtime.progress import Console


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
    teacher, student = results["teacher"], results["student"]
    table = Table(title=f"{teacher['name']} → {student['size']} SO8T", title_justify="left")
    for column, justify in (("", "left"), ("teacher", "right"), ("student", "right"), ("", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_row(
        "parameters",
        human_count(teacher["parameters"]),
        human_count(student["parameters"]),
        _times(teacher["parameters"] / student["parameters"], "fewer", "more"),
    )
    table.add_row(
        "file size",
        human_bytes(teacher["file_bytes"]),
        human_bytes(student["file_bytes"]),
        f"{_times(teacher['file_bytes'] / student['file_bytes'], 'smaller', 'larger')} ({student['quant']})",
    )
    _add_scores(table, results["evaluation"])
    _add_heads(table, results.get("heads", {}))
    for kind, words in (("generation", "writing"), ("prompt", "reading")):
        _add_speed(table, f"llama.cpp, {words} (tokens/s)", results["tokens_per_second"], kind)
    return table


def _times(ratio: float, less: str, more: str) -> str:
    """How many times less than the teacher's, or more."""
    return f"{ratio:.1f}× {less}" if ratio >= 1 else f"{1 / ratio:.1f}× {more}"


def _add_scores(table: Table, evaluation: dict[str, Any]) -> None:
    """Rows of what was measured on held-out text; nothing is said of the teacher that is not known."""
    before, after = evaluation["before"], evaluation["exported"]
    stored = evaluation.get("against") == STORED_TARGETS
    if stored:
        over = evaluation["kl_over"]
        table.caption = f"Measured against the teacher's stored soft targets; KL over the {over}."
        table.caption_justify = "left"
    known = evaluation.get("teacher")
    about = "≈ " if stored and known and known["approximate"] else ""
    table.add_row(
        f"KL to {'targets' if stored else 'teacher'} (nats/token)",
        "0",
        f"{after['kl']:.3f}",
        f"{before['kl']:.3f} before training",
    )
    table.add_row(
        "same top token", "100 %", f"{after['agreement']:.1%}", f"{before['agreement']:.1%} before training"
    )
    table.add_row(
        "perplexity, held-out text",
        f"{about}{known['perplexity']:.2f}" if known else "",
        f"{after['perplexity']:.2f}",
        f"{before['perplexity']:,.0f} before training",
    )


def _add_heads(table: Table, heads: dict[str, Any]) -> None:
    """Rows of the safety and the verification head, where the student has them."""
    if "safety" in heads:
        test = heads["safety"]["test"]
        shown = [test[name] for name in ("refuse_recall", "escalate_precision", "allow_precision")]
        table.add_row(
            "refuse recall, escalate and allow precision",
            "",
            " · ".join("–" if value is None else f"{value:.1%}" for value in shown),
            f"{test['prompts']} held-out prompts, labels: {escape(heads['safety']['labels_from'])}",
        )
    if "verification" in heads:
        found = heads["verification"]
        cascade = found["at_trust"]
        known = "–" if found["auroc"] is None else f"AUROC {found['auroc']:.3f}"
        table.add_row(
            "knows where it agrees with the teacher",
            "",
            known,
            f"calibration error {found['calibration_error']:.3f}; {cascade['agreement']:.1%} agree where the teacher "
            f"answers {cascade['escalated']:.0%}",
        )


def _add_speed(table: Table, title: str, speeds: dict[str, dict[str, float]], kind: str) -> None:
    student = speeds["student"][kind]
    if "teacher" not in speeds:  # it was not here to be measured
        table.add_row(title, "", f"{student:,.0f}", "")
        return
    teacher = speeds["teacher"][kind]
    table.add_row(title, f"{teacher:,.0f}", f"{student:,.0f}", f"{student / teacher:.1f}×")


def _print_files(folder: RunFolder, console: Console) -> None:
    file = shlex.quote(str(folder.gguf))
    again = f"{_program()} report {shlex.quote(str(folder.path))}"
    for title, text in (
        ("Files", f"{folder.gguf}   (everything of the run: {folder.path})"),
        ("Report", str(folder.report) if folder.report.exists() else again),
        ("Model card", str(folder.card)),
        ("Chat", f"{_program()} chat {file}"),
        (
            "Elsewhere",
            f"llama-cli -m {file}, or ollama create student -f {shlex.quote(str(folder.modelfile))}",
        ),
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
