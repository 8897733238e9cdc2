"""All commands: parses, calls one function, maps errors to exit codes."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console as RichConsole

from distill import __version__
from distill.commands import (
    audit,
    chat,
    doctor,
    evaluate,
    export,
    judge,
    report,
    run,
    serve,
    trim,
)
from distill.commands.exit_codes import exit_code, one_line
from distill.runtime import interrupts
from distill.runtime.printable import markup, show_warnings

# Set before torch and transformers are imported: no telemetry, no look-ups on the network, no
# progress bars of theirs between ours.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Threads that wait for each other give way after a few microseconds instead of milliseconds:
# nothing lost on a quiet machine, and on a busy one a training step is several times as fast
# (docs/benchmarks.md).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Distil a quantized GGUF teacher into a small SO8T student that stock llama.cpp and "
    "Ollama load.",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"distill {__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for module in (run, serve, evaluate, report, export, trim, judge, chat, audit, doctor):
    app.add_typer(module.commands)


def run_command() -> NoReturn:
    """Run the command line; ``KeyboardInterrupt`` where Ctrl-C has ended it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a redirected Windows console cannot write every sign
            stream.reconfigure(errors="replace")
    # In a launch of several processes the first one speaks.
    show_warnings(quiet=os.environ.get("RANK", "0") != "0")
    try:
        app()
    except SystemExit as stop:
        if stop.code == interrupts.EXIT_INTERRUPTED:  # typer's own answer to Ctrl-C, without a word
            raise KeyboardInterrupt from None
        raise
    except Exception as error:
        interrupts.check()  # native code may make another error of Ctrl-C
        code = exit_code(error)
        if code is None:
            raise  # a defect of ours: the traceback is what a report needs (Python exits with 1)
        _complain(one_line(error))
        sys.exit(code)
    sys.exit(0)


def _complain(message: str) -> None:
    RichConsole(stderr=True, highlight=False).print(
        f"[bold red]error:[/] {markup(message)}", soft_wrap=True
    )
