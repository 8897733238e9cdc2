"""How a text falls into tokens by a GGUF tokenizer, or by what is left of one.

As llama.cpp does it: user-defined tokens are taken out first; the rest is joined from single
characters (SentencePiece) or bytes (byte-level BPE), always the best-ranked pair first, of equal
ones the leftmost. A byte-level tokenizer's pre-tokenizer does not come in: what is split here is
the text of one token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property

from gguf import TokenType

from teachers.tokenizer.gguf_metadata import SENTENCEPIECE, TokenizerMetadata
from teachers.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from teachers.tokenizer.tokenizer_json import SPACE, visible_bytes

_SIGNS = visible_bytes()


class Pieces:
    """The tokens ``ids`` of a tokenizer, and those merges of its own that need no others.

    A merge of byte-level BPE needs both parts and what it makes; SentencePiece joins whatever
    makes a token.
    """

    def __init__(self, tokenizer: TokenizerMetadata, ids: Iterable[int] | None = None) -> None:
        """``ids``: old ones; ``None``: all."""
        self.tokenizer = tokenizer
        self.sentencepiece = tokenizer.model == SENTENCEPIECE
        chosen = range(len(tokenizer.tokens)) if ids is None else ids
        self.ids: Mapping[str, int] = {tokenizer.tokens[number]: number for number in chosen}
        self._ranks: Mapping[object, float]
        if self.sentencepiece:
            self._ranks = {text: -tokenizer.scores[number] for text, number in self.ids.items()}
            self._whole = False
        else:
            self._ranks = {
                pair: rank
                for rank, pair in enumerate(tokenizer.merges)
                if all(part in self.ids for part in (*pair, pair[0] + pair[1]))
            }
            self._whole = PRE_TOKENIZERS[tokenizer.pre].ignore_merges

    @cached_property
    def _user_defined(self) -> list[str]:
        """User-defined tokens, longest first, as llama.cpp takes them out of a text."""
        tokens = self.tokenizer.tokens
        known = [tokens[number] for number in self.tokenizer.user_defined]
        return sorted((text for text in known if text in self.ids), key=lambda text: -len(text))

    @cached_property
    def _has_user_defined(self) -> re.Pattern[str] | None:
        texts = self._user_defined
        return re.compile("|".join(map(re.escape, texts))) if texts else None

    def join(self, text: str) -> tuple[list[str], list[str]]:
        """What ``text`` (as tokens spell it) is joined into, and all that is made on the way."""
        parts, ranks, made = list(text), self._ranks, []
        while len(parts) > 1:
            best, at = float("inf"), -1
            for place in range(len(parts) - 1):
                left, right = parts[place], parts[place + 1]
                rank = ranks.get(left + right if self.sentencepiece else (left, right))
                if rank is not None and rank < best:
                    best, at = rank, place
            if at < 0:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            made.append(parts[at])
        return parts, made

    def needs(self, number: int) -> frozenset[int]:
        """The tokens that must stay for this one to be made of a text, itself among them: all that
        it is joined from. Empty where no text is ever joined into it.

        Those kept together with their needs are made of a text as before: each merge that made
        them is there, and was the best even among more.
        """
        text = self.tokenizer.tokens[number]
        if number in self.tokenizer.special or number in self.tokenizer.user_defined:
            return frozenset([number])
        if self.tokenizer.kinds[number] == TokenType.BYTE:
            return frozenset([number])
        parts, made = self.join(text)
        if len(parts) > 1:
            return frozenset([number]) if self._whole else frozenset()
        # A character that is no token is written in bytes, which stay.
        return frozenset(self.ids[part] for part in (*text, *made) if part in self.ids)

    def split(self, number: int) -> list[int]:
        """The tokens (old ids) that the text of a token falls into among these."""
        text = self.tokenizer.tokens[number]
        if text in self.ids:
            return [number]
        read_whole = number in self.tokenizer.special or number in self.tokenizer.user_defined
        pattern = self._has_user_defined
        if pattern is None or not pattern.search(text):
            return self._joined(text, read_whole)
        fragments: list[str | int] = [text]
        for token in self._user_defined:
            if token in text:
                fragments = list(_taken_out(fragments, token, self.ids[token]))
        return [
            piece
            for one in fragments
            for piece in ([one] if isinstance(one, int) else self._joined(one, read_whole))
        ]

    def _joined(self, text: str, plain: bool) -> list[int]:
        """``plain``: the text is not in the spelling of tokens that are joined."""
        if plain:
            text = self._spelled(text)
        if self._whole and text in self.ids:
            return [self.ids[text]]
        return [piece for part in self.join(text)[0] for piece in self._known(part)]

    def _spelled(self, text: str) -> str:
        if self.sentencepiece:
            return text.replace(" ", SPACE)
        return "".join(_SIGNS[byte] for byte in text.encode("utf-8"))

    def _known(self, part: str) -> list[int]:
        """A part's own id, or those of its bytes; llama.cpp drops a byte that is no token."""
        if part in self.ids:
            return [self.ids[part]]
        names = (f"<0x{byte:02X}>" for byte in part.encode("utf-8")) if self.sentencepiece else ()
        return [self.ids[name] for name in names if name in self.ids]


def _taken_out(fragments: Iterable[str | int], token: str, number: int) -> Iterable[str | int]:
    """Each occurrence of ``token`` in the texts as its id, from left to right."""
    for one in fragments:
        if isinstance(one, int):
            yield one
            continue
        first, *others = one.split(token)
        if first:
            yield first
        for other in others:
            yield number
            if other:
                yield other
