"""What Ollama does with a Modelfile, as its documentation and Go's say.

A small evaluator of Go's text/template: text with trim markers, ``if``, ``range``, variables,
fields, strings, numbers, parentheses and the functions that Modelfiles use. Anything else is an
error.
"""

from __future__ import annotations

import json
import re
from typing import Any

Scopes = list[dict[str, Any]]
_ACTION = re.compile(r"\{\{(- )?\s*(.*?)\s*( -)?\}\}", re.DOTALL)
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|\d+|:=|[=,()]|\$?\.?[\w.]+|\$')
_MARGIN = " \t\r\n"


def read_modelfile(data: bytes) -> list[tuple[str, str]]:
    """Every command with its value, character by character as Ollama reads them."""
    commands: list[tuple[str, str]] = []
    state, buffer, name = "nothing", "", ""
    for character in data.decode("utf-8") + "\n":
        if state == "comment":
            state = "nothing" if character in "\r\n" else "comment"
        elif state == "nothing":
            if character == "#":
                state = "comment"
            elif character not in " \t\r\n":
                state, buffer = "name", character
        elif state in ("name", "parameter"):
            if character not in " \t":
                assert character.isascii() and (character.isalnum() or character == "_"), character
                buffer += character
            elif state == "name" and buffer.lower() == "parameter":
                state, buffer = "parameter", ""
            else:
                name, state, buffer = buffer.lower(), "value", ""
        elif character in " \t\r\n":
            value = _unquoted(buffer.strip())
            if value is None or character in " \t":
                buffer += character
            else:
                commands.append((name, value))
                state = "nothing"
        elif character.isprintable():  # all others are dropped
            buffer += character
    assert state == "nothing", f"unfinished: {buffer!r}"
    known = {"from", "template", "license", "stop", "num_ctx"}
    assert {name for name, _ in commands} <= known
    return commands


def _unquoted(text: str) -> str | None:
    for marks in ('"""', '"'):
        if text.startswith(marks):
            size = len(marks)
            closed = text.endswith(marks) and len(text) >= 2 * size
            return text[size:-size] if closed else None
    return text


def fill_in(template: str, messages: list[dict[str, str]]) -> str:
    """The prompt that Ollama makes of a conversation (for a template that reads ``.Messages``)."""
    collated: list[dict[str, str]] = []
    for message in messages:
        if collated and collated[-1]["Role"] == message["role"]:
            collated[-1]["Content"] += "\n\n" + message["content"]
        else:
            collated.append({"Role": message["role"], "Content": message["content"]})
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    return GoTemplate(template).execute({"System": system, "Messages": collated, "Response": ""})


