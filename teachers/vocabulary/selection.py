"""Which tokens of a vocabulary stay: what it cannot be without, and the rest by their mass."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from gguf import TokenType
from numpy.typing import NDArray

from teachers.base import Teacher
from teachers.gguf.file import Field
from teachers.tokenizer.chat_template import ChatTemplateError
from teachers.tokenizer.conversation import conversation_tokens
from teachers.tokenizer.gguf_metadata import (
    CHAT_TEMPLATE,
    SENTENCEPIECE,
    TokenizerMetadata,
    read_metadata,
)
from teachers.tokenizer.tokenizer_json import visible_bytes
from teachers.vocabulary.pieces import Pieces
from teachers.vocabulary.reduced import Ids, ReducedVocabulary, VocabularyError
from teachers.vocabulary.size import KEPT_MASS, MORE_TOKENS, VocabularySize

_NO_CUT = {
    "bert": "WordPiece (WPM)",
    "t5": "Unigram (UGM)",
    "rwkv": "RWKV",
    "plamo2": "PLaMo-2",
}
# Control tokens that were set aside for later use and that nobody has named since.
_SPARE = ("unused", "reserved")


class Vocabulary:
    """A teacher's whole vocabulary, from which tokens are chosen."""

    def __init__(self, fields: Mapping[str, Field]) -> None:
        """``fields``: the ``tokenizer.*`` entries of a GGUF file.

        Raises:
            VocabularyError: its tokenizer is of a kind that cannot be cut, or without bytes.
            TokenizerConversionError: malformed metadata, or no tokenizer.json can stand for it.
        """
        stated = fields.get("tokenizer.ggml.model")
        if stated is not None and stated.value in _NO_CUT:
            raise VocabularyError(
                f"its tokenizer is {_NO_CUT[stated.value]}, of which no part is a tokenizer; only "
                "SentencePiece and byte-level BPE can be cut"
            )
        self.tokenizer: TokenizerMetadata = read_metadata(fields)
        self.pieces = Pieces(self.tokenizer)
        self.staying = self._staying(fields)

    def __len__(self) -> int:
        return len(self.tokenizer.tokens)

    def _staying(self, fields: Mapping[str, Field]) -> frozenset[int]:
        """Bytes, tokens with a role, control tokens but spare ones, those in chat templates."""
        metadata = self.tokenizer
        count = len(metadata.tokens)
        templates = "".join(
            str(field.value) for key, field in fields.items() if key.startswith(CHAT_TEMPLATE)
        )
        numbers = [
            field.value
            for key, field in fields.items()
            if key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
        ]
        staying = {number for number in numbers if type(number) is int and 0 <= number < count}
        staying |= {*metadata.roles.values(), *self._bytes()}
        for number in metadata.special | metadata.user_defined:
            text = metadata.tokens[number]
            spare = any(word in text.lower() for word in _SPARE)
            control = number in metadata.special and not spare
            if control or text in templates:
                staying.add(number)
        return frozenset(staying)

    def _bytes(self) -> set[int]:
        metadata = self.tokenizer
        if metadata.model != SENTENCEPIECE:
            ids = self.pieces.ids
            return {ids[sign] for sign in visible_bytes().values() if sign in ids}
        found = {n for n, kind in enumerate(metadata.kinds) if kind == TokenType.BYTE}
        missing = [b for b in range(256) if f"<0x{b:02X}>" not in self.pieces.ids]
        if missing:
            raise VocabularyError(
                f"its SentencePiece tokenizer has no token for {len(missing)} of the 256 bytes "
                f"(such as <0x{missing[0]:02X}>), which dropped tokens would be written in; use a "
                "teacher with byte fallback"
            )
        return found

    def select(
        self,
        mass: NDArray[Any],
        size: VocabularySize,
        *,
        always: Collection[int] = (),
        held_out: NDArray[Any] | None = None,
    ) -> ReducedVocabulary:
        """Choose tokens by their mass, the largest first, each with all that it is joined from.

        ``mass``: ``[V]``, at least 0 each: say, the teacher's probability of every token, summed
        over a corpus, plus how often it occurs. ``always``: ids that stay besides. ``held_out``:
        ``[V]``, how often each token occurs in text that ``mass`` is not of; ``auto`` needs it.

        Raises:
            VocabularyError: fewer tokens than must stay are asked for, or more than there are.
        """
        assert mass.shape == (len(self),), "one mass for each token"
        needed = self.require_room(size, always)
        wanted = size.of(len(self))
        if wanted is None:
            assert held_out is not None, "auto is judged on held-out text"
            kept = self._smallest(needed, mass, held_out)
        else:
            kept = set(needed)
            for group in self._in_order(mass, kept):
                if len(kept) + len(group) <= wanted:
                    kept |= group
                if len(kept) == wanted:
                    break
        return self.reduced(kept)

    def require_room(self, size: VocabularySize, always: Collection[int] = ()) -> set[int]:
        """The tokens that must stay, if ``size`` has room for them.

        Raises:
            VocabularyError: it has not, or it is more than there are.
        """
        wanted = size.of(len(self))
        needed: set[int] = set()
        for number in (*self.staying, *always):
            needed |= self.pieces.needs(number) or {number}
        if wanted is not None and wanted < len(needed):
            raise VocabularyError(
                f"--vocab {wanted}: {len(needed)} tokens must stay (bytes, control tokens, those "
                f"of the chat template, and what they are joined from); ask for {len(needed)} or "
                "more"
            )
        return needed

    def _in_order(self, mass: NDArray[Any], kept: Collection[int]) -> Iterator[set[int]]:
        """What each further token adds to ``kept``, which the caller lets grow meanwhile."""
        for number in np.argsort(-mass, kind="stable").tolist():
            if number not in kept and (needs := self.pieces.needs(number)):
                yield {one for one in needs if one not in kept}

    def _smallest(self, needed: set[int], mass: NDArray[Any], held_out: NDArray[Any]) -> set[int]:
        """The first tokens in order that keep enough of the mass and do not lengthen the text."""
        order, kept, ends = sorted(needed), set(needed), [len(needed)]
        for group in self._in_order(mass, kept):
            kept |= group
            order += sorted(group)
            ends.append(len(order))
        # Of the mass that can be kept: no text is made into the other tokens.
        held = np.cumsum(mass[order])[np.array(ends) - 1]
        sizes = [end for end, part in zip(ends, held, strict=True) if part >= KEPT_MASS * held[-1]]
        low, high = 0, len(sizes) - 1
        while low < high:
            middle = (low + high) // 2
            if self.added_tokens(order[: sizes[middle]], held_out) <= MORE_TOKENS:
                high = middle
            else:
                low = middle + 1
        return set(order[: sizes[low]])

    def added_tokens(self, kept: Collection[int], counts: NDArray[Any]) -> float:
        """How many more tokens, as a share, a text has in which each occurs ``counts`` times.

        Each dropped token is taken to fall into its own pieces, whatever stands beside it.
        """
        pieces = Pieces(self.tokenizer, kept)
        occurring = np.flatnonzero(counts).tolist()
        more = sum(int(counts[number]) * (len(pieces.split(number)) - 1) for number in occurring)
        return more / max(1, int(counts.sum()))

    def reduced(self, kept: Collection[int]) -> ReducedVocabulary:
        """The vocabulary of these tokens, which are all that any of them needs."""
        ids: Ids = np.array(sorted(kept), dtype=np.int64)
        new = {old: place for place, old in enumerate(ids.tolist())}
        pieces = Pieces(self.tokenizer, ids.tolist())
        # The text of no token at all (bytes that are none): nothing better is known of it.
        nowhere = [self.tokenizer.roles.get("unk", int(ids[0]))]
        first = [new[(pieces.split(number) or nowhere)[0]] for number in range(len(self))]
        return ReducedVocabulary(ids, np.array(first, dtype=np.int64))


def template_tokens(teacher: Teacher) -> frozenset[int]:
    """The tokens that the teacher's chat template writes around what is said, if it has one."""
    said = [("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")]
    messages = [{"role": role, "content": text} for role, text in said]
    found: set[int] = set()
    for conversation in (messages, messages[1:]):
        if teacher.info.chat_template is None:
            break
        try:
            found |= set(conversation_tokens(teacher, conversation, answer=True).tolist())
        except ChatTemplateError:  # without a system's words, say
            continue
    return frozenset(found)
