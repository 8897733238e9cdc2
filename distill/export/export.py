"""Write a student as GGUF files, prove each, and only then give it its name."""

from __future__ import annotations

import glob
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from transformers import PreTrainedModel

from distill.config.schema import Quant
from distill.errors import ProofFailed, UserError
from distill.export.importance import DATASET, ImportanceOf, MeanSquares
from distill.export.proof import expected_of, proof_sequences, prove, prove_quantized
from distill.runs.folder import HeldOut
from distill.runs.proof_record import Proof
from students.adapter.adapter import AdaptedStudent
from students.adapter.merge import merge
from students.gguf.architectures import EMBEDDING, OUTPUT
from students.gguf.file_types import FILE_TYPES, Quantization
from students.gguf.metadata import ExportNames, MetadataEntry
from students.gguf.quantize import quantize_gguf
from students.gguf.writer import rotation_stats, write_base_gguf, write_gguf
from students.mapped_tensors import MappedTensors
from students.model.decoder import SO8TForCausalLM
from students.model.heads import head_values
from students.model.interface import Student
from teachers.gguf.file import read_gguf

ORIGIN = ("teacher_name", "teacher_sha256", "base_name", "base_sha256")


@dataclass(frozen=True)
class Export:
    """What is to be exported: the student, the teacher's tokenizer metadata, what the files say of
    themselves.

    ``merged``: a student made of a base, merged already. ``importance``: how to get mean squares by
    matrix (``students.gguf.imatrix``) for a quantizer that takes them, if there is a way.
    """

    student: Student
    tokenizer: Mapping[str, MetadataEntry]
    names: ExportNames
    held_out: HeldOut
    merged: PreTrainedModel | None = None
    importance: ImportanceOf | None = None


@dataclass(frozen=True)
class Proofs:
    """``original``: of the F32 file, against PyTorch; ``files``: of the types asked for;
    ``failed``: why a type was not written."""

    original: Proof
    files: dict[Quant, Proof]
    failed: dict[Quant, str]

    @property
    def only(self) -> Proof:
        """Of the one file that was asked for and written."""
        (proof,) = self.files.values()
        return proof

    def require(self, folder: Path) -> None:
        """See that each type asked for was written.

        Raises:
            ProofFailed: one was not; says how the run in ``folder`` gets a more exact one.
        """
        if self.failed:
            others = "f32" if "f16" in self.failed else "f16 (or f32)"
            raise ProofFailed(
                f"{'; '.join(self.failed.values())}. The F32 file passed: take a more exact type "
                f"with distill export-gguf {shlex.quote(str(folder))} --quant {others}"
            )


def origin_of(identity: Mapping[str, str]) -> dict[str, str]:
    """What an exported file says of where it came from, out of a run's identity."""
    return {key: identity[key] for key in ORIGIN if key in identity}


def takes_importance(quant: Quant) -> bool:
    """Whether llama.cpp's quantizer weighs by an importance matrix for this type."""
    return FILE_TYPES[Quantization.parse(quant).file_type].weighted


