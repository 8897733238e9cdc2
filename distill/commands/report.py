"""``report``: how a run went, or what weights look like."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distill.commands.options import AsJson, Page

commands = typer.Typer()


@commands.command()
def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH [PATH]",
            help="Folder of a run, finished or not; or weights: a checkpoint's folder, a "
            ".safetensors or .gguf file. Two of a kind are compared.",
        ),
    ],
    as_json: AsJson = False,
    output: Page = None,
) -> None:
    """Show how a run went, from its own records, or what weights look like; or compare two."""
    from distill.reports.inputs import check_report

    check_report(paths, output)

    from distill.reports.build import report_paths

    report_paths(paths, as_json, output)
