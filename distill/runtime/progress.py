"""What a person sees: stages with progress and time left, notes, and the final table."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from distill.runtime import interrupts
from distill.runtime.format import human_time
from distill.runtime.printable import markup

SLOW_SECONDS = 2.0  # after which what is usually quick is shown
LINE_EVERY_SECONDS = 10.0  # between lines of progress where no terminal can draw a bar
SEEN_SECONDS, SEEN_REPORTS = 5.0, 4  # of progress before anything is said about the time left


class TimeLeft:
    """Time left, by the speed in the newer half of the time since the first progress: how long that
    took, what was done before, and a slow start do not count."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque()  # time and share done
        self._first, self._reports = 0.0, 0

    def report(self, now: float, share: float) -> None:
        """``share`` of the work, 0 to 1, is done at ``now``, in seconds."""
        if not self._seen or share < self._seen[-1][1]:  # taken back: measured anew
            self._seen.clear()
            self._first, self._reports = now, 0
        if not self._seen or share > self._seen[-1][1]:
            if self._reports == 1:
                self._seen.clear()
                self._first = now
            self._seen.append((now, share))
            self._reports += 1
        while len(self._seen) > 2 and self._seen[1][0] <= (self._first + now) / 2:
            self._seen.popleft()

    def seconds(self, now: float) -> float | None:
        """Seconds left at ``now``; ``None`` as long as too little was seen."""
        if self._reports < SEEN_REPORTS or now - self._first < SEEN_SECONDS:
            return None
        (start, before), (_, share) = self._seen[0], self._seen[-1]
        return max(0.0, (1.0 - share) * (now - start) / (share - before))


class Stage:
    """One stage's progress, in a bar or in lines."""

    def __init__(
        self, console: RichConsole, title: str, total: int | None, bar: Progress | None
    ) -> None:
        self.console = console
        self.title = title
        self.total = total
        self.bar = bar
        self.task: TaskID | None = (
            bar.add_task(title, total=total, note="", left="") if bar else None
        )
        self.printed = time.monotonic()
        self.left = TimeLeft()
        self.outcome = ""

    def update(self, done: float, note: str = "", share: float | None = None) -> None:
        """Report what is done so far; ``note``: a short remark; ``share``: of the work, where that
        is not in proportion to ``done``."""
        interrupts.check()
        now, left = time.monotonic(), ""
        if self.total:
            self.left.report(now, done / self.total if share is None else share)
            seconds = self.left.seconds(now)
            left = "" if seconds is None else f"{human_time(seconds)} left"
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, note=markup(note), left=left)
        elif now - self.printed >= LINE_EVERY_SECONDS and self.total:
            self.printed = now
            shown = ", ".join(filter(None, (f"{done:,.0f}/{self.total:,}", left)))
            self.console.print(f"  {self.title}: {shown}  {markup(note)}")

    def finish(self, outcome: str) -> None:
        """Set the text of the line that remains when the stage is over."""
        self.outcome = outcome


class Console:
    """Prints to the terminal (or plain lines to a file). ``quiet``: not at all, in all processes
    but the first. ``stderr``: to standard error, where standard output is for other programs.
    ``began``: when its command began, in seconds since the epoch, if not now."""

    def __init__(
        self, *, quiet: bool = False, stderr: bool = False, began: float | None = None
    ) -> None:
        self.rich = RichConsole(highlight=False, emoji=False, quiet=quiet, stderr=stderr)
        self.seconds: dict[str, float] = {}
        self._began = time.time() if began is None else began

    def elapsed(self) -> float:
        """Seconds since its command began."""
        return time.time() - self._began

    @contextmanager
    def stage(
        self, title: str, total: int | None = None, started: float | None = None
    ) -> Iterator[Stage]:
        """Show a stage while it runs and leave one line with its outcome and duration; ``started``:
        by the monotonic clock, if not now."""
        interrupts.check()
        started = time.monotonic() if started is None else started
        if self.rich.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description:<16}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
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

    @contextmanager
    def stage_if_slow(self, title: str) -> Iterator[Callable[[float], None]]:
        """A stage that is shown once it has taken ``SLOW_SECONDS``; gives what is told the share of
        it that is done."""
        started, shown = time.monotonic(), list[Stage]()
        with ExitStack() as stack:

            def tell(share: float) -> None:
                interrupts.check()
                if not shown and time.monotonic() - started > SLOW_SECONDS:
                    shown.append(stack.enter_context(self.stage(title, 100, started)))
                for stage in shown:
                    stage.update(int(100 * share), share=share)

            yield tell

    def note(self, text: str) -> None:
        """A remark that is good to know."""
        self.rich.print(f"[dim]·[/] {markup(text)}")

    def warn(self, text: str) -> None:
        """A remark that the user should act on or accept."""
        self.rich.print(f"[yellow]! {markup(text)}[/]")