def export_proved(
    export: Export,
    wanted: Mapping[Quant, Path],
    progress: Callable[[str], None] = lambda what: None,
    done: Callable[[Quant, Path, Proof], None] = lambda quant, path, proof: None,
) -> Proofs:
    """Export to every path of ``wanted``; a file that is there already is replaced only by a proved
    one.

    The student is written as F32 and compared with PyTorch; llama.cpp's own quantizer makes the
    other types from that file, and each is compared with it; one that fails is left out.
    ``progress`` gets the type in work; ``done`` is called as soon as a file has its name, so that
    all of the files that are there, and no others, are recorded, however this ends.

    Raises:
        UserError: an importance matrix of another model.
        ProofFailed: llama.cpp computes something else than PyTorch.
        ExportError: llama.cpp's quantizer refuses.
        OSError: the disk refuses.
    """
    failed: dict[Quant, str] = {}
    proofs: dict[Quant, Proof] = {}
    first = next(iter(wanted.values()))
    with MappedTensors(first.parent) as kept, _temporary(first, "f32") as temporary:
        progress("f32")
        model = _write(export, temporary, kept)
        chosen = proof_sequences(export.held_out.sequences, model.config.vocab_size)
        expected = expected_of(model, chosen, kept)
        importance: MeanSquares = {}
        if export.importance is not None and any(map(takes_importance, wanted)):
            progress("importance matrix")
            importance = export.importance(model)
        del model
        timed = "f32" in wanted
        proof, reference = prove(temporary, expected, export.held_out, kept, timed=timed)
        original = temporary
        if "f32" in wanted:
            original, proofs["f32"] = wanted["f32"], proof
            _replace(temporary, original)
            done("f32", original, proof)
        quantized = {quant: path for quant, path in wanted.items() if quant != "f32"}
        if quantized:
            _require_fit(importance, original, quantized)
        for quant, path in quantized.items():
            progress(quant)
            with _temporary(path, quant) as made:
                _quantize(original, made, quant, importance)
                try:
                    proofs[quant] = prove_quantized(made, quant, reference, export.held_out)
                except ProofFailed as failure:
                    failed[quant] = str(failure)
                    continue
                _replace(made, path)
            done(quant, path, proofs[quant])
    return Proofs(proof, {quant: proofs[quant] for quant in wanted if quant in proofs}, failed)


def _require_fit(importance: MeanSquares, original: Path, quants: Iterable[Quant]) -> None:
    """See that the types of rows asked for, and the importance matrix, are of this model."""
    matrices = {
        name: info.shape
        for name, info in read_gguf(original).tensors.items()
        if len(info.shape) == 2
    }
    for quant in quants:
        if "output" in Quantization.parse(quant).rows and OUTPUT not in matrices:
            raise UserError(
                f"{quant}: this student's output matrix is its embedding; give the type of its "
                "rows as embedding="
            )
    for name, values in importance.items():
        if name not in matrices or matrices[name][1] != len(values):
            raise UserError(
                f"the importance matrix is not of this student ({name} with {len(values)} "
                "columns); delete imatrix.gguf, or leave it out with --no-imatrix"
            )


def _write(export: Export, path: Path, kept: MappedTensors) -> Any:
    """Write the F32 file; returns the PyTorch model that it is to be compared with, merged into
    ``kept`` where that is still to be done."""
    student = export.student
    with _naming(path):
        if isinstance(student, AdaptedStudent):
            model = export.merged if export.merged is not None else merge(student, kept.keep)
            rotations = {f"so8t.{key}": value for key, value in rotation_stats(student).items()}
            extras = {**head_values(student.heads()), **rotations}
            write_base_gguf(model, path, "f32", export.tokenizer, export.names, extras)
            return model
        assert isinstance(student, SO8TForCausalLM)
        write_gguf(student, path, "f32", export.tokenizer, export.names)
    return student


def _quantize(source: Path, target: Path, quant: Quant, importance: MeanSquares) -> None:
    chosen = Quantization.parse(quant)
    tensors = read_gguf(source).tensors
    rows = chosen.row_types(tensors[EMBEDDING].shape[1], OUTPUT not in tensors)
    if not takes_importance(quant):
        importance = {}
    labels: dict[str, int | str] = {}
    if importance:
        labels = {
            "quantize.imatrix.dataset": DATASET,
            "quantize.imatrix.entries_count": len(importance),
        }
    with _naming(target):
        quantize_gguf(
            source,
            target,
            chosen.file_type,
            rows=rows,
            importance=importance or None,
            labels=labels,
        )


@contextmanager
def _temporary(path: Path, quant: Quant) -> Iterator[Path]:
    """A temporary path beside ``path``; what killed processes have left there is deleted too."""
    stem = f".{path.stem}.{Quantization.parse(quant).stem}"
    for leftover in path.parent.glob(f"{glob.escape(stem)}.*.tmp.gguf"):
        process = leftover.name.split(".")[-3]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            leftover.unlink(missing_ok=True)
    temporary = path.with_name(f"{stem}.{os.getpid()}.tmp.gguf")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in an error of the disk, as a failing write() does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _replace(temporary: Path, path: Path) -> None:
    with _naming(path):
        temporary.replace(path)
