"""What ``distill audit verify`` prints."""

from __future__ import annotations

from pathlib import Path

from distill.errors import UserError
from distill.runs.audit_verify import Verification, verify
from distill.runtime.printable import json_line, markup, printable
from distill.runtime.progress import Console

CHECKPOINTS = "checkpoints/"


def report_verification(folder: Path, expect: str | None, as_json: bool) -> bool:
    """Verify a run's log, print the result, and return whether all is as it was written.

    Raises:
        UserError: there is no log, or, without ``as_json``, something is not as it was written;
            names the first.
    """
    result = verify(folder, expect.strip().lower() if expect is not None else None)
    if as_json:
        print(json_line(result.to_json()))
        return result.intact
    _print(result, folder)
    if not result.intact:
        more = f"; {len(result.findings) - 1} more above" if len(result.findings) > 1 else ""
        raise UserError(
            f"{folder} is not what was written: {printable(result.findings[0].message)}{more}; "
            "compare with a copy, or make the run again"
        )
    return True


def _print(result: Verification, folder: Path) -> None:
    console = Console()
    for finding in result.findings:
        console.rich.print(f"[red]✗[/] {markup(finding.message)}", soft_wrap=True)
    for note in result.notes:
        console.note(note)
    events = ", ".join(f"{name} {count}" for name, count in sorted(result.events.items()))
    times = f"{result.first_time} to {result.last_time}"
    console.rich.print(f"{result.head.lines} lines, {markup(times)}", soft_wrap=True)
    console.rich.print(markup(events), soft_wrap=True)
    console.rich.print(
        f"{len(result.checked)} files are as the log names them{_gone(result)}", soft_wrap=True
    )
    if result.intact:
        console.rich.print(
            f"[green]✓[/] the log of {markup(str(folder))} is intact. It ends at "
            f"{result.head.sha256}: kept elsewhere, --expect shows later that it was not written "
            "anew",
            soft_wrap=True,
        )


def _gone(result: Verification) -> str:
    """A clause about files that are no longer there."""
    old = sum(name.startswith(CHECKPOINTS) for name in result.gone)
    others = [name for name in result.gone if not name.startswith(CHECKPOINTS)]
    parts = [f"{old} of older checkpoints are gone, as they should be"] if old else []
    parts += [f"{markup(', '.join(others))}: no longer there"] if others else []
    return "".join(f"; {part}" for part in parts)
