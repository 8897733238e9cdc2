"""Rows → tokens on disk → sequences: how long these may be depends on all rows, so all are
tokenized before any is cut."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.capture.lengths import ANSWER_ROOM
from distill.errors import UserError
from teachers.base import Keep, Progress, Teacher, TeacherInfo, Tokens
from teachers.store.sequence_index import Item
from teachers.tokenizer.assistant_mask import AssistantMask
from teachers.tokenizer.chat_template import ChatTemplateError
from teachers.tokenizer.conversation import conversation_tokens
from teachers.tokenizer.rows import Conversation, Document, Row

MAX_TOKENIZED_AT_ONCE = 1 << 20  # characters of text sent to the tokenizer in one piece
IN_MEMORY = 64 << 20  # bytes of tokens that are not written to a temporary file
WINDOWS, ANSWERS, MASKED = 1, 2, 4
NOWHERE = 1 << 62

Numbers = NDArray[np.int64]


class Drafts:
    """Pieces of data, tokenized but not cut; their tokens are in a temporary file in ``folder``, or
    wherever such files are.

    A text becomes windows of several sequences, so that nothing is lost; after a conversation the
    teacher may answer, and only a part of its predictions may be learnt.
    """

    def __init__(self, folder: Path | None = None) -> None:
        where = None if folder is None else str(folder)
        self._file: Any = tempfile.SpooledTemporaryFile(IN_MEMORY, dir=where)  # noqa: SIM115
        self._rows, self._starts, self._lengths = array("q"), array("q"), array("q")
        # The first prediction that is learnt, and how many answers are not found.
        self._firsts, self._lost, self._kinds = array("q"), array("q"), array("B")

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, number: int, row: Row, reader: Reader, progress: Progress) -> None:
        """Tokenize row ``number`` of the data."""
        self._rows.append(number)
        self._starts.append(self._file.seek(0, 2))
        if isinstance(row, Document):
            length = 0
            for tokens in reader.text_tokens(row, progress):
                self._file.write(tokens.tobytes())
                length += len(tokens)
            self._remember(length, WINDOWS, NOWHERE, 0)
            return
        tokens, keep, lost = reader.conversation(row)
        self._file.write(tokens.tobytes())
        kind, first = ANSWERS * row.waits, NOWHERE
        if keep is not None:
            self._file.write(keep.tobytes())
            kind += MASKED
            first = int(keep.argmax()) if keep.any() else NOWHERE
        self._remember(len(tokens), kind, first, lost)
        progress(1.0)

    def _remember(self, length: int, kind: int, first: int, lost: int) -> None:
        self._lengths.append(length)
        self._kinds.append(kind)
        self._firsts.append(first)
        self._lost.append(lost)

    @property
    def rows(self) -> Numbers:
        """Which row of the data each is."""
        return _numbers(self._rows)

    @property
    def lengths(self) -> Numbers:
        """Tokens of each."""
        return _numbers(self._lengths)

    @property
    def lost(self) -> Numbers:
        """How many answers in each are not found."""
        return _numbers(self._lost)

    def are(self, kind: int) -> NDArray[np.bool_]:
        """Which of them are ``WINDOWS``, wait for ``ANSWERS`` or are ``MASKED``."""
        return (np.array(self._kinds, dtype=np.uint8) & kind) > 0

    def wanted(self) -> Numbers:
        """Tokens of each conversation, with room for an answer."""
        wanted = self.lengths + ANSWER_ROOM * self.are(ANSWERS)
        return wanted[~self.are(WINDOWS)]

    def counts(self, info: TeacherInfo, max_length: int) -> Numbers:
        """How many sequences come of each: none of a conversation in which nothing is learnt."""
        lengths, begin = self.lengths, len(_beginning(info))
        step = max_length - begin
        windows = -(-lengths // step)
        last = lengths - (windows - 1) * step
        windows -= (windows > 0) & (begin + last < 2)
        speaks = self.are(ANSWERS) & (lengths > 0) & (lengths < max_length)
        learnt = ~self.are(MASKED) | (_numbers(self._firsts) < max_length - 1)
        whole = speaks | ((lengths > 1) & learnt)
        return np.where(self.are(WINDOWS), windows, whole.astype(np.int64))

    def items(self, place: int, info: TeacherInfo, max_length: int) -> Iterator[Item]:
        """The sequences of one of them, as many as ``counts`` says: a text's windows each begin
        with BOS where the model wants one."""
        length, kind = self._lengths[place], self._kinds[place]
        if kind & WINDOWS:
            begin = _beginning(info)
            step = max_length - len(begin)
            for at in range(0, length, step):
                window = np.concatenate((begin, self._tokens(place, at, at + step)))
                if len(window) > 1:
                    yield Item((window,), False)
            return
        speaks = bool(kind & ANSWERS) and 0 < length < max_length
        keep = self._keep(place)[: max_length - 1] if kind & MASKED else None
        if speaks or (length > 1 and (keep is None or bool(keep.any()))):
            yield Item((self._tokens(place, 0, max_length),), speaks, keep)

    def _tokens(self, place: int, start: int, stop: int) -> Tokens:
        stop = min(stop, self._lengths[place])
        self._file.seek(self._starts[place] + 4 * start)
        return np.frombuffer(self._file.read(4 * (stop - start)), dtype=np.int32)

    def _keep(self, place: int) -> Keep:
        length = self._lengths[place]
        self._file.seek(self._starts[place] + 4 * length)
        return np.frombuffer(self._file.read(max(0, length - 1)), dtype=np.bool_)


class Reader:
    """Tokenizes rows; ``longest``: tokens of a sequence at most, if only the assistant's words are
    learnt."""

    def __init__(self, teacher: Teacher, longest: int | None) -> None:
        self._teacher = teacher
        self._masks = None if longest is None else AssistantMask(teacher, longest)

    def text_tokens(self, row: Document, progress: Progress) -> Iterator[Tokens]:
        """A text's tokens, in pieces."""
        # Control tokens spelled out in a text stay text: data must not imitate the template.
        done, length = 0, max(1, len(row.text))
        for piece in _pieces([row.text] if isinstance(row.text, str) else row.text):
            tokens = self._teacher.tokenize([piece], add_special=False, parse_special=False)
            yield tokens[0].astype(np.int32)
            progress(min(1.0, (done := done + len(piece)) / length))

    def conversation(self, row: Conversation) -> tuple[Tokens, Keep | None, int]:
        """A conversation's tokens, which predictions are learnt, and how many answers are not
        found.

        Raises:
            UserError: the teacher's chat template does not render it.
        """
        try:
            if self._masks is None:
                tokens = conversation_tokens(self._teacher, row, answer=row.waits)
                return tokens.astype(np.int32), None, 0
            tokens, learnt, lost = self._masks.tokens(row, answer=row.waits)
            return tokens.astype(np.int32), learnt[1:], lost
        except ChatTemplateError as error:
            raise UserError(f"{row.where}: {error}") from None


def _beginning(info: TeacherInfo) -> Tokens:
    """What each window of a text begins with."""
    bos = info.bos if info.add_bos else None
    return np.array([] if bos is None else [bos], dtype=np.int32)


def _numbers(values: array[int]) -> Numbers:
    return np.array(values, dtype=np.int64)


def _pieces(parts: Iterable[str]) -> Iterator[str]:
    """Cut long text at line ends, into pieces of about ``MAX_TOKENIZED_AT_ONCE`` at most."""
    text = ""
    for part in parts:
        text, start = text + part, 0
        while len(text) - start > MAX_TOKENIZED_AT_ONCE:
            end = text.rfind("\n", start, start + MAX_TOKENIZED_AT_ONCE)
            end = start + MAX_TOKENIZED_AT_ONCE if end <= start else end
            yield text[start:end]
            start = end
        text = text[start:]
    yield text
