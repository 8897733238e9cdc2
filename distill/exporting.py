"""Write a GGUF file, prove it, and only then give it its name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from distill.config import Quant
from distill.errors import UserError
from distill.prove import Proof, prove
from distill.run_folder import HeldOut, RunFolder
from distill.saved_student import load_student
from students.adapter import AdaptedStudent
from students.adapter_merge import merge
from students.base_export import write_base_gguf
from students.export import ExportNames, MetadataEntry, rotation_figures, write_gguf
from students.heads import head_values
from students.model import SO8TForCausalLM
from students.student import Student
from teachers.gguf_file import Field, GGUFFile, read_gguf, tokenizer_fields

ORIGIN = ("teacher_name", "teacher_sha256", "base_name", "base_sha256")


def tokenizer_entries(file: GGUFFile) -> dict[str, MetadataEntry]:
    """A GGUF file's tokenizer and chat template in the form the exporter copies."""
    return metadata_entries(tokenizer_fields(file))


def metadata_entries(fields: Mapping[str, Field]) -> dict[str, MetadataEntry]:
    """GGUF metadata as it was read, in the form the exporter copies."""
    return {key: (field.value, field.type, field.element_type) for key, field in fields.items()}


def origin_of(identity: Mapping[str, str]) -> dict[str, str]:
    """What an exported file says of where it came from, out of a run's identity."""
    return {key: identity[key] for key in ORIGIN if key in identity}


def export_proved(
    student: Student,
    path: Path,
    quant: Quant,
    tokenizer: dict[str, MetadataEntry],
    names: ExportNames,
    held_out: HeldOut,
    merged: PreTrainedModel | None = None,
) -> Proof:
    """Export ``student`` to ``path``; a file that is there already is replaced only by a proved one.

    One made of a base is merged first (``merged``: it has been already), and the proof is against the merged model.

    Raises:
        ProofFailed: llama.cpp computes something else than PyTorch.
        OSError: the disk refuses.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.gguf")
    try:
        if isinstance(student, AdaptedStudent):
            model: Any = merged if merged is not None else merge(student)
            figures = {f"so8t.{key}": value for key, value in rotation_figures(student).items()}
            extras = {**head_values(student.heads()), **figures}
            write_base_gguf(model, temporary, quant, tokenizer, names, extras)
        else:
            assert isinstance(student, SO8TForCausalLM)
            model = student
            write_gguf(student, temporary, quant, tokenizer, names)
        proof = prove(temporary, quant, model, held_out.sequences, held_out.lines)
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failing write() does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return proof


def export_run(folder: RunFolder, quant: Quant, output: Path | None) -> tuple[Path, Proof]:
    """Export a finished run's student again, in another format; returns where and how it was proved.

    Raises:
        UserError: not a run's folder, or ``output`` exists already.
    """
    folder.read_config()
    if not folder.tokenizer.exists():
        raise UserError(f"{folder.path} has no trained student yet; let its command finish first")
    path = output or folder.path / f"student-{quant}.gguf"
    if output and output.exists():
        raise UserError(f"--output {output} exists; choose another name")
    if output and not output.parent.is_dir():
        raise UserError(f"--output {output}: the folder {output.parent} does not exist")
    student = load_student(folder)
    tokenizer = read_gguf(folder.tokenizer, model=False)
    names = ExportNames(str(tokenizer.value("general.name", "student")), origin_of(folder.read_identity()))
    held_out = folder.read_held_out(student.config.vocab_size)
    return path, export_proved(student, path, quant, tokenizer_entries(tokenizer), names, held_out)
