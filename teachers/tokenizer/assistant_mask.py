"""Which tokens of a conversation are the assistant's: those that a student learns to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from teachers.base import Teacher, Tokens
from teachers.tokenizer.chat_template import ChatTemplateError
from teachers.tokenizer.conversation import chat_texts, with_bos
from teachers.tokenizer.rows import Conversation, Message

_ANSWER = "\u2063assistant says\u2063"  # invisible separators: no template contains it

Span = tuple[int, int]


class AssistantMask:
    """Finds the assistant's tokens in conversations of one teacher, ``limit`` tokens each."""

    def __init__(self, teacher: Teacher, limit: int) -> None:
        self.teacher, self.limit = teacher, limit
        ids = [np.array([token], dtype=np.int32) for token in teacher.info.end_tokens]
        # Longest first: one may begin with another.
        self.ends = sorted(filter(None, teacher.detokenize(ids)), key=len, reverse=True)

    def tokens(self, chat: Conversation, *, answer: bool) -> tuple[Tokens, NDArray[np.bool_], int]:
        """``conversation_tokens``, which of these are the assistant's (both ``[n]``), and how many
        of its answers were not found.

        They are what the chat template marks with ``{% generation %}``, as in transformers, or else
        what stands behind the generation prompt; each with the token that ends the turn.

        Raises:
            ChatTemplateError: the template is broken or refuses the messages.
        """
        (rendered,) = chat_texts(self.teacher, [chat], answer=answer)
        text, unknown, spans = rendered.text, 0, rendered.generated
        if spans is not None:
            spans = tuple((start, self._end(text, start, stop, stop)) for start, stop in spans)
        else:
            numbers = [n for n, one in enumerate(chat.messages) if one["role"] == "assistant"]
            result = [self._find(chat, number, text, answer=answer) for number in numbers]
            spans = tuple(span for span in result if span is not None)
            unknown = len(result) - len(spans)
        (tokens,) = self._tokenize([text])
        mask = self._mask(text, tokens, spans)
        whole = with_bos(self.teacher, tokens)
        return whole, np.concatenate((np.zeros(len(whole) - len(tokens), np.bool_), mask)), unknown

    def _tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        templated = self.teacher.info.chat_template is not None
        return self.teacher.tokenize(texts, add_special=False, parse_special=templated)

    def _mask(self, text: str, tokens: Tokens, spans: Sequence[Span]) -> NDArray[np.bool_]:
        """The tokens that are in some span at least in part."""
        mask = np.zeros(len(tokens), dtype=np.bool_)
        for start, stop in spans:
            if stop > start:
                before, within = self._tokenize([text[:start], text[:stop]])
                # A token across the border is none of those before it, and the first that differs.
                shared = min(len(before), len(tokens))
                differing = np.flatnonzero(before[:shared] != tokens[:shared])
                mask[int(differing[0]) if len(differing) else shared : len(within)] = True
                if len(within) >= self.limit:
                    break
        return mask

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
