"""``evaluate``: students against their teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distill.commands.options import AsJson, Page, Settings

commands = typer.Typer()

Students = Annotated[
    list[Path],
    typer.Argument(
        metavar="STUDENT…", help="GGUF files, or runs' folders, which stand for their student.gguf."
    ),
]
Teacher = Annotated[
    Path | None,
    typer.Option(
        help="GGUF file of the teacher. Default: the example teacher, if the students are its own."
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Rows (JSON, Parquet, CSV) of conversations, prompts or text; plain text; or a folder "
        "of them. Default: the validation sequences of the students' run, or else the teacher "
        "generates it."
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        min=8,
        help="Tokens of a sequence at most. Default: 512, or less where a context is smaller.",
    ),
]
DraftLength = Annotated[
    int,
    typer.Option(
        min=1, max=64, help="Tokens that the student would draft in speculative decoding."
    ),
]
SafetyPrompts = Annotated[
    Path | None,
    typer.Option(
        help="JSONL file of prompt and label for the safety head. Default: those that the run has "
        "kept for it, or the built-in ones."
    ),
]
Tasks = Annotated[
    Path | None,
    typer.Option(
        help="JSONL file of prompts with their right answers, asked of every model (prompt, "
        "answer; match: exact, contains or prefix)."
    ),
]
Harness = Annotated[
    str | None,
    typer.Option(metavar="TASK,TASK", help="Tasks of lm-evaluation-harness, if that is installed."),
]


@commands.command()
def evaluate(
    students: Students,
    teacher: Teacher = None,
    data: Data = None,
    settings: Settings = None,
    samples: Annotated[int, typer.Option(min=2, help="Sequences at most.")] = 256,
    max_length: MaxLength = None,
    seed: Annotated[
        int, typer.Option(min=0, max=(1 << 32) - 1, help="Seed of what is chosen and generated.")
    ] = 0,
    draft_length: DraftLength = 4,
    safety_prompts: SafetyPrompts = None,
    tasks: Tasks = None,
    lm_eval: Harness = None,
    lm_eval_limit: Annotated[
        int | None, typer.Option(min=1, help="Examples of each such task at most.")
    ] = None,
    gpu_layers: Annotated[
        int, typer.Option(min=-1, help="Layers of every model on the GPU; -1: all of them.")
    ] = 0,
    as_json: AsJson = False,
    output: Page = None,
) -> None:
    """Compare students with their teacher: predictions, tasks, speed, size."""
    import json

    from distill.config.loading import load_config
    from distill.evaluation.inputs.check import check_evaluation
    from distill.evaluation.inputs.request import Request, TextRequest
    from distill.runtime.progress import Console

    names = [name.strip() for name in (lm_eval or "").split(",") if name.strip()]
    _check(lm_eval, names, lm_eval_limit, output)
    _check_settings(settings or [], data)
    rows = load_config(None, {}, settings or []).data
    request = Request(
        students=students,
        teacher=teacher,
        text=TextRequest(data, samples, max_length, seed, rows.split, rows.columns),
        draft_length=draft_length,
        safety_prompts=safety_prompts,
        tasks=tasks,
        harness=names,
        harness_limit=lm_eval_limit,
        gpu_layers=gpu_layers,
    )
    console = Console(stderr=as_json)
    with console.stage_if_slow("Read files") as progress:
        inputs = check_evaluation(request, progress)

    from distill.evaluation.compare import evaluate_files
    from distill.reports.comparison.report import document_of
    from distill.reports.render.html import write_page
    from distill.reports.render.terminal import print_report

    comparison = evaluate_files(request, console, inputs)
    document = document_of(comparison)
    if output is not None:
        write_page(document, output)
    if as_json:
        print(json.dumps(comparison.to_json(), ensure_ascii=False, allow_nan=False))
        return
    print_report(document, console.rich)
    if output is not None:
        console.note(f"page: {output}")


def _check(lm_eval: str | None, names: list[str], limit: int | None, output: Path | None) -> None:
    """Refuse, before anything takes long, what could only fail at the end."""
    from distill.errors import UserError

    if lm_eval is not None and not names:
        raise UserError(f"--lm-eval {lm_eval!r} names no task; write them with commas between them")
    if limit is not None and not names:
        raise UserError(f"--lm-eval-limit {limit} is for the tasks of --lm-eval; name some")
    if output is not None:
        from distill.reports.inputs import require_page_path

        if output.is_dir():
            raise UserError(f"--output {output} is a folder; name a file")
        require_page_path(output)


def _check_settings(settings: list[str], data: Path | None) -> None:
    """Refuse settings of what an evaluation does not do."""
    from distill.errors import UserError

    for setting in settings:
        if data is None or not setting.startswith(
            ("data.split=", "data.columns=", "data.columns.")
        ):
            raise UserError(
                f"--set {setting!r}: evaluate takes data.split and data.columns, of --data"
            )
