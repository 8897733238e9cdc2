"""Write a GGUF file, prove it, and only then give it its name."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import AutoModelForCausalLM

from distill.config import Quant
from distill.errors import UserError
from distill.prove import Proof, prove
from distill.run_folder import HeldOut, RunFolder
from students.export import ExportNames, MetadataEntry, write_gguf
from students.model import SO8TForCausalLM
from teachers.gguf_file import GGUFFile, read_gguf, tokenizer_fields


def tokenizer_entries(file: GGUFFile) -> dict[str, MetadataEntry]:
    """A GGUF file's tokenizer and chat template in the form the exporter copies."""
    return {
        key: (field.value, field.type, field.element_type) for key, field in tokenizer_fields(file).items()
    }


def export_proved(
    student: SO8TForCausalLM,
    path: Path,
    quant: Quant,
    tokenizer: dict[str, MetadataEntry],
    names: ExportNames,
    held_out: HeldOut,
) -> Proof:
    """Export ``student`` to ``path``; a file that is there already is replaced only by a proved one.

    Raises:
        ProofFailed: llama.cpp computes something else than PyTorch.
        OSError: the disk refuses.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.gguf")
    try:
        write_gguf(student, temporary, quant, tokenizer, names)
        proof = prove(temporary, quant, student, held_out.sequences, held_out.lines)
        temporary.replace(path)
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
        raise UserError(f"{folder.path} has no trained student yet; let `distill run` finish first")
    path = output or folder.path / f"student-{quant}.gguf"
    if output and output.exists():
        raise UserError(f"--output {output} exists; choose another name")
    if output and not output.parent.is_dir():
        raise UserError(f"--output {output}: the folder {output.parent} does not exist")
    student = load_student(folder)
    tokenizer = read_gguf(folder.tokenizer, model=False)
    identity = folder.read_identity()
    names = ExportNames(
        str(tokenizer.value("general.name")),
        {"teacher_name": identity["teacher_name"], "teacher_sha256": identity["teacher_sha256"]},
    )
    held_out = folder.read_held_out(student.config.vocab_size)
    return path, export_proved(student, path, quant, tokenizer_entries(tokenizer), names, held_out)


def load_student(folder: RunFolder) -> SO8TForCausalLM:
    """The trained student of a run, in float32.

    Raises:
        UserError: its files are damaged.
    """
    try:
        student = AutoModelForCausalLM.from_pretrained(folder.student, dtype="float32", local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"student {folder.student} cannot be loaded: {error}") from None
    if not isinstance(student, SO8TForCausalLM):
        raise UserError(f"student {folder.student} is a {type(student).__name__}, not an SO8T student")
    return student
