"""A report in the terminal."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.table import Table as RichTable

from distill.console import Console
from distill.reports.html import write_page
from distill.reports.parts import Section, Table
from distill.reports.paths import weights_among
from distill.reports.report import compare, read_report
from distill.reports.telling import Content, tell
from distill.reports.verdict import Fact
from distill.reports.weight_comparison import compare_weights
from distill.reports.weights import read_weights

ROOMY = 140  # columns of a terminal that is wide enough for every table
SIGNS = {"good": "[green]✓[/]", "plain": "[dim]·[/]", "warning": "[yellow]![/]"}


def report_paths(paths: list[Path], as_json: bool, output: Path | None) -> None:
    """``distill report``: print what is to be said of one run or file of weights, or of two side by side, and write the
    page where one is asked for.

    Raises:
        UserError, TeacherFileError: not one or two runs or files, nothing logged yet, a damaged file, or no place for
            a page.
        OSError: the disk refuses.
    """
    content = read_content(paths, None if as_json else Console())
    if output is not None:
        write_page(content, output)
    if as_json:
        print(json.dumps(content.to_json(), ensure_ascii=False, allow_nan=False))
        return
    console = RichConsole(highlight=False)
    print_report(content, console)
    if output is not None:
        console.print(f"\n[bold]Page[/] {escape(printable(str(output)))}", soft_wrap=True)


def read_content(paths: list[Path], progress: Console | None = None) -> Content:
    """Read what is to be reported on; ``progress`` shows how far that is, where it takes long.

    Raises:
        UserError, TeacherFileError: see ``report_paths``.
    """
    weights = weights_among(paths)
    if not weights:
        reports = [read_report(path, progress) for path in paths]
        return reports[0] if len(reports) == 1 else compare(*reports)
    return read_weights(paths[0], progress) if len(paths) == 1 else compare_weights(paths, progress)


def print_report(content: Content, console: RichConsole) -> None:
    """Print a report: the verdict, or one for each, then its tables."""
    told = tell(content)
    if len(told.verdicts) == 1:
        console.print(f"[bold]{escape(printable(told.title))}[/]", soft_wrap=True)
        _print_verdict(told.verdicts[0][1], console)
    else:
        for heading, facts in told.verdicts:
            console.print(f"[bold]{escape(printable(heading))}[/]", soft_wrap=True)
            _print_verdict(facts, console)
            console.print()
    for section in told.sections:
        if section.tables or len(told.verdicts) == 1:
            _print_section(section, console)


def printable(text: str) -> str:
    """Text of a file without what would steer the terminal."""
    return "".join(sign if sign.isprintable() else "�" for sign in text)


def _print_verdict(facts: list[Fact], console: RichConsole) -> None:
    grid = RichTable.grid(padding=(0, 1))
    for fact in facts:
        grid.add_row(SIGNS[fact.level], escape(printable(fact.text)))
    console.print(grid)


def _print_section(section: Section, console: RichConsole) -> None:
    console.print(f"\n[bold underline]{escape(section.title)}[/]")
    for words in section.words:
        console.print(escape(printable(words)))
    for table in section.tables:
        console.print(_rich(table, console.width))


def _rich(table: Table, width: int) -> RichTable:
    """The same table for a terminal of that width."""
    title = escape(printable(table.title)) or None
    rich = RichTable(title=title, title_justify="left", show_header=any(table.head))
    columns = [place for place in range(len(table.head)) if width >= ROOMY or place not in table.spare]
    for place, head in ((place, table.head[place]) for place in columns):
        right = place > 0 and not table.wide
        rich.add_column(escape(printable(head)), justify="right" if right else "left", overflow="fold")
    for row in table.rows[: table.shown or None]:
        rich.add_row(*(escape(printable(row[place])) for place in columns))
    left = len(table.rows) - table.shown if table.shown else 0
    note = f"{table.note} {left:,} more rows are on the page (--output)." if left > 0 else table.note
    if note:
        rich.caption, rich.caption_justify = escape(printable(note.strip())), "left"
    return rich
