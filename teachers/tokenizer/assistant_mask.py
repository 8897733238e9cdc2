"""Which tokens of a conversation are the assistant's: those that a student learns to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from teachers.base import Teacher, Tokens
from teachers.tokenizer.chat_template import ChatTemplateError
from teachers.tokenizer.conversation import chat_texts, with_bos
from teachers.tokenizer.rows import Conversation, Message, is_learnt

_ANSWER = "\u2063assistant says\u2063"  # invisible separators: no template contains it
_PARTIAL = "\ufffd"  # stands for bytes that are no whole character

Span = tuple[int, int]
Places = tuple[NDArray[np.int64], NDArray[np.int64]]


class AssistantMask:
    """Finds the assistant's tokens in conversations of one teacher, ``limit`` tokens each."""

    def __init__(self, teacher: Teacher, limit: int) -> None:
        self.teacher, self.limit = teacher, limit
        ids = [np.array([token], dtype=np.int32) for token in teacher.info.end_tokens]
        # Longest first: one may begin with another.
        self.ends = sorted(filter(None, teacher.detokenize(ids)), key=len, reverse=True)
        self._pieces: dict[int, str] = {}  # of the tokens met so far

    def tokens(self, chat: Conversation, *, answer: bool) -> tuple[Tokens, NDArray[np.bool_], int]:
        """``conversation_tokens``, which of these are the assistant's (both ``[n]``), and how many
        of its answers were not found.

        They are what the chat template marks with ``{% generation %}``, as in transformers, or else
        what stands behind the generation prompt; each with the token that ends the turn. Those that
        begin behind the limit are not looked for; messages that are not to be learnt are left out.

        Raises:
            ChatTemplateError: the template is broken or refuses the messages.
        """
        (rendered,) = chat_texts(self.teacher, [chat], answer=answer)
        text, unknown = rendered.text, 0
        (tokens,) = self._tokenize([text])
        places = self._places(text, tokens)
        if rendered.generated is not None:
            marked: Sequence[Span] = rendered.generated
            if any(one["role"] == "assistant" and not is_learnt(one) for one in chat.messages):
                found, unknown = self._spans(chat, text, places, answer=answer)
                marked = [
                    (start, stop)
                    for start, stop in marked
                    if any(start < end and begin < stop for begin, end in found)
                ]
            spans = [(start, self._end(text, start, stop, stop)) for start, stop in marked]
        else:
            spans, unknown = self._spans(chat, text, places, answer=answer)
        mask = self._mask(text, tokens, spans, places)
        whole = with_bos(self.teacher, tokens)
        return whole, np.concatenate((np.zeros(len(whole) - len(tokens), np.bool_), mask)), unknown

    def _tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        templated = self.teacher.info.chat_template is not None
        return self.teacher.tokenize(texts, add_special=False, parse_special=templated)

    def _places(self, text: str, tokens: Tokens) -> Places | None:
        """Where in ``text`` each token begins and ends; ``None`` if its pieces do not make it up.

        Tokens that are characters only together share a place.
        """
        ids = tokens.tolist()
        if new := list(set(ids) - self._pieces.keys()):
            rows = [np.array([token], dtype=np.int32) for token in new]
            self._pieces.update(zip(new, self.teacher.detokenize(rows), strict=True))
        pieces = (self._pieces[token] for token in ids)
        groups = [
            (partial, list(group))
            for partial, group in groupby(pieces, key=lambda piece: _PARTIAL in piece)
        ]
        runs, at = [], 0
        for partial, group in groups:
            runs += [tokens[at : at + len(group)]] if partial else []
            at += len(group)
        together = iter(self.teacher.detokenize(runs) if runs else ())
        begins, ends, at = [], [], 0
        for partial, group in groups:
            for piece in [next(together)] if partial else group:
                found = _next_place(text, at, piece)
                if found is None:
                    return None
                count, at = len(group) if partial else 1, found[1]
                begins += [found[0]] * count
                ends += [at] * count
        return None if text[at:].strip() else (np.array(begins, int), np.array(ends, int))

    def _mask(
        self, text: str, tokens: Tokens, spans: Sequence[Span], places: Places | None
    ) -> NDArray[np.bool_]:
        """The tokens that are in some span at least in part."""
        mask = np.zeros(len(tokens), dtype=np.bool_)
        for start, stop in spans:
            if stop <= start:
                continue
            within = None if places is None else _between(places, start, stop)
            if within is None:
                before, after = self._tokenize([text[:start], text[:stop]])
                # A token across the border is none of those before it, and the first that differs.
                shared = min(len(before), len(tokens))
                differing = np.flatnonzero(before[:shared] != tokens[:shared])
                within = int(differing[0]) if len(differing) else shared, len(after)
            mask[slice(*within)] = True
            if within[1] >= self.limit:
                break
        return mask

    def _spans(
        self, chat: Conversation, text: str, places: Places | None, *, answer: bool
    ) -> tuple[list[Span], int]:
        """Where the answers are that are learnt and begin within the limit, and how many of them
        are not found."""
        reach = len(text)
        if places is not None and len(places[0]) > self.limit:
            reach = int(places[0][self.limit])
        spans: list[Span] = []
        unknown = 0
        for number, message in enumerate(chat.messages):
            if not is_learnt(message):
                continue
            span = self._find(chat, number, text, answer=answer)
            if span is None:
                unknown += 1
            elif span[0] > reach:
                break
            else:
                spans.append(span)
        return spans, unknown

    def _find(self, chat: Conversation, number: int, text: str, *, answer: bool) -> Span | None:
        """Where in ``text`` the assistant's message of this number is.

        From the end of the conversation before it, open for the answer, to the end of that with it.
        A template may render these otherwise within the whole (thoughts of earlier turns go, tools
        stand with the last request); then from and to where a placeholder is in its place.
        """
        messages = [*chat.messages]
        opened = self._render(chat, messages[:number], answer=True)
        closed = self._render(chat, messages[: number + 1], answer=False)
        start = len(opened) if opened and text.startswith(opened) else None
        stop = len(closed) if closed and text.startswith(closed) else None
        if start is None or stop is None:
            messages[number] = {"role": "assistant", "content": _ANSWER}
            marked = self._render(chat, messages, answer=answer)
            before, marker, after = marked.partition(_ANSWER)
            if marker and start is None and text.startswith(before):
                start = len(before)
            if marker and stop is None and text.endswith(after):
                stop = len(text) - len(after)
        if start is None or stop is None or start > stop:
            return None
        return start, self._end(text, start, stop, least=start)

    def _render(self, chat: Conversation, messages: Sequence[Message], *, answer: bool) -> str:
        """These messages instead, or nothing where the template refuses them."""
        try:
            return chat_texts(self.teacher, [replace(chat, messages=messages)], answer=answer)[
                0
            ].text
        except ChatTemplateError:
            return ""

    def _end(self, text: str, start: int, stop: int, least: int) -> int:
        """Where the turn ends: behind the token with which the model stops, not what follows it.

        ``least``: nothing before it is left out.
        """
        rest, end = text[start:stop].rstrip(), 0
        while ended := next((one for one in self.ends if rest.endswith(one)), None):
            end = start + len(rest)
            rest = rest[: -len(ended)].rstrip()
        if end:
            return max(end, least)
        after = text[stop:].lstrip()
        ended = next((one for one in self.ends if after.startswith(one)), None)
        return stop if ended is None else len(text) - len(after) + len(ended)


def _between(places: Places, start: int, stop: int) -> Span | None:
    """The tokens that have some part between two characters; ``None`` if one of these is within a
    place that tokens share."""
    begins, ends = places
    for border in (start, stop):
        token = int(np.searchsorted(ends, border, "right"))
        last = token + 1 >= len(begins)
        if not last and begins[token] == begins[token + 1] and begins[token] < border:
            return None
    return int(np.searchsorted(ends, start, "right")), int(np.searchsorted(begins, stop))


def _next_place(text: str, at: int, piece: str) -> Span | None:
    """Where a token's text stands next. Some tokenizers write a space before a word that has none,
    or drop the white space behind a control token."""
    if text.startswith(piece, at):
        return at, at + len(piece)
    if piece.startswith(" ") and text.startswith(piece[1:], at):
        return at, at + len(piece) - 1
    while at < len(text) and text[at].isspace():
        at += 1
    return (at, at + len(piece)) if text.startswith(piece, at) else None
