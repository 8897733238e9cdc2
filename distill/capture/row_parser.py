"""Rows in the forms that people have them in → conversations and documents.

What cannot be used is an error with file and line, or is counted and noted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any

from distill.capture.json_values import parse_json, require_unicode
from distill.errors import UserError
from distill.runtime.printable import printable_line
from teachers.tokenizer.rows import LEARN_KEYS, Conversation, Document, Message, Row, is_learnt

CONVERSATION = ("messages", "conversations", "conversation")
REQUEST = ("prompt", "instruction", "question", "query", "input")
CONTEXT = ("input", "context")  # stands behind the request, after a blank line
ANSWER = ("completion", "response", "output", "answer")
TEXT = ("text", "content")
SYSTEM = ("system", "system_prompt")
# Of several forms in one row the first is taken: these make a row, in this order.
FORMS = (*CONVERSATION, "chosen", *REQUEST, *TEXT)
COLUMNS = tuple(dict.fromkeys((*FORMS, *CONTEXT, *ANSWER, *SYSTEM, "tools", "documents")))
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response"), "tool"),
}
CALLS = ("function_call", "tool_call")  # as a role: the message's text is the call itself, in JSON
TEXT_PARTS = ("text", "input_text", "output_text")
TEMPLATE_KEYS = {"role", "content", "tool_calls", "name", "tool_call_id", "reasoning_content"}
MOST_SHOWN = 12  # names in one message
# Of one conversation: llama.cpp's time for a text grows with the square of its control tokens.
MOST_MESSAGES = 4096


class RowParser:
    """Parses rows and counts what it leaves out; ``columns``: our name → the data's, or ``None``
    to leave a column alone. Raises ``UserError`` for a name that is not ours."""

    def __init__(self, columns: Mapping[str, str | None]) -> None:
        if unknown := [name for name in columns if name not in COLUMNS]:
            raise UserError(f"data.columns.{unknown[0]}: there are {', '.join(COLUMNS)}")
        self._missing = {theirs: ours for ours, theirs in columns.items() if theirs is not None}
        self.known = {name: name for name in COLUMNS if name not in columns} | self._missing
        self._unused: Counter[str] = Counter()
        self._keys: Counter[str] = Counter()
        self._numbers: list[str] = []  # places
        self._weights = 0  # of the assistant's messages, neither 0 nor 1
        self.unlearnt = 0  # messages of the assistant that are not to be learnt
        self._left_out: dict[str, list[str]] = {"blank": [], "an answer and no request": []}
        self._left_out["an answer whose label is false"] = []  # as in data for KTO
        self._there: Sequence[str] = ()

    def parse(self, row: Any, where: str) -> Row | None:
        """A row's value; ``None`` where it is left out.

        Raises:
            UserError: it cannot be used; names ``where``, and the columns if these are why.
        """
        if not isinstance(row, dict):
            raise UserError(f"{where}: each row must be a JSON object, got {_shown(row)}")
        self._there = tuple(row)
        known = {self.known[name]: value for name, value in row.items() if name in self.known}
        self._missing = {name: ours for name, ours in self._missing.items() if name not in row}
        left = {
            name: self._as_text(value, where)
            for name, value in known.items()
            if not _is_blank(value)
        }
        try:
            value = _value(left, where)
            if value is None:
                self._leave_out(known, left, where)
                return None
            require_unicode(vars(value), where)
        except RecursionError:
            raise UserError(f"{where}: nested too deeply; make it flatter") from None
        if known.keys() >= {"prompt", "completion"} and _is_false(row.get("label")):
            self._left_out["an answer whose label is false"].append(where)
            return None
        theirs = {ours: name for name, ours in self.known.items()}
        self._unused.update(theirs[name] for name in left)
        self.count_unused([n for n in row if n not in self.known and not _is_blank(row[n])], 1)
        if isinstance(value, Conversation):
            for message in value.messages:
                self._count(message, where)
        return value

    def _count(self, message: Message, where: str) -> None:
        """Take note of a message's keys; its content becomes text."""
        message["content"] = self._as_text(message["content"], where)
        keys = message.keys() - TEMPLATE_KEYS
        if message["role"] == "assistant":
            keys -= set(LEARN_KEYS)
            self.unlearnt += not is_learnt(message)
            weight = str(message.get("weight", 1)).strip().lower()
            self._weights += weight not in ("0", "0.0", "false", "1", "1.0", "true")
        self._keys.update(keys)

    def _as_text(self, value: Any, where: str) -> Any:
        """A number or truth value as text, as a CSV file and a chat template have it."""
        if isinstance(value, str) or not isinstance(value, Number):
            return value
        self._numbers.append(where)
        return str(value)

    def count_unused(self, names: Sequence[str], rows: int) -> None:
        """Remember columns that nothing was made of."""
        self._unused.update(dict.fromkeys(names, rows))

    def finish(self, used: bool, source: str) -> list[str]:
        """What was left out, in lines; ``used``: whether anything was used.

        Raises:
            UserError: nothing, or a column of ``data.columns`` was in no row.
        """
        for name, ours in self._missing.items():
            raise UserError(
                f"data.columns.{ours} = {name!r}: no row has this column; {self._columns()}"
            )
        if not used:
            why = " or ".join(reason for reason, places in self._left_out.items() if places)
            raise UserError(f"{source}: every row is {why or 'blank'}; {self._columns()}")
        notes = [
            f"{len(places)} rows are left out, as they are {why} (the first: {places[0]})"
            if why == "blank"
            else f"{len(places)} rows with {why} are left out (the first: {places[0]})"
            for why, places in self._left_out.items()
            if places
        ]
        if self._unused:
            notes.append(f"columns not used: {_counted(self._unused, 'rows')}")
        if self._keys:
            notes.append(
                "keys of messages that are only handed to the chat template: "
                f"{_counted(self._keys, 'messages')}"
            )
        if self._numbers:
            notes.append(
                f"{len(self._numbers):,} numbers or truth values are read as text (the first: "
                f"{self._numbers[0]})"
            )
        if self._weights:
            notes.append(
                f"{self._weights:,} messages of the assistant have a weight other than 0 and 1, "
                "which counts as 1"
            )
        return notes

    def _leave_out(self, known: Mapping[str, Any], left: Mapping[str, Any], where: str) -> None:
        if not known.keys() & set(FORMS):
            raise UserError(f"{where}: no column that is understood; {self._columns()}")
        answered = any(name in left for name in ANSWER)
        self._left_out["an answer and no request" if answered else "blank"].append(where)

    def _columns(self) -> str:
        return (
            f"there are {_listed(self._there)}; understood: {' or '.join(CONVERSATION)}; "
            f"{', '.join(REQUEST)}, with {', '.join(ANSWER)} or without; chosen; "
            f"{' or '.join(TEXT)}; name others with --set data.columns.text=NAME"
        )


