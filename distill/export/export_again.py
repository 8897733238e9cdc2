"""``distill export-gguf``: a finished run's student in any number of file types, each proved, in
one table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.table import Table

from distill.capture.temporary_files.tokenizer_only import tokenizer_entries
from distill.config.schema import Quant
from distill.evaluation.cost import UNSTEADY
from distill.export.export import (
    Export,
    Proofs,
    export_proved,
    origin_of,
    takes_importance,
)
from distill.export.importance import importance_of
from distill.export.student_folder import load_student
from distill.reports.card.card import update_card
from distill.runs.audit_events import record_export
from distill.runs.exports import ExportedFile, check_export, describe_file, record_files
from distill.runs.folder import RunFolder
from distill.runs.proof_record import Proof
from distill.runs.provenance import read_lineage
from distill.runtime.format import human_bytes
from distill.runtime.printable import markup
from distill.runtime.progress import Console
from students.gguf.file_types import Quantization
from students.gguf.metadata import ExportNames
from teachers.atomic_files import exclusive
from teachers.gguf.file import read_gguf


def export_run(
    folder: RunFolder,
    quants: Sequence[Quant],
    output: Path | None,
    console: Console,
    *,
    imatrix: bool = True,
) -> list[ExportedFile]:
    """Export a finished run's student again, in ``quants``.

    ``output``: for one type a file, for several a folder; none is the run's own folder.
    ``imatrix``: let the run's importance matrix help the quantizer.

    Raises:
        UserError: not a run's folder, one of its files is damaged, or something is in the way of
        ``output``. StoreError: another process works in the run's folder. ProofFailed: files are
        not the trained model; the others have been made and recorded. ExportError, OSError:
        llama.cpp's quantizer or the disk refuses; so have those before.
    """
    wanted = check_export(folder, quants, output)
    writable = os.access(folder.path, os.W_OK)
    with exclusive(folder.path) if writable else nullcontext():
        return _export_run(folder, wanted, console, imatrix, writable)


def _export_run(
    folder: RunFolder, wanted: dict[Quant, Path], console: Console, imatrix: bool, writable: bool
) -> list[ExportedFile]:
    student = load_student(folder)
    tokenizer = read_gguf(folder.tokenizer, model=False)
    name = str(tokenizer.value("general.name", "student"))
    importance = None
    if imatrix and any(map(takes_importance, wanted)):
        importance = importance_of(folder, student.config.vocab_size, console, keep=writable)
    export = Export(
        student,
        tokenizer_entries(tokenizer),
        ExportNames(name, origin_of(folder.read_identity()), read_lineage(folder)),
        folder.read_held_out(student.config.vocab_size),
        importance=importance,
    )
    files: list[ExportedFile] = []
    with console.stage("Export and prove", total=len(wanted)) as stage:

        def progress(quant: str) -> None:
            stage.update(len(files), quant)

        def record(quant: Quant, path: Path, proof: Proof) -> None:
            file = describe_file(path, quant, proof, importance=export.importance is not None)
            files.append(file)
            progress(quant)
            if not writable:
                return
            written = [path]
            if path.parent.resolve() == folder.path.resolve():
                record_files(folder, [file])
                written.append(folder.exports)
            record_export(folder.path, written, quant, proof.to_json())

        proofs = export_proved(export, wanted, progress, record)
        original = proofs.original
        stage.finish(
            f"F32 against PyTorch over {original.positions} positions: max logit difference "
            f"{original.max_logit_difference:.1e}"
        )
    if not writable:
        console.warn(
            f"{folder.path} cannot be written to, so its log and model card do not list these files"
        )
    elif folder.finished and any(
        path.parent.resolve() == folder.path.resolve() for path in wanted.values()
    ):
        update_card(folder, console)
    unsteady = [quant for quant, proof in proofs.files.items() if proof.unsteady_speed > UNSTEADY]
    if unsteady:
        console.warn(
            f"speeds of {', '.join(unsteady)} differed from trial to trial; is the machine busy "
            "otherwise?"
        )
    order = list(proofs.files)
    files.sort(key=lambda file: order.index(file.quant))
    console.rich.print(_table(name, proofs, files))
    proofs.require(folder.path)
    return files


def _table(name: str, proofs: Proofs, files: Sequence[ExportedFile]) -> Table:
    original = proofs.original
    table = Table(title=markup(name), title_justify="left", caption_justify="left")
    table.add_column("type", no_wrap=True)
    for column in ("size", "bits", "rows", "KL", "top", "decode", "prefill"):
        table.add_column(column, justify="right", no_wrap=True)
    for file in files:
        first = file.quant == "f32"
        table.add_row(
            file.quant + (" *" if file.imatrix else ""),
            human_bytes(file.bytes),
            f"{file.bits_per_weight:.2f}",
            file.embedding,
            "0" if first else f"{file.kl:.1e}",
            "100 %" if first else f"{file.agreement:.2%}",
            f"{file.generation:,.0f}",
            f"{file.prompt:,.0f}",
        )
    notes = [
        f"F32 against PyTorch: logits within {original.max_logit_difference:.1e} over "
        f"{original.positions} positions.",
        "Bits per weight; type of the embedding's rows; KL and same top token against F32; decode "
        "and prefill in tokens per second.",
    ]
    if any(file.imatrix for file in files):
        notes.append("* With the importance matrix of the run's training text.")
    if others := list(filter(None, map(_stored_otherwise, files))):
        notes.append(
            "Rows that do not divide into a type's blocks are stored as another: "
            f"{'; '.join(others)}."
        )
    table.caption = "\n".join(notes)
    return table


def _stored_otherwise(file: ExportedFile) -> str:
    """What the file holds in place of its own types, if others had to be taken."""
    chosen = Quantization.parse(file.quant)
    kinds = " and ".join(kind for kind in file.types if kind != "F32")
    others = [] if chosen.file_type.upper().removesuffix("_M") in file.types else [f"as {kinds}"]
    asked = chosen.rows.get("embedding", "").upper()
    if asked not in ("", file.embedding):
        others.append(f"with the embedding as {file.embedding}")
    return f"{file.quant} {', '.join(others)}" if others else ""
