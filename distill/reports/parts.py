"""What a report is made of in words: sections of tables, the same in the terminal and on the page."""

from __future__ import annotations

from dataclasses import dataclass, field

from distill.reports.verdict import number

MISSING = "–"


@dataclass(frozen=True)
class Table:
    """Rows under a head. ``wide``: the last column is text and not a figure.

    ``shown``: so many rows are enough in a terminal; 0: all. ``spare``: columns that a narrow one can do without.
    """

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""
    wide: bool = False
    shown: int = 0
    spare: tuple[int, ...] = ()


@dataclass(frozen=True)
class Section:
    """One part of a report. ``key`` names it for the charts that go with it."""

    key: str
    title: str
    words: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def figure(value: float | None) -> str:
    """A figure, or a dash where there is none."""
    return MISSING if value is None else number(value)


def share(value: float | None) -> str:
    """A share in percent, or a dash where there is none."""
    return MISSING if value is None else f"{value:.1%}"
