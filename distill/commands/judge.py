"""``judge``: what a student's heads decide on a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

commands = typer.Typer()


@commands.command()
def judge(
    student: Annotated[
        Path, typer.Argument(metavar="STUDENT.gguf", help="A student that `distill run` has made.")
    ],
    prompt: Annotated[str | None, typer.Argument(help="What to judge.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="JSONL file; its prompt of every line is judged."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per prompt.")] = False,
) -> None:
    """ALLOW, ESCALATE or REFUSE, and whether to ask the teacher: from the exported file alone."""
    from distill.inference.judge_inputs import check_judge

    texts = check_judge(student, prompt, prompts)

    from distill.inference.judge_command import judge_all, judge_one
    from distill.runtime.progress import Console

    if prompt is not None:
        judge_one(student, prompt, as_json, Console())
    else:
        judge_all(student, texts, as_json, Console())
