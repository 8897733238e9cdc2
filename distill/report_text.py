"""A report in the terminal."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.table import Table as RichTable

from distill.errors import UserError
from distill.report import Comparison, Report, compare, read_report
from distill.report_html import write_page
from distill.report_tables import Section, Table, comparison_sections, sections
from distill.report_verdict import Fact

SIGNS = {"good": "[green]✓[/]", "plain": "[dim]·[/]", "warning": "[yellow]![/]"}


def report_runs(paths: list[Path], as_json: bool, output: Path | None) -> None:
    """``distill report``: print one run, or two side by side, and write the page where one is asked for.

    Raises:
        UserError: not one or two runs' folders, nothing logged yet, a damaged file, or no place for a page.
        OSError: the disk refuses.
    """
    if len(paths) > 2:
        raise UserError(f"{len(paths)} runs are too many: give one, or two to compare")
    reports = [read_report(path) for path in paths]
    content = reports[0] if len(reports) == 1 else compare(*reports)
    if output is not None:
        write_page(content, output)
    if as_json:
        print(json.dumps(content.to_json(), ensure_ascii=False, allow_nan=False))
        return
    console = RichConsole(highlight=False)
    if isinstance(content, Comparison):
        print_comparison(content, console)
    else:
        print_report(content, console)
    if output is not None:
        console.print(f"\n[bold]Page[/] {escape(printable(str(output)))}", soft_wrap=True)


def print_report(report: Report, console: RichConsole) -> None:
    """Print one run's report: the verdict, then its tables."""
    console.print(f"[bold]{escape(printable(report.name))}[/]", soft_wrap=True)
    _print_verdict(report.verdict, console)
    for section in sections(report):
        _print_section(section, console)


def print_comparison(comparison: Comparison, console: RichConsole) -> None:
    """Print two runs side by side, after each one's verdict."""
    for letter, report in (("A", comparison.first), ("B", comparison.second)):
        console.print(f"[bold]{letter}: {escape(printable(report.name))}[/]", soft_wrap=True)
        _print_verdict(report.verdict, console)
        console.print()
    for section in comparison_sections(comparison):
        if section.tables:
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
        console.print(_rich(table))


def _rich(table: Table) -> RichTable:
    """The same table for the terminal."""
    title = escape(printable(table.title)) or None
    rich = RichTable(title=title, title_justify="left", show_header=any(table.head))
    for place, head in enumerate(table.head):
        right = place > 0 and not table.wide
        rich.add_column(escape(printable(head)), justify="right" if right else "left", overflow="fold")
    for row in table.rows:
        rich.add_row(*(escape(printable(cell)) for cell in row))
    if table.note:
        rich.caption, rich.caption_justify = escape(printable(table.note)), "left"
    return rich
