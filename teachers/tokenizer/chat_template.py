"""Render chat templates, which come from untrusted files: sandboxed, and nothing but text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NoReturn

from jinja2 import Template
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, str]


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> Template:
    """The template in a sandbox; its text is compiled once for many conversations."""

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


class ChatTemplateError(ValueError):
    """A chat template that cannot be rendered with these messages."""


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    bos: str = "",
    eos: str = "",
) -> str:
    """Render ``messages`` (each with ``role`` and ``content``) as the model's training text.

    Raises:
        ChatTemplateError: the template is broken or refuses the messages.
    """

    try:
        return _compiled(template).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            bos_token=bos,
            eos_token=eos,
        )
    except (TemplateError, TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise ChatTemplateError(f"the teacher's chat template does not render: {error}") from None
