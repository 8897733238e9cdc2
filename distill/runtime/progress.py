"""What a person sees: stages with progress and time left, notes, and the final table."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from distill.runtime import interrupts
from distill.runtime.printable import markup

LINE_EVERY_SECONDS = 10.0  # between lines of progress where no terminal can draw a bar


class Stage:
    """One stage's progress, in a bar or in lines."""

    def __init__(
        self, console: RichConsole, title: str, total: int | None, bar: Progress | None
    ) -> None:
        self.console = console
        self.title = title
        self.total = total
        self.bar = bar
        self.task: TaskID | None = bar.add_task(title, total=total, note="") if bar else None
        self.started = self.printed = time.monotonic()
        self.outcome = ""

    def update(self, done: int, note: str = "") -> None:
        """Report what is done so far; ``note``: a short remark."""
        interrupts.check()
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, note=markup(note))
            return
        now = time.monotonic()
        if now - self.printed >= LINE_EVERY_SECONDS and self.total:
            self.printed = now
            left = (now - self.started) / max(done, 1) * (self.total - done)
            self.console.print(
                f"  {self.title}: {done}/{self.total}, {left:.0f} s left  {markup(note)}"
            )

    def finish(self, outcome: str) -> None:
        """Set the text of the line that remains when the stage is over."""
        self.outcome = outcome


class Console:
    """Prints to the terminal (or plain lines to a file). ``quiet``: not at all, in all processes
    but the first. ``stderr``: to standard error, where standard output is for other programs."""

    def __init__(self, *, quiet: bool = False, stderr: bool = False) -> None:
        self.rich = RichConsole(highlight=False, emoji=False, quiet=quiet, stderr=stderr)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Stage]:
        """Show a stage while it runs and leave one line with its outcome and duration."""
        interrupts.check()
        started = time.monotonic()
        if self.rich.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description:<16}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[note]}"),
            )
            with Progress(*columns, console=self.rich, transient=True) as bar:
                yield (stage := Stage(self.rich, title, total, bar))
        else:
            yield (stage := Stage(self.rich, title, total, None))
        duration = time.monotonic() - started
        self.seconds[title] = round(duration, 3)
        self.rich.print(
            f"[green]✓[/] {title:<16} [dim]{duration:6.1f} s[/]  {markup(stage.outcome)}"
        )

    def note(self, text: str) -> None:
        """A remark that is good to know."""
        self.rich.print(f"[dim]·[/] {markup(text)}")

    def warn(self, text: str) -> None:
        """A remark that the user should act on or accept."""
        self.rich.print(f"[yellow]! {markup(text)}[/]")
