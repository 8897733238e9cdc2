"""A Jinja chat template as constant texts around messages, which simpler languages can express.

Most chat templates put fixed texts between messages, which depend only on the roles before and
after. Those texts are read off rendered conversations of placeholders, and used only if they
reproduce every ordinary conversation (a system message or none, then user and assistant in turns)
exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from teachers.tokenizer.chat_template import Message

ROLES = ("system", "user", "assistant")
START = ""  # in place of a role: before the first message
# Whose entry stands for roles that no conversation had before a message.
_STAND_INS = ("assistant", "user", "system", START)
_LONGEST = 5  # messages of a conversation that is tried
_MARK = "\u2063words\u2063"  # invisible separators: no template contains it
_PARAGRAPH = "\n\n"  # between messages that are joined, as Ollama does it

Order = tuple[str, ...]
# A conversation's text, open for the answer or not; none where the template refuses it.
Render = Callable[[Sequence[Message], bool], "str | None"]


def _ordinary() -> list[Order]:
    turns = [("user", *("assistant", "user") * more) for more in range(3)]
    return [*turns, *(("system", *turn) for turn in turns)]


def _unusual() -> list[Order]:
    """Every other order without a role twice in a row; first those that wait for an answer."""
    known = set(_ordinary())
    orders = [
        order
        for length in range(1, _LONGEST + 1)
        for order in itertools.product(ROLES, repeat=length)
        if order not in known and all(one != two for one, two in itertools.pairwise(order))
    ]
    return sorted(orders, key=lambda order: order[-1] != "user")


ORDINARY = _ordinary()
UNUSUAL = _unusual()


@dataclass(frozen=True)
class Segments:
    """Constant texts around the messages of a conversation.

    ``before[role][previous]``: text between what follows ``previous``'s message and the message of
    ``role``; ``previous`` is ``START`` for the first. A role that is not in it is not shown.
    ``after[role]``: what always follows its message. ``final[last]``: what follows that at the end,
    up to the answer. ``late_system``: system messages stand before the last message, if that is
    the user's, else nowhere.
    """

    before: Mapping[str, Mapping[str, str]]
    after: Mapping[str, str]
    final: Mapping[str, str]
    late_system: bool = False

    def text(self, messages: Sequence[Message]) -> str:
        """The conversation, open for the answer."""
        parts, previous = [], START
        for message in arranged(messages, self.late_system):
            role = message["role"]
            if role in self.before:
                parts += [choose(self.before[role], previous), message["content"], self.after[role]]
                previous = role
        return "".join(parts) + choose(self.final, previous)


def choose(entries: Mapping[str, str], previous: str) -> str:
    """The entry of ``previous``, or the one that stands for it where it has none."""
    return entries[previous] if previous in entries else entries[stand_in(entries)]


def stand_in(entries: Mapping[str, str]) -> str:
    """The role whose entry stands for all that have none."""
    return next(role for role in _STAND_INS if role in entries)


def arranged(messages: Sequence[Message], late_system: bool) -> list[Message]:
    """The messages in the order in which they are shown."""
    if not late_system:
        return list(messages)
    system = _PARAGRAPH.join(
        message["content"] for message in messages if message["role"] == "system"
    )
    shown = [message for message in messages if message["role"] != "system"]
    if system and messages[-1]["role"] == "user":
        shown.insert(len(shown) - 1, {"role": "system", "content": system})
    return shown


def find_segments(render: Render) -> tuple[Segments | None, list[str]]:
    """The segments of a chat template, or ``None`` where none reproduce ordinary conversations;
    and what a user should know: one sentence each, without a full stop."""
    segments = _learn(render, False) or _learn(render, True)
    if segments is None:
        return None, []
    notes = []
    refused = all(
        render(placeholders(order), True) is None for order in ORDINARY if order[0] == "system"
    )
    if "system" not in segments.before:
        if not refused:
            notes.append(
                "the teacher's chat template leaves system messages out, and so does this one"
            )
        else:
            segments = _with_system_as_user(segments)
            notes.append(
                "the teacher's chat template refuses system messages; here they stand before the "
                "user's message"
            )
    orders = [
        order for order in UNUSUAL if order[-1] == "user" and not (refused and "system" in order)
    ]
    return segments, [*notes, *_differences(segments, render, orders)]


def placeholders(order: Sequence[str]) -> list[Message]:
    """A conversation whose texts occur nowhere else."""
    return [
        {"role": role, "content": f"{_MARK}{number}{_MARK}"} for number, role in enumerate(order)
    ]


def _learn(render: Render, late_system: bool) -> Segments | None:
    gaps: dict[tuple[str, str], str] = {}
    final: dict[str, str] = {}
    for order in ORDINARY:
        if (texts := _read(render, order, late_system)) is not None:
            gaps |= texts[0]  # the check below finds contradictions
            final |= texts[1]
    for order in UNUSUAL:
        texts = _read(render, order, late_system) if order[-1] != "system" else None
        # Only what agrees with the ordinary conversations.
        if texts is not None and _agree(texts[0], gaps) and _roles(texts[0]) <= _roles(gaps):
            gaps |= texts[0]
            final = {**texts[1], **final}
    needed = {(START, "user"), ("user", "assistant"), ("assistant", "user")}
    if not needed <= gaps.keys() or "user" not in final:
        return None
    segments = _segments(gaps, final, _closings(render), late_system)
    for order in ORDINARY:
        messages = placeholders(order)
        text = render(messages, True)
        if text is not None and segments.text(messages) != text:
            return None
    return segments


def _agree(one: Mapping[tuple[str, str], str], two: Mapping[tuple[str, str], str]) -> bool:
    return all(two.get(pair, gap) == gap for pair, gap in one.items())


def _roles(gaps: Mapping[tuple[str, str], str]) -> set[str]:
    return {role for _, role in gaps}


def _read(
    render: Render, order: Order, late_system: bool
) -> tuple[dict[tuple[str, str], str], dict[str, str]] | None:
    """The texts between placeholders by role, and after the last; ``None`` where they are not
    unique."""
    messages = placeholders(order)
    text = render(messages, True)
    if text is None:
        return None
    gaps: dict[tuple[str, str], str] = {}
    previous, at = START, 0
    for message in arranged(messages, late_system):
        content, role = message["content"], message["role"]
        count, start = text.count(content), text.find(content, at)
        if count == 0:
            continue
        gap = text[at:start]
        if count > 1 or start < 0 or gaps.setdefault((previous, role), gap) != gap:
            return None
        previous, at = role, start + len(content)
    if any(_MARK in gap for gap in (*gaps.values(), text[at:])):
        return None  # a message stands out of order
    return gaps, {previous: text[at:]}


def _closings(render: Render) -> dict[str, str]:
    """What follows the last message where no answer is asked for, by its role."""
    closings: dict[str, str] = {}
    for order in (("system",), ("system", "user"), ("user",), ("user", "assistant")):
        messages = placeholders(order)
        text = render(messages, False)
        if text is not None and messages[-1]["content"] in text:
            closings.setdefault(order[-1], text.partition(messages[-1]["content"])[2])
    return closings


def _segments(
    gaps: Mapping[tuple[str, str], str],
    final: Mapping[str, str],
    closings: Mapping[str, str],
    late_system: bool,
) -> Segments:
    """The gaps divided into what always follows a message and what comes before the next."""
    after = {}
    for role in _roles(gaps):
        following = [gap for (previous, _), gap in gaps.items() if previous == role]
        following += [final[role]] if role in final else []
        closing = closings.get(role, "")
        after[role] = closing if all(text.startswith(closing) for text in following) else ""
    before: dict[str, dict[str, str]] = {}
    for (previous, role), gap in gaps.items():
        before.setdefault(role, {})[previous] = gap[len(after.get(previous, "")) :]
    ends = {role: text[len(after[role]) :] for role, text in final.items() if role in after}
    return Segments(before, after, ends, late_system)


def _with_system_as_user(segments: Segments) -> Segments:
    """System messages as a first paragraph of the user's own turn."""
    closing = segments.after["user"]
    # Both stay open: what closes the user's turn comes before the assistant's message.
    answered = segments.before["assistant"]
    opened = closing + choose(answered, "user")
    ended = closing + choose(segments.final, "user")
    turn = {**segments.before["user"], "user": _PARAGRAPH, "system": _PARAGRAPH}
    before = {
        "system": turn,
        "user": turn,
        "assistant": {**answered, "user": opened, "system": opened},
    }
    return replace(
        segments,
        before=before,
        after={**segments.after, "user": "", "system": ""},
        final={**segments.final, "user": ended, "system": ended},
    )


def _differences(segments: Segments, render: Render, orders: Sequence[Order]) -> list[str]:
    """Where the template does more than put constant texts around messages, for instance in one
    of ``orders``."""
    notes = []
    for order in orders:
        text = render(placeholders(order), True)
        if text is not None and segments.text(placeholders(order)) != text:
            roles = ", ".join(order)
            notes.append(
                f"a conversation of {roles} reads otherwise than in the teacher's chat template"
            )
            break
    blank = [{"role": "user", "content": " \nwords\n "}]
    if (text := render(blank, True)) is not None and text != segments.text(blank):
        notes.append(
            "the teacher's chat template takes white space around messages away, this one does not"
        )
    asked = [dict(message) for message in placeholders(("user", "assistant", "user"))]
    asked[1]["content"] = "<think>thought</think>said"
    if (text := render(asked, True)) is not None and text != segments.text(asked):
        notes.append(
            "the teacher's chat template takes thoughts out of earlier answers, this one does not"
        )
    return notes
