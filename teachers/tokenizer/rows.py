"""A row of data as one value, whatever form it had in its file: a conversation, or text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Message = dict[str, Any]

# Keys of the assistant's messages that say 0 or false of those nobody is to learn: OpenAI's and
# Mistral's files have weight, axolotl's train or training, ms-swift's loss.
LEARN_KEYS = ("weight", "train", "training", "loss")


def is_learnt(message: Message) -> bool:
    """Whether a message is the assistant's, and nothing in it says that it is not to be learnt."""
    told = (str(message[key]).strip().lower() for key in LEARN_KEYS if key in message)
    return message["role"] == "assistant" and not any(one in ("0", "0.0", "false") for one in told)


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates read them.

    ``messages``: at least one. Each has a ``role`` (system, user, assistant or tool) and
    ``content``: text, or ``None`` beside the assistant's ``tool_calls``, which are objects
    ``{"type": "function", "function": {"name": …, "arguments": {…}}}``, with an ``id`` where the
    data has one. Other keys, such as ``name``, ``tool_call_id`` or ``reasoning_content``, are those
    of the data; none is null. ``tools``, ``documents``: JSON objects for the template, if any.
    ``separator``: stands between the messages for a teacher without a template. ``where``: file and
    line, for messages about it.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    separator: str = "\n"
    where: str = ""

    @property
    def waits(self) -> bool:
        """Whether it is open for an answer: the last message is not the assistant's."""
        return bool(self.messages[-1]["role"] != "assistant")


class Parts(Protocol):
    """A text in parts; its length is in characters."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[str]: ...


@dataclass(frozen=True)
class Document:
    """Text that is used as it stands, whose control tokens stay text; ``where``: file and line.

    ``text``: one string, or its parts, which are read anew each time; its length is of both.
    """

    text: str | Parts
    where: str = ""


Row = Conversation | Document
