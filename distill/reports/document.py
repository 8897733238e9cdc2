"""What a report is made of: facts, tables, sections and charts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Table:
    """Rows under a head. ``wide``: the last column is text and not a figure.

    ``shown``: so many rows are enough in a terminal; 0: all. ``spare``: columns that a narrow one
    can do without.
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


@dataclass(frozen=True)
class Curve:
    """One figure over steps; ``None`` where it was not finite."""

    steps: list[int]
    values: list[float | None]


@dataclass(frozen=True)
class Chart:
    """A chart with a title and a sentence that says what to see in it.

    ``wide``: over the whole width.
    """

    key: str
    title: str
    words: str
    figure: dict[str, Any]
    wide: bool = False


Level = Literal["good", "plain", "warning"]


@dataclass(frozen=True)
class Fact:
    """One sentence or two; ``warning``: worth a look."""

    level: Level
    text: str


@dataclass(frozen=True)
class Document:
    """A report in words, tables and charts. ``verdicts``: facts, each under a heading where there
    are several; ``charts``: by the key of the section they go with."""

    title: str
    lead: str
    verdicts: list[tuple[str, list[Fact]]]
    sections: list[Section]
    charts: dict[str, list[Chart]]
