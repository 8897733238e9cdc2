"""The text that a vocabulary is cut by, in pieces, and the parts of it that judge the result."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.capture.data_rows import DataRows
from distill.errors import UserError
from teachers.base import Progress, Teacher, Tokens
from teachers.store.teacher_record import first_sequences
from teachers.tokenizer.conversation import chat_texts
from teachers.tokenizer.rows import Conversation

PIECE = 1500  # characters, or fewer to the end of a line: a few hundred tokens
MOST_CHARACTERS = 1 << 25  # of the data that are read; what stands behind is left out
HELD_OUT = 10  # one part of so many is held out,
STRETCHES = 10  # in so many stretches over the text: its end alone may be of another subject
LONGEST = 1024  # tokens that are predicted together
TOKENIZED_TOGETHER = 256  # pieces
DECODED_TOKENS = 8_192  # of validation text, on which vocabularies are compared


@dataclass(frozen=True)
class Piece:
    """A piece of text; ``special``: control tokens in it are meant as such."""

    text: str
    special: bool = False

    @property
    def bytes(self) -> int:
        """Length in UTF-8."""
        return len(self.text.encode("utf-8", errors="replace"))


@dataclass(frozen=True)
class TrimText:
    """``training`` decides which tokens stay, ``held_out`` judges it."""

    training: list[Piece]
    held_out: list[Piece]
    whole: bool = True


def text_of(data: DataRows, teacher: Teacher) -> TrimText:
    """The data as text, in pieces.

    Raises:
        UserError: too little of it.
        ChatTemplateError: the teacher's chat template refuses a conversation.
    """
    pieces: list[Piece] = []
    characters = 0
    for piece in _pieces(data, teacher):
        characters += len(piece.text)
        if characters > MOST_CHARACTERS:
            break
        pieces.append(piece)
    if len(pieces) < 2:
        raise UserError(
            f"--data: {characters} characters are too little text to choose tokens by and "
            f"to judge them on; give {2 * PIECE} or more"
        )
    held_out = _stretches(len(pieces))
    return TrimText(
        [piece for place, piece in enumerate(pieces) if place not in held_out],
        [pieces[place] for place in sorted(held_out)],
        characters <= MOST_CHARACTERS,
    )


def _stretches(count: int) -> set[int]:
    """Which of ``count`` pieces are held out: the end of each of ``STRETCHES`` equal parts, each
    several pieces long where there are enough, so that few of them are from the middle of what
    the choice has read."""
    wanted = max(1, count // HELD_OUT)
    parts = min(STRETCHES, wanted)
    held_out: set[int] = set()
    for part in range(parts):
        length = wanted * (part + 1) // parts - wanted * part // parts
        end = count * (part + 1) // parts
        held_out.update(range(end - length, end))
    return held_out


def _pieces(data: DataRows, teacher: Teacher) -> Iterator[Piece]:
    for row in data.rows:
        if isinstance(row, Conversation):
            special = teacher.info.chat_template is not None
            for part in _cut([chat_texts(teacher, [row], answer=False)[0].text]):
                yield Piece(part, special)
        else:
            for part in _cut([row.text] if isinstance(row.text, str) else row.text):
                yield Piece(part)


def _cut(parts: Iterable[str]) -> Iterator[str]:
    """A text in pieces that end with a line, else with a word, else anywhere."""
    rest = ""
    for part in itertools.chain(parts, [None]):
        rest += part or ""
        while len(rest) > PIECE or (part is None and rest):
            end = len(rest) if len(rest) <= PIECE else PIECE
            if len(rest) > PIECE:
                breaks = (rest.rfind(sign, PIECE // 2, PIECE) + 1 for sign in "\n ")
                end = next(filter(None, breaks), PIECE)
            if rest[:end].strip():
                yield rest[:end]
            rest = rest[end:]


def tokenized(teacher: Teacher, pieces: Sequence[Piece], progress: Progress) -> list[Tokens]:
    """The tokens of each piece, without BOS; ``progress`` counts pieces."""
    rows: list[Tokens] = []
    for start in range(0, len(pieces), TOKENIZED_TOGETHER):
        together = pieces[start : start + TOKENIZED_TOGETHER]
        for special, group in itertools.groupby(together, key=lambda piece: piece.special):
            texts = [piece.text for piece in group]
            rows += teacher.tokenize(texts, add_special=False, parse_special=special)
        progress(len(rows))
    return rows


def counted(rows: Sequence[Tokens], vocab_size: int) -> NDArray[np.int64]:
    """How often each token occurs, ``[V]``."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for tokens in rows:
        counts += np.bincount(tokens, minlength=vocab_size)
    return counts


def spread(lengths: Sequence[int], budget: int) -> list[int]:
    """Indices, evenly spread, of so many pieces that their lengths come to about ``budget``."""
    total = sum(lengths)
    count = min(len(lengths), max(1, round(len(lengths) * budget / max(1, total))))
    return np.unique(np.linspace(0, len(lengths) - 1, count).round().astype(int)).tolist()


def windows(teacher: Teacher, rows: Sequence[Tokens]) -> list[Tokens]:
    """Sequences in which every token of the rows is predicted once: each behind a first token,
    in several where one would be too long."""
    info = teacher.info
    first = next((token for token in (info.bos, info.eos) if token is not None), 0)
    room = min(LONGEST, info.context_length) - 1
    return [
        np.concatenate(([first], row[at : at + room])).astype(np.int32)
        for row in rows
        for at in range(0, len(row), room)
    ]


def decoded(model: Teacher, sequences: Sequence[Tokens]) -> list[Piece]:
    """The text of the first sequences, ``DECODED_TOKENS`` tokens of it at most, one at least."""
    some = first_sequences(sequences, len(sequences), DECODED_TOKENS)
    bos = model.info.bos
    plain = [tokens[1:] if int(tokens[0]) == bos else tokens for tokens in some]
    return [Piece(text, special=True) for text in model.detokenize(plain)]
