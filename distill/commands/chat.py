"""``chat``: talk to a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

commands = typer.Typer()


@commands.command()
def chat(
    model: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="Any GGUF language model.")],
    prompt: Annotated[
        str | None, typer.Argument(help="One message. Default: a conversation, one line each.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 always takes the most probable token.")
    ] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
) -> None:
    """Talk to a GGUF file through llama.cpp."""
    from distill.chat import Conversation
    from teachers.gguf_teacher import GGUFTeacher

    with GGUFTeacher(model) as loaded:
        conversation = Conversation(loaded, temperature=temperature, max_new_tokens=max_tokens, seed=seed)
        if prompt is not None:
            print(conversation.say(prompt))
            return
        print(f"{loaded.info.name}. An empty line or Ctrl-D ends the conversation.")
        while line := _read_line():
            print(conversation.say(line))


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return ""
