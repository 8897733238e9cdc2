"""Markdown of things that somebody else has named: text that can be nothing but text, file names,
tables.

What is special in CommonMark and in GitHub's and the Hub's additions to it (tables, links without
brackets, formulas) is escaped by a backslash; nothing can end the line or the cell it is in.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PureWindowsPath

from distill.reports.document import Section, Table

LONGEST = 160  # characters of one name
_SPECIAL = re.compile(r"[\\`*_\[\]<>|~&@$]|(?<=www)\.|:(?=//)", re.IGNORECASE)
_PLAIN_NAME = re.compile(r"[\w.()+,=@ -]+")
_ROOT = r"(?:~?[/\\]|[A-Za-z]:[/\\])"
_ABSOLUTE, _ABSOLUTE_WORD = re.compile(rf"{_ROOT}\S"), re.compile(rf"(?<!\S){_ROOT}\S+")


class Markdown(str):
    """Text that is Markdown already."""


def one_line(text: object, longest: int = LONGEST) -> str:
    """Text of a file in one line, without signs that cannot be seen, and not without end."""
    signs = "".join(
        sign if sign.isprintable() else " " if sign.isspace() else "�" for sign in str(text)
    )
    line = " ".join(signs.split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def without_folders(text: object) -> str:
    """Text in one line; of a path that begins at a root only its last part: a home folder tells who
    one is.

    Several names may be joined by `` + ``, as those of several teachers are.
    """
    parts = []
    for part in one_line(text, longest=2000).split(" + "):
        if _ABSOLUTE.match(part):
            part = last_part(part)
        parts.append(_ABSOLUTE_WORD.sub(lambda result: last_part(result[0]), part))
    return " + ".join(parts)


def last_part(path: str) -> str:
    """The last part of a path of whatever system."""
    return PureWindowsPath(path).name


def escaped(value: object) -> Markdown:
    """A value as text that Markdown shows as it is; what is Markdown already stays."""
    if isinstance(value, Markdown):
        return value
    return Markdown(_SPECIAL.sub(r"\\\g<0>", one_line(value, longest=2000)))


def code(name: str) -> Markdown:
    """A file's name or a hash as code, or as mere text where it has signs that code could not
    hold."""
    return Markdown(f"`{name}`") if _PLAIN_NAME.fullmatch(name) else escaped(name)


def section(part: Section) -> Markdown:
    """A part of a report under its heading; of absolute paths in it only the last part."""
    blocks = [f"## {escaped(part.title)}", *(escaped(without_folders(text)) for text in part.words)]
    for table in part.tables:
        blocks += [f"### {escaped(table.title)}"] if table.title else []
        blocks += [_table(table), *([escaped(without_folders(table.note))] if table.note else [])]
    return Markdown("\n\n".join(blocks))


def _table(table: Table) -> str:
    """Every column but the first is aligned to the right, unless the columns hold text."""
    rule = ["---", *(["---" if table.wide else "---:"] * (len(table.head) - 1))]
    rows: list[Sequence[str]] = [table.head, [Markdown(cell) for cell in rule], *table.rows]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _cell(text: str) -> str:
    return escaped(text if isinstance(text, Markdown) else without_folders(text))
