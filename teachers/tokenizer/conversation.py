"""Conversations as a model's own tokens: its chat template, and one BOS where it wants one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from teachers.base import Teacher, Tokens
from teachers.tokenizer.chat_template import (
    ChatTemplateError,
    RenderedChat,
    render_chat,
)
from teachers.tokenizer.rows import Conversation, Message

MOST_SHOWN = 80  # characters of what the user says, in a message
_PLACEHOLDER = "\u2063user says\u2063"  # invisible separators: no template contains it


def conversation_tokens(
    teacher: Teacher, messages: Sequence[Message] | Conversation, *, answer: bool
) -> Tokens:
    """The tokens of a conversation, open for the assistant's answer if ``answer``.

    Without a chat template the messages' texts follow each other, with its separator between them.

    Raises:
        ChatTemplateError: the template is broken or refuses the messages.
    """
    return conversations_tokens(teacher, [messages], answer=answer)[0]


def conversations_tokens(
    teacher: Teacher, conversations: Sequence[Sequence[Message] | Conversation], *, answer: bool
) -> list[Tokens]:
    """``conversation_tokens`` of several conversations, asked of the teacher at once.

    Raises:
        ChatTemplateError: the template is broken or refuses the messages.
    """
    if not conversations:
        return []
    chats = [one if isinstance(one, Conversation) else Conversation(one) for one in conversations]
    texts = [one.text for one in chat_texts(teacher, chats, answer=answer)]
    templated = teacher.info.chat_template is not None
    rows = teacher.tokenize(texts, add_special=False, parse_special=templated)
    return [with_bos(teacher, tokens) for tokens in rows]


def chat_texts(
    teacher: Teacher, chats: Sequence[Conversation], *, answer: bool
) -> list[RenderedChat]:
    """``render_chats``, or without a chat template the messages' texts one after another."""
    if teacher.info.chat_template is not None:
        return render_chats(teacher, chats, answer=answer)
    return [_joined(chat) for chat in chats]


def _joined(chat: Conversation) -> RenderedChat:
    said = [(message["role"], text) for message in chat.messages for text in _texts(message)]
    spans, at = [], 0
    for role, text in said:
        if role == "assistant":
            spans.append((at, at + len(text)))
        at += len(text) + len(chat.separator)
    return RenderedChat(chat.separator.join(text for _, text in said), tuple(spans))


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
        chat = Conversation([{"role": "user", "content": _PLACEHOLDER}])
        (rendered,) = render_chats(teacher, [chat], answer=True)
        before, marker, after = rendered.text.partition(_PLACEHOLDER)
        if marker and before and after:
            start, rest = teacher.tokenize([before, after], add_special=False, parse_special=True)
            return with_bos(teacher, start), rest
    first = info.bos if info.bos is not None else info.eos
    return None if first is None else (np.array([first], dtype=np.int32),)


def with_bos(teacher: Teacher, tokens: Tokens) -> Tokens:
    """Rendered text may or may not spell out BOS; give it exactly one if the model wants it."""
    bos = teacher.info.bos
    if bos is None or not teacher.info.add_bos or (len(tokens) and tokens[0] == bos):
        return tokens
    return np.concatenate(([bos], tokens)).astype(np.int32)


def render_chats(
    teacher: Teacher, chats: Sequence[Conversation], *, answer: bool
) -> list[RenderedChat]:
    """Conversations as the chat template writes them, open for the assistant's answer if
    ``answer``; with the places of generated text, where the template marks them.

    The teacher has a chat template, or one for conversations with tools where all have some.

    Raises:
        ChatTemplateError: the template is broken, refuses the messages, or leaves out all that the
            user says.
    """
    info = teacher.info
    ends = [[] if token is None else [token] for token in (info.bos, info.eos)]
    bos, eos = teacher.detokenize([np.array(tokens, dtype=np.int32) for tokens in ends])
    rendered = []
    for chat in chats:
        with_tools = chat.tools is not None or "tools" in info.template_variables
        template = (info.tool_template if with_tools else None) or info.chat_template
        if template is None:
            raise ChatTemplateError(
                "the teacher has no chat template for conversations without tools"
            )
        text = render_chat(
            template,
            chat.messages,
            add_generation_prompt=answer,
            bos=bos,
            eos=eos,
            variables={**info.special_tokens, "tools": chat.tools, "documents": chat.documents},
        )
        _require_words(chat.messages, text.text)
        rendered.append(text)
    return rendered


def _require_words(messages: Sequence[Message], text: str) -> None:
    """Refuse a text without anything of what the user says; case and white space do not count."""
    said = [words for one in messages if one["role"] == "user" for words in _texts(one)]
    said = [words for words in said if words.strip()]
    if not said or any(words in text for words in said):
        return
    bare = "".join(text.split()).casefold()
    if not any("".join(words.split()).casefold() in bare for words in said):
        raise ChatTemplateError(
            f"the teacher's chat template never prints the user's words {said[-1][:MOST_SHOWN]!r}; "
            "use a teacher whose chat template does, or data with 'text' in place of conversations"
        )


def _texts(message: Message) -> list[str]:
    """What a message says: its content, or the text of each part."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts = (part.get("text") if isinstance(part, dict) else part for part in parts)
    return [text for text in texts if isinstance(text, str)]
