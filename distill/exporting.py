"""Write a GGUF file, prove it, and only then give it its name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from distill.checkpoint import plain_weights
from distill.config import Quant
from distill.errors import UserError
from distill.prove import Proof, prove
from distill.run_folder import HeldOut, RunFolder
from students.export import ExportNames, MetadataEntry, write_gguf, write_tokenizer
from students.model import SO8TForCausalLM
from teachers.gguf_file import Field, GGUFFile, read_gguf, tokenizer_fields
from teachers.store import write_whole


def tokenizer_entries(file: GGUFFile) -> dict[str, MetadataEntry]:
    """A GGUF file's tokenizer and chat template in the form the exporter copies."""
    return metadata_entries(tokenizer_fields(file))


def metadata_entries(fields: Mapping[str, Field]) -> dict[str, MetadataEntry]:
    """GGUF metadata as it was read, in the form the exporter copies."""
    return {key: (field.value, field.type, field.element_type) for key, field in fields.items()}


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
    identity = folder.read_identity()
    origin = {key: identity.get(key, "") for key in ("teacher_name", "teacher_sha256")}
    names = ExportNames(str(tokenizer.value("general.name", "student")), origin)
    held_out = folder.read_held_out(student.config.vocab_size)
    return path, export_proved(student, path, quant, tokenizer_entries(tokenizer), names, held_out)


def save_student(
    student: SO8TForCausalLM, folder: RunFolder, tokenizer: dict[str, MetadataEntry], name: str
) -> None:
    """Write ``student/`` (weights, configuration, tokenizer) whole or not at all.

    Raises:
        OSError: the disk refuses.
    """
    temporary = folder.path / f".student.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        # Not save_pretrained's own writer: its errors do not say that the disk is full.
        student.config.architectures = [type(student).__name__]
        student.config.dtype = "float32"
        student.config.save_pretrained(temporary)
        if student.generation_config is not None:
            student.generation_config.save_pretrained(temporary)
        weights = safetensors.torch.save(plain_weights(student), metadata={"format": "pt"})
        write_whole(temporary / "model.safetensors", weights)
        write_tokenizer(temporary / folder.tokenizer.name, tokenizer, name)
        if folder.student.exists():
            shutil.rmtree(folder.student)  # from an earlier, interrupted end of this same run
        temporary.replace(folder.student)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_student(folder: RunFolder) -> SO8TForCausalLM:
    """The trained student of a run, in float32.

    Raises:
        UserError: its files are damaged.
    """
    try:
        student, report = AutoModelForCausalLM.from_pretrained(
            folder.student, dtype="float32", local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"student {folder.student} cannot be loaded: {error}") from None
    # transformers fills tensors it does not find with random numbers and only warns.
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if wrong:
        raise UserError(f"student {folder.student} is damaged: {wrong}; run distill again")
    if not isinstance(student, SO8TForCausalLM):
        raise UserError(f"student {folder.student} is a {type(student).__name__}, not an SO8T student")
    return student
