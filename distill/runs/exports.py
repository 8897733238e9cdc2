"""What is known of the files that a run's student was exported to: ``exports.json``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from distill.config.schema import Quant
from distill.errors import UserError
from distill.runs.folder import RunFolder
from students.gguf.architectures import EMBEDDING
from students.gguf.file_types import FILE_TYPES, Quantization
from teachers.atomic_files import write_whole
from teachers.gguf.file import file_sha256, read_gguf

if TYPE_CHECKING:
    from distill.runs.proof_record import Proof


@dataclass(frozen=True)
class ExportedFile:
    """One proved file.

    ``kl`` (nats per token), ``agreement`` and ``max_logit_difference`` are against the F32 file
    (its own: against PyTorch). Speeds in tokens per second. ``types``: tensors by storage type;
    llama.cpp falls back to another where a row does not divide into blocks. ``embedding``: the type
    of its rows.
    """

    file: str
    quant: Quant
    bytes: int
    bits_per_weight: float
    sha256: str
    kl: float | None = None
    agreement: float | None = None
    max_logit_difference: float | None = None
    positions: int = 0
    prompt: float | None = None
    generation: float | None = None
    imatrix: bool = False
    types: dict[str, int] = field(default_factory=dict)
    embedding: str = ""


def export_paths(
    folder: RunFolder, quants: Sequence[Quant], output: Path | None
) -> dict[Quant, Path]:
    """The path of each type; raises ``UserError`` if ``output`` cannot take them."""
    if output is None:
        return {quant: folder.path / _file_name(quant) for quant in quants}
    if len(quants) > 1 or output.is_dir():
        if not output.is_dir():
            raise UserError(
                f"--output {output} is not a folder; several types need one that is there"
            )
        paths = {quant: output / _file_name(quant) for quant in quants}
        there = [path for path in paths.values() if path.exists()]
        if there and output.resolve() != folder.path.resolve():
            raise UserError(
                f"--output {output} has a {there[0].name} already; choose another folder"
            )
        return paths
    if output.suffix != ".gguf":
        raise UserError(f"--output {output} must end in .gguf, or be a folder that is there")
    if output.exists():
        raise UserError(f"--output {output} exists; choose another name")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: the folder {output.parent} does not exist")
    return {quants[0]: output}


def _file_name(quant: Quant) -> str:
    return f"student-{Quantization.parse(quant).stem}.gguf"


def describe_file(path: Path, quant: Quant, proof: Proof, *, importance: bool) -> ExportedFile:
    """The record of a proved file; ``importance``: the quantizer had an importance matrix."""
    file = read_gguf(path)
    bits = 8 * sum(tensor.nbytes for tensor in file.tensors.values()) / file.parameters
    return ExportedFile(
        file=path.name,
        quant=quant,
        bytes=file.size,
        bits_per_weight=round(bits, 3),
        sha256=file_sha256(path),
        kl=proof.mean_kl,
        agreement=proof.agreement,
        max_logit_difference=proof.max_logit_difference,
        positions=proof.positions,
        prompt=round(proof.prompt_speed, 1),
        generation=round(proof.generation_speed, 1),
        imatrix=importance and FILE_TYPES[Quantization.parse(quant).file_type].weighted,
        types=dict(Counter(tensor.type.name for tensor in file.tensors.values()).most_common()),
        embedding=file.tensors[EMBEDDING].type.name,
    )


def read_exports(folder: RunFolder) -> list[ExportedFile]:
    """Records of the files still in the run's folder; ``UserError`` if ``exports.json`` is
    damaged."""
    if not folder.exports.exists():
        return []
    try:
        result = TypeAdapter(list[ExportedFile]).validate_python(
            folder.read_json(folder.exports).get("files")
        )
        if strange := [file.file for file in result if Path(file.file).name != file.file]:
            raise ValueError(f"{strange[0]!r} is not the name of a file")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _damaged(folder, f"{where or 'files'}: {first['msg']}") from None
    except ValueError as error:
        raise _damaged(folder, str(error)) from None
    return [file for file in result if (folder.path / file.file).is_file()]


def record_files(folder: RunFolder, files: Sequence[ExportedFile]) -> None:
    """Record exported files; replaces records of the same names.

    Raises:
        UserError, OSError: ``exports.json`` is damaged, or the disk refuses.
    """
    names = {file.file for file in files}
    rows = [file for file in read_exports(folder) if file.file not in names] + list(files)
    order = list(FILE_TYPES)
    rows.sort(key=lambda row: (order.index(Quantization.parse(row.quant).file_type), row.file))
    content = json.dumps({"files": [asdict(file) for file in rows]}, indent=2) + "\n"
    write_whole(folder.exports, content.encode())


def _damaged(folder: RunFolder, reason: str) -> UserError:
    return UserError(f"{folder.exports} is damaged ({reason}); delete it and export again")


def check_export(
    folder: RunFolder, quants: Sequence[Quant], output: Path | None
) -> dict[Quant, Path]:
    """Check ``distill export-gguf``'s inputs; returns the path of each type.

    Raises:
        UserError: no finished run, a damaged file, or an unusable ``output``.
    """
    folder.read_config()
    if not folder.tokenizer.exists():
        raise UserError(f"{folder.path} has no trained student yet; let its command finish first")
    paths = export_paths(folder, quants, output)
    read_exports(folder)
    return paths
