"""``export-gguf``: a run's student in other file types."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

commands = typer.Typer()


@commands.command("export-gguf")
def export_gguf(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    quant: Annotated[str, typer.Option(metavar="f32|f16|q8_0", help="Format of the weights.")] = "f16",
    output: Annotated[
        Path | None, typer.Option(help="File to write. Default: RUN/student-QUANT.gguf.")
    ] = None,
) -> None:
    """Export a run's student again in another format, proved against PyTorch before it gets its name."""
    from distill.config import ExportConfig, parse_quant
    from distill.console import Console, human_bytes
    from distill.exporting import export_run
    from distill.run_folder import RunFolder

    console = Console()
    wanted: ExportConfig = parse_quant(quant)
    with console.stage("Export and prove") as stage:
        path, proof = export_run(RunFolder(run_folder), wanted.quant, output)
        stage.finish(
            f"{path}, {human_bytes(path.stat().st_size)}; against PyTorch over {proof.positions} positions: max logit "
            f"difference {proof.max_logit_difference:.1e}, KL {proof.mean_kl:.1e}"
        )
