"""``doctor``: whether this machine does the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill.commands.options import AsJson

if TYPE_CHECKING:
    from rich.console import Console

    from distill.runtime.machine_checks import Finding


commands = typer.Typer()
COLORS = {"ok": "green", "slow": "yellow", "broken": "red"}


@commands.command()
def doctor(
    teacher: Annotated[
        Path | None,
        typer.Option(help="GGUF file to try llama.cpp with. Default: the example teacher."),
    ] = None,
    gpu_layers: Annotated[
        int, typer.Option(min=-1, help="Layers of it on the GPU; -1: all of them.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Examine this machine: processor, memory, disk, packages, llama.cpp and its self-check, GPUs,
    speed.

    Each line is ok, slow or broken, with what to do. Exits with 1 when the main job would not run
    here.
    """
    from dataclasses import asdict

    from rich.console import Console

    from distill.runtime.doctor import examine
    from distill.runtime.printable import json_line, show_warnings
    from teachers import example_teacher
    from teachers.gguf.file import read_gguf

    if teacher is not None:
        read_gguf(teacher)  # refused before anything is examined

    show_warnings(quiet=True)  # what would be warned of is reported here
    console = Console(highlight=False, quiet=as_json)
    findings = []
    with console.status("examining this machine …"):
        for finding in examine(teacher or example_teacher(), gpu_layers):
            findings.append(finding)
            _print(finding, console)
    broken = [finding.name for finding in findings if finding.level == "broken"]
    if as_json:
        print(
            json_line(
                {"main_job": not broken, "findings": [asdict(finding) for finding in findings]}
            )
        )
    elif broken:
        text = f"[red]The main job would not run here:[/] {', '.join(broken)} must be fixed first."
        console.print(text, soft_wrap=True)
    else:
        console.print(
            "[green]The main job runs here.[/] `distill run` shows it with the example teacher."
        )
    if broken:
        raise typer.Exit(1)


def _print(finding: Finding, console: Console) -> None:
    from distill.runtime.printable import markup

    color = COLORS[finding.level]
    text = markup(finding.text)
    console.print(f"[{color}]{finding.level:<6}[/] {finding.name:<18} {text}", soft_wrap=True)
    if finding.remedy:
        console.print(f"{'':<26}→ {markup(finding.remedy)}", soft_wrap=True)
