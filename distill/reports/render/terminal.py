"""A report in the terminal."""

from __future__ import annotations

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.table import Table as RichTable

from distill.reports.document import Document, Fact, Section, Table
from distill.runtime.printable import printable_line

ROOMY = 140  # columns of a terminal that is wide enough for every table
SIGNS = {"good": "[green]✓[/]", "plain": "[dim]·[/]", "warning": "[yellow]![/]"}


def print_report(document: Document, console: RichConsole) -> None:
    """Print a report: the verdict, or one for each, then its tables."""
    console.print(f"[bold]{escape(printable_line(document.title))}[/]", soft_wrap=True)
    for heading, facts in document.verdicts:
        if heading:
            console.print(f"\n[bold]{escape(printable_line(heading))}[/]", soft_wrap=True)
        print_facts(facts, console)
    for section in document.sections:
        if section.tables or section.words:
            print_section(section, console)


def print_facts(facts: list[Fact], console: RichConsole) -> None:
    """Print facts, each behind the sign of its level."""
    grid = RichTable.grid(padding=(0, 1))
    for fact in facts:
        grid.add_row(SIGNS[fact.level], escape(printable_line(fact.text)))
    console.print(grid)


def print_section(section: Section, console: RichConsole) -> None:
    """Print one part of a report."""
    console.print(f"\n[bold underline]{escape(section.title)}[/]")
    for words in section.words:
        console.print(escape(printable_line(words)))
    for table in section.tables:
        console.print(_rich(table, console.width))


def _rich(table: Table, width: int) -> RichTable:
    """The same table for a terminal of that width."""
    title = escape(printable_line(table.title)) or None
    rich = RichTable(title=title, title_justify="left", show_header=any(table.head))
    columns = [
        place for place in range(len(table.head)) if width >= ROOMY or place not in table.spare
    ]
    for place, head in ((place, table.head[place]) for place in columns):
        right = place > 0 and not table.wide
        rich.add_column(
            escape(printable_line(head)), justify="right" if right else "left", overflow="fold"
        )
    for row in table.rows[: table.shown or None]:
        rich.add_row(*(escape(printable_line(row[place])) for place in columns))
    left = len(table.rows) - table.shown if table.shown else 0
    note = (
        f"{table.note} {left:,} more rows are on the page (--output)." if left > 0 else table.note
    )
    if note:
        rich.caption, rich.caption_justify = escape(printable_line(note.strip())), "left"
    return rich