def _value(left: dict[str, Any], where: str) -> Row | None:
    """Take a row's value out of its columns; ``None``: none of them makes a row."""
    separator = "\n"
    form = next((name for name in FORMS if name in left), None)
    if form is None:
        return None
    first = left.pop(form)
    if form in TEXT or (form == "chosen" and isinstance(first, str) and "prompt" not in left):
        return Document(_text(first, form, where), where)
    if form in CONVERSATION:
        messages = _messages(first, form, where)
    elif form == "chosen":
        messages = _turn(first, form, "assistant", where)
        if "prompt" in left:
            prompt = _turn(left.pop("prompt"), "prompt", "user", where)
            # The whole conversation may stand in both.
            if messages[0]["role"] == "assistant" or messages[: len(prompt)] != prompt:
                messages = prompt + messages
    else:
        if isinstance(first, str) and (extra := next((n for n in CONTEXT if n in left), None)):
            first = f"{first}\n\n{_text(left.pop(extra), extra, where)}"
        messages = _turn(first, form, "user", where)
        if answer := next((name for name in ANSWER if name in left), None):
            messages += _turn(left.pop(answer), answer, "assistant", where)
            separator = "" if answer == "completion" else separator
    if system := next((name for name in SYSTEM if name in left), None):
        message = {"role": "system", "content": _text(left.pop(system), system, where)}
        if messages[0]["role"] != "system":
            messages.insert(0, message)
        elif messages[0] != message:
            raise UserError(f"{where}: {system!r} and a system message differ; keep one of them")
    tools, documents = (_objects(left.pop(n, None), n, where) for n in ("tools", "documents"))
    return Conversation(tuple(messages), tools, documents, separator, where)