class GoTemplate:
    """A parsed template."""

    def __init__(self, source: str) -> None:
        self.pieces = self._lex(source)
        self.at = 0
        self.nodes, ended = self._block()
        assert ended == "", f"{ended} without a beginning"

    @staticmethod
    def _lex(source: str) -> list[tuple[str, str]]:
        pieces, at, trim = [], 0, False
        for found in _ACTION.finditer(source):
            text = source[at : found.start()]
            assert "{{" not in text and (found[2] or "") != "", source
            text = text.lstrip(_MARGIN) if trim else text
            pieces.append(("text", text.rstrip(_MARGIN) if found[1] else text))
            pieces.append(("action", found[2]))
            at, trim = found.end(), bool(found[3])
        rest = source[at:]
        assert "{{" not in rest
        return [*pieces, ("text", rest.lstrip(_MARGIN) if trim else rest)]

    def _block(self) -> tuple[list[Any], str]:
        """Nodes up to the ``else`` or ``end`` that closes them, and which of the two it was."""
        nodes: list[Any] = []
        while self.at < len(self.pieces):
            kind, value = self.pieces[self.at]
            self.at += 1
            if kind == "text":
                nodes.append(("text", value))
            elif value == "end" or value.split()[0] == "else":
                return nodes, value
            elif value.split()[0] in ("if", "range"):
                word, _, rest = value.partition(" ")
                nodes.append((word, rest, *self._branches(word)))
            else:
                nodes.append(("do", value))
        return nodes, ""

    def _branches(self, word: str) -> tuple[list[Any], list[Any]]:
        then, ended = self._block()
        assert ended, f"{word} without an end"
        if ended == "end":
            return then, []
        if ended == "else":
            other, last = self._block()
            assert last == "end"
            return then, other
        assert word == "if" and ended.startswith("else if ")
        return then, [("if", ended.removeprefix("else if "), *self._branches("if"))]

    def execute(self, data: dict[str, Any]) -> str:
        """The text for ``data``."""
        out: list[str] = []
        self._run(self.nodes, data, [{"$": data}], out)
        return "".join(out)

    def _run(self, nodes: list[Any], dot: Any, scopes: Scopes, out: list[str]) -> None:
        scopes = [*scopes, {}]
        for node in nodes:
            if node[0] == "text":
                out.append(node[1])
            elif node[0] == "do":
                self._do(node[1], dot, scopes, out)
            elif node[0] == "if":
                chosen = node[2] if evaluate(node[1], dot, scopes) else node[3]
                self._run(chosen, dot, scopes, out)
            else:
                names, declared, pipeline = node[1].rpartition(":=")
                items = evaluate(pipeline, dot, scopes)
                for place, item in enumerate(items):
                    named = [name.strip() for name in names.split(",")] if declared else []
                    values = [item] if len(named) == 1 else [place, item]
                    self._run(node[2], item, [*scopes, dict(zip(named, values, strict=False))], out)
                if not items:
                    self._run(node[3], dot, scopes, out)

    @staticmethod
    def _do(action: str, dot: Any, scopes: Scopes, out: list[str]) -> None:
        assignment = re.match(r"(\$\w+) (:?=) ", action)
        if assignment is None:
            out.append(str(evaluate(action, dot, scopes)))
            return
        name, holder = assignment[1], scopes[-1]
        if assignment[2] == "=":  # the innermost variable of that name
            holder = next(scope for scope in reversed(scopes) if name in scope)
        holder[name] = evaluate(action[assignment.end() :], dot, scopes)


FUNCTIONS: dict[str, Any] = {
    "eq": lambda first, *others: any(first == other for other in others),
    "ne": lambda one, two: one != two,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
    "not": lambda value: not value,
    "len": len,
    "gt": lambda one, two: one > two,
    "slice": lambda items, start, stop=None: items[start:stop],
    "index": lambda items, place: items[place],
}


def evaluate(pipeline: str, dot: Any, scopes: Scopes) -> Any:
    """The value of a pipeline of one command."""
    words = _WORD.findall(pipeline)
    assert re.sub(r"\s", "", "".join(words)) == re.sub(r"\s", "", pipeline), pipeline
    value, rest = _command(words, dot, scopes)
    assert not rest, pipeline
    return value


def _command(words: list[str], dot: Any, scopes: Scopes) -> tuple[Any, list[str]]:
    if words[0] in FUNCTIONS:
        arguments, rest = [], words[1:]
        while rest and rest[0] != ")":
            value, rest = _operand(rest, dot, scopes)
            arguments.append(value)
        return FUNCTIONS[words[0]](*arguments), rest
    return _operand(words, dot, scopes)


def _operand(words: list[str], dot: Any, scopes: Scopes) -> tuple[Any, list[str]]:
    word, rest = words[0], words[1:]
    if word == "(":
        value, rest = _command(rest, dot, scopes)
        assert rest[0] == ")"
        return value, rest[1:]
    if word.startswith('"'):
        return json.loads(word), rest
    if word.isdigit():
        return int(word), rest
    name, *fields = word.split(".")
    if name.startswith("$"):
        value = next(scope[name] for scope in reversed(scopes) if name in scope)
    else:
        assert name == "", f"{word} is no function of Ollama's"
        value = dot
    for field in filter(None, fields):
        value = value[field]
    return value, rest
