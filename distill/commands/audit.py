"""``audit verify``: whether a run's log and files are what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distill.commands.options import AsJson

commands = typer.Typer()
audit = typer.Typer(no_args_is_help=True, help="The log of a run, audit.jsonl.")
commands.add_typer(audit, name="audit")


@audit.callback()
def _audit() -> None:
    """The log of a run, audit.jsonl."""


@audit.command()
def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    expect: Annotated[
        str | None,
        typer.Option(
            metavar="HEAD",
            help="A head that was printed before and kept elsewhere: the log must go on from it.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Verify that no line of the log was edited, dropped, inserted or moved, and that the files are
    those it names.

    Exits with 0 if so, with 2 if not.
    """
    from distill.commands.exit_codes import EXIT_USER
    from distill.runs.audit_report import report_verification

    if not report_verification(run, expect, as_json):
        raise typer.Exit(EXIT_USER)
