"""``distill export-gguf``: a finished run's student in any number of file types, each proved, in one table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from rich.markup import escape
from rich.table import Table

from distill.audit import record_export
from distill.card import write_card
from distill.config import Quant
from distill.console import Console, human_bytes
from distill.errors import ProofFailed, UserError
from distill.exporting import Export, Proofs, export_proved, origin_of, tokenizer_entries
from distill.lineage import read_lineage
from distill.prove import Proof
from distill.run_folder import RunFolder
from distill.saved_student import load_student
from students.export import ExportNames
from students.file_types import FILE_TYPES
from students.importance import read_mean_squares
from teachers.gguf_file import TeacherFileError, file_sha256, read_gguf
from teachers.store import write_whole


@dataclass(frozen=True)
class ExportedFile:
    """One proved file.

    ``kl`` (nats per token), ``agreement`` and ``max_logit_difference`` are against the F32 file (its own: against
    PyTorch). ``prompt`` and ``generation`` in tokens per second. ``types``: tensors by how they are stored, as
    llama.cpp takes another type where a row does not divide into blocks; ``bits_per_weight`` over all of them.
    """

    file: str
    quant: str
    bytes: int
    bits_per_weight: float
    sha256: str
    kl: float
    agreement: float
    max_logit_difference: float
    positions: int
    prompt: float
    generation: float
    imatrix: bool
    types: dict[str, int]


def describe_file(path: Path, proof: Proof, *, importance: bool) -> ExportedFile:
    """All that is to be said of a proved file; ``importance``: the quantizer had a matrix, where the type takes one."""
    file = read_gguf(path)
    bits = 8 * sum(tensor.nbytes for tensor in file.tensors.values()) / file.parameters
    return ExportedFile(
        file=path.name,
        quant=proof.quant,
        bytes=file.size,
        bits_per_weight=round(bits, 3),
        sha256=file_sha256(path),
        kl=proof.mean_kl,
        agreement=proof.agreement,
        max_logit_difference=proof.max_logit_difference,
        positions=proof.positions,
        prompt=round(proof.prompt_speed, 1),
        generation=round(proof.generation_speed, 1),
        imatrix=importance and FILE_TYPES[proof.quant].weighted,
        types=dict(Counter(tensor.type.name for tensor in file.tensors.values()).most_common()),
    )


def export_run(
    folder: RunFolder,
    quants: Sequence[Quant],
    output: Path | None,
    console: Console,
    *,
    imatrix: bool = True,
) -> list[ExportedFile]:
    """Export a finished run's student again, in ``quants``.

    ``output``: for one type a file, for several a folder; none is the run's own folder. ``imatrix``: let the run's
    importance matrix help the quantizer.

    Raises:
        UserError: not a run's folder, or something in the way of ``output``.
        ProofFailed, ExportError: a file is not the trained model; the others have been made.
        OSError: the disk refuses.
    """
    folder.read_config()
    if not folder.tokenizer.exists():
        raise UserError(f"{folder.path} has no trained student yet; let its command finish first")
    wanted = _paths(folder, quants, output)
    student = load_student(folder)
    tokenizer = read_gguf(folder.tokenizer, model=False)
    name = str(tokenizer.value("general.name", "student"))
    export = Export(
        student,
        tokenizer_entries(tokenizer),
        ExportNames(name, origin_of(folder.read_identity()), read_lineage(folder)),
        folder.read_held_out(student.config.vocab_size),
        importance=_importance(folder, quants, console) if imatrix else None,
    )
    proofs = _export(export, wanted, console)
    wanted = {quant: path for quant, path in wanted.items() if quant in proofs.files}
    helped = export.importance is not None
    files = [describe_file(path, proofs.files[quant], importance=helped) for quant, path in wanted.items()]
    here = [file for file, path in zip(files, wanted.values(), strict=True) if _is_in(folder, path)]
    if here:
        record_files(folder, here)
    for file, (quant, path) in zip(files, wanted.items(), strict=True):
        record_export(folder.path, [path], file.quant, proofs.files[quant].to_json())
    if folder.finished:
        write_card(folder)
    console.rich.print(_table(name, proofs, files))
    if proofs.failed:
        raise ProofFailed("; ".join(proofs.failed.values()))
    return files


def _export(export: Export, wanted: Mapping[Quant, Path], console: Console) -> Proofs:
    with console.stage("Export and prove", total=len(wanted)) as stage:
        begun: list[str] = []

        def begin(quant: str) -> None:
            stage.update(len(begun), quant)
            begun.append(quant)

        proofs = export_proved(export, wanted, begin)
        original = proofs.original
        stage.finish(
            f"F32 against PyTorch over {original.positions} positions: max logit difference "
            f"{original.max_logit_difference:.1e}"
        )
    return proofs


def _paths(folder: RunFolder, quants: Sequence[Quant], output: Path | None) -> dict[Quant, Path]:
    """Where each type goes."""
    several = len(quants) > 1
    if output is None:
        return {quant: folder.path / f"student-{quant}.gguf" for quant in quants}
    if several or output.is_dir():
        if not output.is_dir():
            raise UserError(f"--output {output} is not a folder; several types need one that is there")
        return {quant: output / f"student-{quant}.gguf" for quant in quants}
    if output.exists():
        raise UserError(f"--output {output} exists; choose another name")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: the folder {output.parent} does not exist")
    return {quants[0]: output}


def _importance(
    folder: RunFolder, quants: Sequence[Quant], console: Console
) -> dict[str, NDArray[np.float32]] | None:
    """The run's importance matrix, where one of the types takes one."""
    if not any(FILE_TYPES[quant].weighted for quant in quants):
        return None
    found = read_importance(folder)
    if found is None:
        console.note("this run has no importance matrix (imatrix.gguf), so the quantizer goes without")
    return found


