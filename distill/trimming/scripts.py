"""Letters that a reduced vocabulary has no token for any more, by the script they are of."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from gguf import TokenType

from teachers.tokenizer.gguf_metadata import SENTENCEPIECE
from teachers.tokenizer.tokenizer_json import visible_bytes
from teachers.vocabulary.selection import Vocabulary

WORTH_A_WARNING = 1e-3  # of all letters of the text


@dataclass(frozen=True)
class LostScript:
    """``share``: of the script's letters in a text those written in bytes from now on;
    ``of_text``: the same of all its letters."""

    name: str
    share: float
    of_text: float


def lost_scripts(
    vocabulary: Vocabulary, kept: Iterable[int], text: Counter[str]
) -> list[LostScript]:
    """Scripts of which some letters of the text had a token and have none, the most lost first.

    ``text``: how often each character occurs.
    """
    letters = {sign: count for sign, count in text.items() if sign.isalpha()}
    total = sum(letters.values())
    before = _characters(vocabulary, range(len(vocabulary)))
    after = _characters(vocabulary, kept)
    all_of: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    for sign, count in letters.items():
        script = unicodedata.name(sign, "unnamed").partition(" ")[0].capitalize()
        all_of[script] += count
        if sign in before and sign not in after:
            lost[script] += count
    return [
        LostScript(script, count / all_of[script], count / total)
        for script, count in lost.most_common()
    ]


def _characters(vocabulary: Vocabulary, ids: Iterable[int]) -> set[str]:
    """Every character that some token holds whole."""
    metadata = vocabulary.tokenizer
    tokens = metadata.tokens
    if metadata.model == SENTENCEPIECE:
        joined = (TokenType.NORMAL, TokenType.USER_DEFINED)
        return {sign for n in ids if metadata.kinds[n] in joined for sign in tokens[n]}
    bytes_of = {sign: byte for byte, sign in visible_bytes().items()}
    found: set[str] = set()
    for number in ids:
        raw = bytes(bytes_of[sign] for sign in tokens[number] if sign in bytes_of)
        found.update(raw.decode("utf-8", errors="ignore"))
    return found
