"""Conversations as a model's own tokens: its chat template, and one BOS where it wants one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from teachers.base import Teacher, Tokens
from teachers.tokenizer.chat_template import ChatTemplateError, Message, render_chat

_PLACEHOLDER = "\u2063user says\u2063"  # invisible separators: no template contains it


def conversation_tokens(teacher: Teacher, messages: Sequence[Message], *, answer: bool) -> Tokens:
    """The tokens of a conversation, open for the assistant's answer if ``answer``.

    Without a chat template the messages' texts follow each other on lines of their own.

    Raises:
        ChatTemplateError: the template is broken or refuses the messages.
    """
    return conversations_tokens(teacher, [messages], answer=answer)[0]


def conversations_tokens(
    teacher: Teacher, conversations: Sequence[Sequence[Message]], *, answer: bool
) -> list[Tokens]:
    """``conversation_tokens`` of several conversations, asked of the teacher at once.

    Raises:
        ChatTemplateError: the template is broken or refuses the messages.
    """
    if not conversations:
        return []
    if templated := teacher.info.chat_template is not None:
        texts = _render(teacher, conversations, answer=answer)
    else:
        texts = ["\n".join(one["content"] for one in messages) for messages in conversations]
    rows = teacher.tokenize(texts, add_special=False, parse_special=templated)
    return [_with_bos(teacher, tokens) for tokens in rows]


def request_tokens(teacher: Teacher, requests: Sequence[str]) -> list[Tokens]:
    """Each request as a conversation that waits for the answer; control tokens spelled in it stay
    text, so that it cannot end its own turn.

    Raises:
        ChatTemplateError: the template is broken or refuses the messages.
    """
    conversations = [[{"role": "user", "content": request}] for request in requests]
    rows = conversations_tokens(teacher, conversations, answer=True)
    if teacher.info.chat_template is None or not requests:
        return rows
    plain = teacher.tokenize(requests, add_special=False, parse_special=False)
    parsed = teacher.tokenize(requests, add_special=False, parse_special=True)
    pairs = enumerate(zip(plain, parsed, strict=True))
    spelled = [index for index, pair in pairs if not np.array_equal(*pair)]
    around = opening_segments(teacher) if spelled else None
    for index in spelled:
        if around is None or len(around) != 2:
            raise ChatTemplateError(
                "the request spells control tokens, and the chat template does not show where the "
                "request's words are"
            )
        rows[index] = np.concatenate((around[0], plain[index], around[1])).astype(np.int32)
    return rows


def opening_segments(teacher: Teacher) -> tuple[Tokens, ...] | None:
    """What to force so that the teacher writes both turns of a conversation by itself.

    With a chat template: its text before the user's words, and from there to the assistant's.
    Without one: BOS (or EOS, if that is all there is). ``None``: it has neither.
    """
    info = teacher.info
    if info.chat_template is not None:
        text = _render(teacher, [[{"role": "user", "content": _PLACEHOLDER}]], answer=True)[0]
        before, marker, after = text.partition(_PLACEHOLDER)
        if marker and before and after:
            start, rest = teacher.tokenize([before, after], add_special=False, parse_special=True)
            return _with_bos(teacher, start), rest
    first = info.bos if info.bos is not None else info.eos
    return None if first is None else (np.array([first], dtype=np.int32),)


def _with_bos(teacher: Teacher, tokens: Tokens) -> Tokens:
    """Rendered text may or may not spell out BOS; give it exactly one if the model wants it."""
    bos = teacher.info.bos
    if bos is None or not teacher.info.add_bos or (len(tokens) and tokens[0] == bos):
        return tokens
    return np.concatenate(([bos], tokens)).astype(np.int32)


def _render(
    teacher: Teacher, conversations: Sequence[Sequence[Message]], *, answer: bool
) -> list[str]:
    info = teacher.info
    assert info.chat_template is not None
    ends = [[] if token is None else [token] for token in (info.bos, info.eos)]
    bos, eos = teacher.detokenize([np.array(tokens, dtype=np.int32) for tokens in ends])
    options = {"add_generation_prompt": answer, "bos": bos, "eos": eos}
    return [render_chat(info.chat_template, messages, **options) for messages in conversations]  # type: ignore[arg-type]
