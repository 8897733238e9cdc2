"""``trim``: a GGUF model with a smaller vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distill.commands.options import AsJson

commands = typer.Typer()


@commands.command()
def trim(
    teacher: Annotated[Path, typer.Argument(metavar="TEACHER", help="GGUF file of any model.")],
    vocab: Annotated[
        str,
        typer.Option(
            metavar="NUMBER|SHARE%|auto",
            help="How many tokens to keep: 32k (k is 1,024), 25%, or auto, the smallest vocabulary "
            "that keeps 99.9 % of the model's probability and adds at most 1 % tokens.",
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="Text of the kind the model is for: rows (JSON, Parquet, CSV), plain text, or a "
            "folder of them. A tenth, in stretches all over it, is held out to judge the result."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="GGUF file to write.")],
    tokens: Annotated[
        int,
        typer.Option(
            help="Tokens of the text that the model reads to choose by; half as many to judge."
        ),
    ] = 8192,
    as_json: AsJson = False,
) -> None:
    """Cut a model's vocabulary down to what a text needs, without training: a smaller, faster
    file, proved against the original."""
    import json

    from distill.trimming.request import TrimRequest, check_trim
    from teachers.vocabulary.size import VocabularySize

    request = TrimRequest(teacher, data, output, VocabularySize.parse(vocab), tokens)
    inputs = check_trim(request)

    from distill.reports.document import Document
    from distill.reports.render.terminal import print_report
    from distill.runtime.progress import Console
    from distill.trimming.card import trim_section
    from distill.trimming.trim import trim as run

    console = Console(stderr=as_json)
    result = run(inputs, console)
    for lost in result.lost:
        console.warn(
            f"{lost.share:.1%} of the {lost.name} letters in the text ({lost.of_text:.2%} of all "
            "its letters) have no token any more and are written in bytes; ask for more tokens if "
            "the model is to write them"
        )
    if as_json:
        print(json.dumps(result.to_json(), ensure_ascii=False, allow_nan=False))
        return
    title = f"{result.original.name}, trimmed"
    document = Document(title, "", [], [trim_section(result)], {})
    print_report(document, console.rich)
    beside = (request.card, request.modelfile, request.tokenizer)
    console.note(f"{output}; beside it {', '.join(path.name for path in beside)}")
