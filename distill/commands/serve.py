"""``serve``: a teacher for other machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distill.commands.options import ConfigFile, Settings

commands = typer.Typer()


@commands.command()
def serve(
    teacher: Annotated[
        Path | None,
        typer.Argument(metavar="TEACHER.gguf", help="Default: the example teacher."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Where to listen; 0.0.0.0 for all networks of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8765,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="DISTILL_TEACHER_TOKEN",
            show_envvar=False,
            help="What clients must know, better given in DISTILL_TEACHER_TOKEN. Default: a new "
            "one, printed once.",
        ),
    ] = None,
    config: ConfigFile = None,
    set_: Settings = None,
) -> None:
    """Answer other machines' captures: log-probabilities, exact tail mass and hidden states.

    `distill capture --teacher http://HOST:PORT` and `distill run` ask it, with the same results as
    from the file. Other clients find /v1/completions with prompt_logprobs, as vLLM has it. It needs
    starlette and uvicorn.
    """
    import sys
    from importlib.util import find_spec

    from distill.config.loading import load_config
    from distill.errors import UserError
    from distill.pipeline.preflight import check_serve
    from distill.serving.access import choose_token

    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise UserError(
            f"distill serve needs starlette and uvicorn; run {sys.executable} -m pip install "
            "starlette uvicorn"
        )
    settings = load_config(config, {"teacher.path": str(teacher) if teacher else None}, set_ or [])
    secret, made = choose_token(token, host)
    check_serve(settings)

    from distill.runtime.progress import Console
    from distill.serving.serve import Listening
    from distill.serving.serve import serve as run

    run(settings, Listening(host, port, secret, made), Console())
