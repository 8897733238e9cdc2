"""What a run prints at its end: its results, and where its files are."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

from distill.reports.document import Fact
from distill.reports.render.terminal import print_facts, print_section
from distill.reports.run.health import health, health_sentence
from distill.reports.run.sections import result_section
from distill.reports.verdict import run_verdict
from distill.runs.folder import RunFolder
from distill.runs.records import read_records
from distill.runtime.printable import markup
from distill.runtime.progress import Console


def print_results(folder: RunFolder, console: Console) -> None:
    """Print the results of a finished run, as its report has them, and where its files are.

    Raises:
        UserError: a file of the run is damaged.
    """
    records = read_records(folder.path)
    assert records.results is not None, "a finished run has results"
    print_section(result_section(records.results), console.rich)
    verdict, sentence = run_verdict(records), health_sentence(health(records))
    console.rich.print(f"\n[bold]Verdict: {verdict.level}[/]")
    print_facts([*verdict.facts, Fact("plain", sentence)], console.rich)
    console.rich.print()
    _print_files(folder, console)


def _print_files(folder: RunFolder, console: Console) -> None:
    file, modelfile = shlex.quote(str(folder.gguf)), shlex.quote(str(folder.modelfile))
    again = f"{_program()} report {shlex.quote(str(folder.path))}"
    for title, text in (
        ("Files", f"{folder.gguf}   (everything of the run: {folder.path})"),
        ("Report", str(folder.report) if folder.report.exists() else again),
        ("Model card", str(folder.card)),
        ("Chat", f"{_program()} chat {file}"),
        ("Elsewhere", f"llama-cli -m {file}, or ollama create student -f {modelfile}"),
    ):
        console.rich.print(f"[bold]{title:<10}[/] {markup(text)}", soft_wrap=True)


def _program() -> str:
    """How this program was called, so that the printed command works where it is read."""
    called = Path(sys.argv[0])
    if called.name not in ("distill", "distill.exe"):
        return f"{shlex.quote(sys.executable)} -m distill"
    on_path = shutil.which(called.name)
    if on_path is not None and Path(on_path).resolve() == called.resolve():
        return "distill"
    return shlex.quote(str(called))