def _turn(value: Any, column: str, role: str, where: str) -> list[Message]:
    """A text, which is what ``role`` says, or a list of messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _messages(value, column, where)


def _messages(value: Any, column: str, where: str) -> list[Message]:
    value = _unpacked(value, f"{where}: {column}")
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{where}: {column!r} must be a list of messages"
            f"{'' if column in CONVERSATION else ' or text'}, got {_shown(value)}"
        )
    if len(value) > MOST_MESSAGES:
        raise UserError(
            f"{where}: {column!r} has {len(value):,} messages, more than {MOST_MESSAGES:,}; "
            "divide the conversation"
        )
    return [_message(one, f"{where}: {column}, number {n}") for n, one in enumerate(value, 1)]


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, dict):
        raise UserError(f"{where} must be an object with role and content, got {_shown(given)}")
    rest = {key: value for key, value in given.items() if value is not None and value == value}
    named = rest.pop("from", None) if "role" not in rest else rest.pop("role")
    role = named.strip().lower() if isinstance(named, str) else ""
    if role not in ROLES:
        raise UserError(f"{where}: role {_shown(named)} is none of {', '.join(ROLES)}")
    key = next((key for key in ("content", "value", "text") if key in rest), "content")
    content = rest.pop(key, None)
    calls = rest.pop("tool_calls", None) or rest.pop("function_call", None)
    if role in CALLS:
        calls, content = content, None
    content = None if content is None else _content(content, f"{where}: {key}")
    message = {"role": ROLES[role], "content": content, **rest}
    if calls:
        if ROLES[role] != "assistant":
            raise UserError(f"{where}: only the assistant calls tools, not {named!r}")
        message["tool_calls"] = _calls(calls, f"{where}: tool call")
    elif content is None:
        raise UserError(
            f"{where}: has no content, which only an assistant's message with tool_calls may lack"
        )
    return message


def _content(value: Any, where: str) -> str | Number:
    """A message's text: as it is, or in parts that follow each other; numbers are told later."""
    if isinstance(value, str | Number):
        return value
    if not isinstance(value, list):
        raise UserError(f"{where} must be text or a list of text parts, got {_shown(value)}")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else part
        if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise UserError(f"{where} has a part that is not text: {_shown(kind)}; take it out")
        texts.append(part["text"])
    return "".join(texts)


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    value = _unpacked(value, where)
    calls = []
    for call in value if isinstance(value, list) else [value]:
        call = _unpacked(call, where)
        function = call.get("function", call) if isinstance(call, dict) else None
        function = function if isinstance(function, dict) else {}
        name = function.get("name")
        if not isinstance(name, str) or call.get("type", "function") != "function":
            raise UserError(
                f"{where} must have a function's name and arguments, got {_shown(call)}"
            )
        arguments = function.get("arguments", function.get("parameters"))
        arguments = {} if _is_blank(arguments) else _unpacked(arguments, f"{where} {name!r}")
        if not isinstance(arguments, dict):
            raise UserError(f"{where}: arguments must be an object, got {_shown(arguments)}")
        known = {"type": "function", "function": {"name": name, "arguments": arguments}}
        calls.append(known if call.get("id") is None else known | {"id": call["id"]})
    return calls


def _objects(value: Any, column: str, where: str) -> tuple[dict[str, Any], ...] | None:
    """JSON objects, as they are or each or all of them as JSON text; ``None`` for none."""
    value = _unpacked(value, f"{where}: {column}")
    if _is_blank(value):
        return None
    result = [_unpacked(one, f"{where}: {column}") for one in value] if _is_list(value) else [value]
    if wrong := [one for one in result if not isinstance(one, dict)]:
        raise UserError(f"{where}: {column!r} must be a list of objects, got {_shown(wrong[0])}")
    return tuple(result)


def _unpacked(value: Any, where: str) -> Any:
    """What a text of JSON says; other values are as they are."""
    return parse_json(value, f"{where} {_shown(value)}") if isinstance(value, str) else value


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {column!r} must be text, got {_shown(value)}")
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_false(value: Any) -> bool:
    """Whether a label says no: false, or the same as text, as CSV has it."""
    return str(value).strip().lower() == "false"


def _is_blank(value: Any) -> bool:
    """Null, NaN (what pandas writes for it), nothing but space, or empty."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value != value or (not value and (_is_list(value) or value == {}))


def _shown(value: Any) -> str:
    text = printable_line(repr(value))
    return text if len(text) <= 60 else f"{text[:60]}…"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return (", ".join(map(printable_line, names[:MOST_SHOWN])) or "none") + more


def _counted(counts: Counter[str], what: str) -> str:
    return _listed(
        [f"{name or repr('')} ({count:,} {what})" for name, count in counts.most_common()]
    )
