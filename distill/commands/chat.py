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
    top_p: Annotated[
        float,
        typer.Option(
            min=0.01, max=1.0, help="Draw from the likeliest tokens of so much probability."
        ),
    ] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    system: Annotated[
        str | None, typer.Option(help="System message, if the model's chat template takes one.")
    ] = None,
    safety: Annotated[
        bool, typer.Option(help="Show what the student's heads decide, if it has any.")
    ] = True,
) -> None:
    """Talk to a GGUF file through llama.cpp.

    The answer comes word by word on standard output; on standard error, before it, what a student's
    safety head decides on the message (ALLOW, ESCALATE or REFUSE), and after it how far the teacher
    is expected to agree. That is shown, not applied: the answer comes after REFUSE as well, since
    the student itself has learnt what to refuse. Reasoning between <think> tags is never shown, and
    of a <final> answer only its content.
    """
    from distill.inference.chat import ChatSettings
    from distill.inference.chat_screen import chat_with

    chat_with(model, prompt, ChatSettings(temperature, top_p, max_tokens, seed, system), safety)