def read_importance(folder: RunFolder) -> dict[str, NDArray[np.float32]] | None:
    """The run's importance matrix, as mean squares by matrix; ``None``: it has none, being older than they are.

    Raises:
        UserError: it is damaged.
    """
    if not folder.importance.exists():
        return None
    try:
        file = read_gguf(folder.importance, model=False)
        return read_mean_squares({name: file.tensor(name) for name in file.tensors})
    except (TeacherFileError, ValueError) as error:
        raise UserError(
            f"{folder.importance} is damaged ({error}); delete it, or leave it out with --no-imatrix"
        ) from None


def read_exports(folder: RunFolder) -> list[ExportedFile]:
    """What ``exports.json`` says of the files in the run's folder that are still there.

    Raises:
        UserError: it is damaged.
    """
    if not folder.exports.exists():
        return []
    try:
        found = TypeAdapter(list[ExportedFile]).validate_python(folder.read_json(folder.exports).get("files"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{folder.exports} is damaged ({where}: {first['msg']}); delete it and export again"
        ) from None
    return [file for file in found if (folder.path / file.file).is_file()]


def record_files(folder: RunFolder, files: Sequence[ExportedFile]) -> None:
    """Write down in ``exports.json`` what is known of files in the run's folder, in place of what was of these names.

    Raises:
        UserError: that file is damaged.
        OSError: the disk refuses.
    """
    names = {file.file for file in files}
    rows = [file for file in read_exports(folder) if file.file not in names] + list(files)
    rows.sort(key=lambda file: (list(FILE_TYPES).index(file.quant), file.file))
    content = json.dumps({"files": [asdict(file) for file in rows]}, indent=2) + "\n"
    write_whole(folder.exports, content.encode())


def _is_in(folder: RunFolder, path: Path) -> bool:
    return path.parent.resolve() == folder.path.resolve()


def _table(name: str, proofs: Proofs, files: Sequence[ExportedFile]) -> Table:
    original = proofs.original
    table = Table(title=escape(name), title_justify="left", caption_justify="left")
    table.add_column("type")
    for column in ("size", "bits", "KL to F32", "top token", "writing", "reading"):
        table.add_column(column, justify="right", no_wrap=True)
    for file in files:
        first = file.quant == "f32"
        table.add_row(
            file.quant + (" *" if file.imatrix else ""),
            human_bytes(file.bytes),
            f"{file.bits_per_weight:.2f}",
            "0" if first else f"{file.kl:.1e}",
            "100 %" if first else f"{file.agreement:.2%}",
            f"{file.generation:,.0f}",
            f"{file.prompt:,.0f}",
        )
    notes = [
        f"F32 against PyTorch: logits within {original.max_logit_difference:.1e} over {original.positions} positions.",
        "Bits per weight; the same top token as F32; writing and reading in tokens per second.",
    ]
    if any(file.imatrix for file in files):
        notes.append("* With the importance matrix of the run's training text.")
    if others := [_stored_otherwise(file) for file in files if _stored_otherwise(file)]:
        notes.append(
            f"Rows that do not divide into a type's blocks are stored as another: {'; '.join(others)}."
        )
    table.caption = "\n".join(notes)
    return table


def _stored_otherwise(file: ExportedFile) -> str:
    """What the file holds in place of its own type, if llama.cpp had to take another; else nothing."""
    own = file.quant.upper().removesuffix("_M")
    if own in file.types:
        return ""
    return f"{file.quant} as {' and '.join(kind for kind in file.types if kind != 'F32')}"
