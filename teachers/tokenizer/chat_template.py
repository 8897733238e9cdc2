"""Chat templates as transformers renders them: sandboxed, as they come from untrusted files, and
with the places of the text that the model generated."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from teachers.tokenizer.rows import Message

MOST_SHOWN = 300  # characters of what a template says in refusing
LONGEST = 1 << 24  # characters of one conversation, or of a text that a template multiplies
GIVEN = ("messages", "add_generation_prompt", "bos_token", "eos_token")  # to every template
LISTS = ("tools", "documents")  # given too, as none where a conversation has none
_BITS = 1 << 12  # of a power: a larger one takes time without end
# Names under which a message's thoughts are known; transformers gives them to templates as both.
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplateError(ValueError):
    """A chat template that cannot be rendered with these messages."""


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text, and where in it generated text is: ``[start, end)`` in characters.

    ``generated`` is ``None`` where the template does not say: it has no ``{% generation %}`` tag,
    or one inside a macro or a captured block, whose place in the text nothing tells.
    """

    text: str
    generated: tuple[tuple[int, int], ...] | None


class _Generation(Extension):
    """``{% generation %}``: its content as it stands, noted with the place where it begins."""

    tags = {"generation"}  # noqa: RUF012  (as in Jinja's own class)

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.used = False
        self.at = 0
        self.contents: list[tuple[int, str]] = []

    def parse(self, parser: Parser) -> nodes.Node:
        self.used = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("note"), [], [], body).set_lineno(line)

    def note(self, caller: Callable[[], str]) -> str:
        """Note the content that ``caller`` renders, and return it."""
        content = caller()
        self.contents.append((self.at, content))
        return content


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also refuses products and powers without bounds."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute ``left operator right``; ``OverflowError`` where the result is too large."""
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and numbers and left.bit_length() * right > _BITS:
            raise OverflowError(f"a power of more than {_BITS:,} bits")
        for items, count in ((left, right), (right, left)):
            long = isinstance(items, str | list | tuple) and isinstance(count, int)
            if operator == "*" and long and len(items) * count > LONGEST:
                raise OverflowError(f"a text of more than {LONGEST:,} characters")
        return super().call_binop(context, operator, left, right)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter of this name writes signs of HTML as escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    """Now, or the moment that ``SOURCE_DATE_EPOCH`` fixes (seconds since 1970, UTC)."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH")
    now = datetime.now() if fixed is None else datetime.fromtimestamp(int(fixed), timezone.utc)
    return now.strftime(form)


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> tuple[Template, _Generation]:
    """The template in a sandbox; its text is compiled once for many conversations."""
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
    compiled = environment.from_string(template)
    return compiled, environment.extensions[_Generation.identifier]  # type: ignore[return-value]


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    bos: str = "",
    eos: str = "",
    variables: Mapping[str, Any] | None = None,
) -> RenderedChat:
    """Render ``messages`` as the model's training text, with the places of generated text.

    ``messages``: as transformers takes them, with ``role`` and what else the template reads
    (``content``, ``tool_calls``, …); a key whose value is ``None`` counts as absent. ``variables``:
    what else the template may use, such as ``tools`` and ``documents`` (lists of objects).

    Raises:
        ChatTemplateError: the template is broken or refuses the messages.
    """
    values = {**dict.fromkeys(LISTS), "bos_token": bos, "eos_token": eos}
    values |= {**(variables or {}), "add_generation_prompt": add_generation_prompt}
    pieces: list[str] = []
    try:
        compiled, generation = _compiled(template)
        generation.at, generation.contents = 0, []
        for piece in compiled.generate(values, messages=[_plain(one) for one in messages]):
            pieces.append(piece)
            generation.at += len(piece)
            if generation.at > LONGEST:
                raise OverflowError(f"it gives more than {LONGEST:,} characters")
    except Exception as error:  # a foreign program: whatever it raises is an error in it
        reason = " ".join(str(error)[:MOST_SHOWN].split()) or type(error).__name__
        raise ChatTemplateError(f"the teacher's chat template does not render: {reason}") from None
    text = "".join(pieces)
    spans = [(start, start + len(content)) for start, content in generation.contents]
    told = generation.used and all(
        text.startswith(content, start) for start, content in generation.contents
    )
    return RenderedChat(text, tuple(spans) if told else None)


def with_variables(template: str, variables: Mapping[str, Any]) -> str:
    """The template with JSON values of its own for ``variables`` where its caller gives none."""
    values = ""
    for name, value in variables.items():
        missing = f"not {name}" if name in LISTS else f"{name} is not defined"
        values += f"{{% if {missing} %}}{{% set {name} = {value!r} %}}{{% endif %}}"
    return f"{values}\n{template}" if values else template  # trim_blocks takes the line end away


def _plain(message: Message) -> Message:
    """A message as transformers hands it to a template."""
    given = {key: value for key, value in message.items() if value is not None}
    thoughts = next((given[key] for key in _THOUGHTS if key in given), None)
    if thoughts is not None:
        given = {"thinking": thoughts, **given, "reasoning_content": thoughts}
    return given
