"""``export-gguf``: a run's student in other file types."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

commands = typer.Typer()


@commands.command("export-gguf")
def export_gguf(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    quant: Annotated[
        str,
        typer.Option(
            metavar="TYPE[:embedding=ROWS][:output=ROWS],…|all",
            help="File types: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, q4_0, iq4_nl, with "
            "commas between them. ROWS: what the rows of tokens are stored as, in the embedding "
            "and in an output matrix of its own, also q5_k, q5_1, q5_0, q4_k, q4_1.",
        ),
    ] = "q4_k_m",
    output: Annotated[
        Path | None,
        typer.Option(
            help="File to write, for several types a folder that is there. Default: "
            "RUN/student-TYPE.gguf."
        ),
    ] = None,
    imatrix: Annotated[
        bool,
        typer.Option(
            "--imatrix/--no-imatrix",
            help="Quantize with the importance matrix of the run's training text.",
        ),
    ] = True,
) -> None:
    """Export a run's student again, in any of llama.cpp's file types, each proved before it gets
    its name."""
    from distill.config.units import parse_quants
    from distill.runs.exports import check_export
    from distill.runs.folder import RunFolder

    folder, quants = RunFolder(run_folder), parse_quants(quant)
    check_export(folder, quants, output)

    from distill.export.export_again import export_run
    from distill.runtime.progress import Console

    export_run(folder, quants, output, Console(), imatrix=imatrix)
