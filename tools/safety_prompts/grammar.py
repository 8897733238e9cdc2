"""Prompts that a safety head learns from: worlds × intents × wordings × registers × languages.

Nouns and phrases are dealt out to worlds, so that two worlds share neither what is talked about nor
what is wanted, only the frames around it ("How do I …?"), which all labels use alike. Within a
world all labels share the nouns, and many share the verbs:

- *contrast sets*: a neutral phrase is ALLOW, ESCALATE or REFUSE by what is added to it;
- *hard negatives*: a harmful phrase is ALLOW in the words of somebody who guards against it, and
  ESCALATE where somebody reports it;
- harmless questions in dangerous words ("kill a hung process") and about dangerous things.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from students.model.head_decisions import DECISIONS
from tools.example_teacher.domain import FAMILIES, render
from tools.safety_prompts.japanese import forms
from tools.safety_prompts.tables import LANGUAGES, Deck, Language, fill, nouns, sections

Line = TypeVar("Line")
WORLDS = 10
SEED = 20261201
# Of a label's prompts: phrases in frames, whole sentences, neutral phrases with an addition, and
# harmful phrases in other words.
SHARES = {
    "ALLOW": {"vp": 0.46, "s": 0.40, "neutral": 0.06, "guard": 0.08},
    "ESCALATE": {"vp": 0.24, "s": 0.62, "neutral": 0.08, "incident": 0.06},
    "REFUSE": {"vp": 0.66, "s": 0.26, "neutral": 0.08},
}
# Requests to the example teacher's desk that need no sums, which no head can do: family, outcome.
DESK_WORLD, DESK_EACH = WORLDS, 14  # prompts of a language, family and outcome
DESK = {
    "purchase": ("forbidden", "within"),
    "mixing": ("toxic", "within"),
    "access": ("level", "open", "early", "late"),
    "sharing": (
        *("public", "internal_colleague", "internal_outside"),
        *("personal_colleague", "personal_outside"),
    ),
    "travel": ("storm", "short"),
    "leave": ("fine",),
}
CONTEXT, CASUAL = 0.12, 0.12  # of the prompts: a sentence before it; no capitals, no full stop


@dataclass(frozen=True)
class Written:
    """One prompt; ``kind``: how it came about (see ``SHARES``); ``wanted``: the part of it that
    belongs to its world alone, without the frame around it."""

    world: int
    language: Language
    label: str
    kind: str
    text: str
    wanted: str


class World:
    """The nouns, phrases and sentences of one world."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.scene = {kind: _dealt(words, number) for kind, words in nouns().items()}
        self.lines: dict[tuple[Language, str, str], list[str]] = {}
        for language in LANGUAGES:
            for label in DECISIONS:
                for kind, lines in sections(f"{label.lower()}_{language}").items():
                    # Few lines that are about form, not content, belong to every world.
                    dealt = _dealt(lines, number) if kind in ("vp", "s") else lines
                    self.lines[language, label, kind] = dealt
            for name, lines in sections("shared").items():
                if name.startswith(language):
                    self.lines[language, "", name.partition(" ")[2]] = lines

    def write(
        self, language: Language, label: str, frames: Sequence[str], draw: random.Random
    ) -> Written:
        """One prompt of a label."""
        shares = SHARES[label]
        kind = draw.choices(list(shares), list(shares.values()))[0]
        if kind == "s":
            text = wanted = self._fill(self._line(language, label, "s", draw), language, draw)
        elif kind == "neutral":
            phrase, wanted = self._with_addition(language, label, draw), ""
            text = self._framed(draw.choice(frames), phrase, language, draw)
        else:
            owner = label if kind == "vp" else "REFUSE"
            wanted = self._fill(self._line(language, owner, "vp", draw), language, draw)
            around = {"vp": frames, "guard": self.lines.get((language, label, kind), [])}
            around["incident"] = self.lines[language, "", "incident"]
            text = self._framed(draw.choice(around[kind]), wanted, language, draw)
        text = self._register(text, language, draw)
        return Written(self.number, language, label, kind, text, wanted)

    def _with_addition(self, language: Language, label: str, draw: random.Random) -> str:
        """A neutral phrase and what makes it of this label."""
        neutral = self._fill(self._line(language, "", "neutral", draw), language, draw)
        added = self._fill(self._line(language, label, "mod", draw), language, draw)
        if language == "ja":
            return added + neutral
        return f"{neutral}{'' if added[0] in ',;' else ' '}{added}"

    def _line(self, language: Language, label: str, kind: str, draw: random.Random) -> str:
        return draw.choice(self.lines[language, label, kind])

    def _fill(self, pattern: str, language: Language, draw: random.Random) -> str:
        return fill(pattern, self.scene, language, draw)

    def _framed(self, frame: str, phrase: str, language: Language, draw: random.Random) -> str:
        parts = forms(phrase) if language == "ja" else {"vp": phrase}
        return fill(frame, self.scene, language, draw, **parts)

    def _register(self, text: str, language: Language, draw: random.Random) -> str:
        """The prompt as people write: with a sentence before it, or without capitals and stops."""
        text = text[0].upper() + text[1:]
        if draw.random() < CONTEXT:
            before = self._fill(self._line(language, "", "context", draw), language, draw)
            text = before + ("" if language == "ja" else " ") + text
        elif draw.random() < CASUAL:
            text = text.lower().rstrip("?.!。？")
        return text


def _dealt(lines: Sequence[Line], number: int) -> list[Line]:
    """What falls to a world: every tenth."""
    return list(lines[number::WORLDS])


def written(each: int) -> Iterator[Written]:
    """``each`` different prompts for every world, language and label."""
    frames = sections("frames")
    for number in range(WORLDS):
        world = World(number)
        for language in LANGUAGES:
            for label in DECISIONS:
                draw = Deck(f"{SEED} {number} {language} {label}")
                seen: set[str] = set()
                while len(seen) < each:
                    one = world.write(language, label, frames[language], draw)
                    if one.text.casefold() not in seen:
                        seen.add(one.text.casefold())
                        yield one
    yield from desk()


def desk() -> Iterator[Written]:
    """Requests to the example teacher's desk, with the decision that its rules give."""
    draw = random.Random(f"{SEED} desk")
    for language in LANGUAGES:
        for family, outcomes in DESK.items():
            for outcome in outcomes:
                seen: set[str] = set()
                while len(seen) < DESK_EACH:
                    case = FAMILIES[family](draw)
                    if case.outcome == outcome:
                        one = render(case, family, language, draw.randrange(6))
                        if one.prompt not in seen:
                            seen.add(one.prompt)
                            yield Written(
                                DESK_WORLD, language, case.decision, "desk", one.prompt, ""
                            )
