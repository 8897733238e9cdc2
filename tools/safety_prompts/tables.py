"""The grammar's text tables, read: sections of lines, nouns by class, and how a line is filled in.

A line is a pattern: ``(a|b|)`` is one of several, ``{thing}`` a noun of that class, ``{n}`` a
number. A ``#`` begins a comment, ``@name`` a section.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

Language = Literal["en", "ja"]
LANGUAGES: tuple[Language, ...] = ("en", "ja")
Item = TypeVar("Item")
TEXT = Path(__file__).parent / "text"
_CHOICE = re.compile(r"\(([^()]*)\)")
_SLOT = re.compile(r"\{(\w+)\}")


class Deck(random.Random):
    """Random numbers whose ``choice`` deals: every element once before any comes again, so that
    few prompts use as many words as they can."""

    def __init__(self, seed: str) -> None:
        super().__init__(seed)
        self._left: dict[tuple[object, ...], list[object]] = {}

    def choice(self, seq: Sequence[Item]) -> Item:  # type: ignore[override]
        key = tuple(seq)
        left = self._left.get(key) or self.sample(key, len(key))
        self._left[key] = left
        return left.pop()  # type: ignore[return-value]


def sections(name: str) -> dict[str, list[str]]:
    """Lines of ``text/NAME.txt`` by section."""
    found: dict[str, list[str]] = {}
    current = ""
    for line in (TEXT / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("@"):
            current = line[1:].strip()
        elif line.strip() and not line.startswith("#"):
            found.setdefault(current, []).append(line.strip())
    return found


def nouns() -> dict[str, list[tuple[str, str]]]:
    """English and Japanese nouns by class, from ``text/nouns.txt``."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in sections("nouns")[""]:
        kind, english, japanese = (part.strip() for part in line.split("|"))
        found.setdefault(kind, []).append((english, japanese))
    return found


def choose(pattern: str, draw: random.Random) -> str:
    """One of each ``(a|b)``, inner ones first."""
    while match := _CHOICE.search(pattern):
        chosen = draw.choice(match[1].split("|"))
        pattern = pattern[: match.start()] + chosen + pattern[match.end() :]
    return pattern


def numbers(draw: random.Random) -> dict[str, str]:
    """Numbers that make sense together: n pieces at a price within a budget, few days and many."""
    n, price = draw.randint(2, 12), draw.randint(2, 60)
    total = n * price
    few, low = draw.randint(1, 5), draw.choice((100, 200, 300, 500, 800, 1000))
    return {
        "n": str(n),
        "price": str(price),
        "big": str(-(-total * draw.choice((11, 13, 15, 20)) // 100) * 10),
        "few": str(few),
        "many": str(draw.randint(few + 3, 30)),
        "low": str(low),
        "high": str(low * draw.choice((12, 15, 17, 19)) // 10),
        "amount": f"{draw.choice((900, 1200, 3000, 5500, 20000, 48000)):,}",
    }


def fill(
    pattern: str,
    scene: Mapping[str, Sequence[tuple[str, str]]],
    language: Language,
    draw: random.Random,
    **parts: str,
) -> str:
    """The pattern with everything chosen: nouns of the scene, numbers, and ``parts`` by name."""
    place = LANGUAGES.index(language)
    values: dict[str, str] = numbers(draw) | parts
    if "amount" in values and language == "ja":
        values["amount"] += "円"

    def noun(match: re.Match[str]) -> str:
        name = match[1]
        if name in values:
            return values[name]
        kind = name.lower().removeprefix("a_").rstrip("2")
        word = draw.choice(scene[kind])[place]
        if name.startswith("a_"):
            word = ("an " if word[0] in "aeiou" else "a ") + word
        return word[0].upper() + word[1:] if name[0].isupper() else word

    text = _SLOT.sub(noun, choose(pattern, draw))
    return re.sub(r" +([?.,;!]|$)", r"\1", re.sub(r"  +", " ", text)).strip()
