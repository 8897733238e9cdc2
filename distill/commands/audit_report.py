"""What ``distill audit verify`` says."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.markup import escape

from distill.commands.exit_codes import EXIT_USER
from distill.errors import UserError
from distill.runs.audit_verify import Verification, verify
from distill.runtime.printable import json_line, printable
from distill.runtime.progress import Console

CHECKPOINTS = "checkpoints/"


def report_verification(folder: Path, expect: str | None, as_json: bool) -> None:
    """Verify a run's log and print what was found.

    Raises:
        UserError: there is no log, or something is not as it was written; the first such thing is
        named. typer.Exit: the same, where ``as_json`` has said it.
    """
    found = verify(folder, expect.strip().lower() if expect is not None else None)
    if as_json:
        print(json_line(found.to_json()))
        if not found.intact:
            raise typer.Exit(EXIT_USER)
        return
    _print(found, folder)
    if not found.intact:
        more = f"; {len(found.findings) - 1} more above" if len(found.findings) > 1 else ""
        raise UserError(
            f"{folder} is not what was written: {printable(found.findings[0].words)}{more}; "
            "compare with a copy, or "
            "make the run again"
        )


def _print(found: Verification, folder: Path) -> None:
    console = Console()
    for finding in found.findings:
        console.rich.print(f"[red]✗[/] {escape(printable(finding.words))}", soft_wrap=True)
    for note in found.notes:
        console.note(printable(note))
    events = ", ".join(f"{name} {count}" for name, count in sorted(found.events.items()))
    times = f"{found.first_time} to {found.last_time}"
    console.rich.print(f"{found.head.lines} lines, {escape(printable(times))}", soft_wrap=True)
    console.rich.print(escape(printable(events)), soft_wrap=True)
    console.rich.print(
        f"{len(found.checked)} files are as the log names them{_gone(found)}", soft_wrap=True
    )
    if found.intact:
        console.rich.print(
            f"[green]✓[/] the log of {escape(str(folder))} is intact. It ends at "
            f"{found.head.sha256}: kept elsewhere, "
            "--expect shows later that it was not written anew",
            soft_wrap=True,
        )


def _gone(found: Verification) -> str:
    """What is to be said of files that are no longer there."""
    old = sum(name.startswith(CHECKPOINTS) for name in found.gone)
    others = [name for name in found.gone if not name.startswith(CHECKPOINTS)]
    parts = [f"{old} of older checkpoints are gone, as they should be"] if old else []
    parts += [f"{escape(printable(', '.join(others)))}: no longer there"] if others else []
    return "".join(f"; {part}" for part in parts)
