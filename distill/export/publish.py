"""From a trained student to what a run gives away: proved GGUF file, Modelfile, plain folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray
from transformers import PreTrainedModel

from distill.base_models.base_model import Base
from distill.capture.temporary_files.tokenizer_only import metadata_entries
from distill.config.schema import RunConfig
from distill.export.export import Export, Proofs, export_proved, origin_of
from distill.export.importance import calibration_text, importance_of
from distill.export.ollama_modelfile import write_modelfile
from distill.export.student_folder import save_student
from distill.export.transformers_folder import publish_plain, save_plain
from distill.runs.audit_events import record_export
from distill.runs.exports import describe_file, record_files
from distill.runs.folder import HeldOut, RunFolder
from distill.runs.proof_record import Proof
from distill.runs.provenance import lineage_of
from distill.runtime.format import human_bytes
from distill.runtime.progress import Console
from students.adapter.adapter import AdaptedStudent
from students.adapter.merge import merge
from students.gguf.metadata import ExportNames
from students.mapped_tensors import MappedTensors
from students.model.interface import Student
from teachers.gguf.file import Field, read_gguf
from teachers.store.store import SoftTargetStore
from teachers.store.teacher_record import TeacherRecord

MORE_EXACT = (
    "f16",
    "f32",
)  # than any other type; an F32 file is the one that PyTorch is compared to


@dataclass(frozen=True)
class Publication:
    """A trained student and all that goes with it. ``train``: the store's sequences that it has
    learnt from; ``base``: the model that it is made of, if it is not a new one."""

    student: Student
    config: RunConfig
    teacher_record: TeacherRecord
    store: SoftTargetStore
    train: NDArray[np.int64]
    held_out: HeldOut
    base: Base | None

    @property
    def name(self) -> str:
        """What the exported file calls itself. Not the base's name: llama.cpp reads a tokenizer in
        a way of its own where a file's name has "phi3" in it."""
        size = self.config.student.size or f"LoRA {self.config.student.lora_rank}"
        return f"{self.teacher_record.info.name} distilled {size} SO8T"


def publish(publication: Publication, folder: RunFolder, console: Console) -> Proofs:
    """Write all files of the trained student, and prove the GGUF file.

    Raises:
        ProofFailed, ExportError: the file is not the trained model.
        OSError: the disk refuses.
    """
    student, config = publication.student, publication.config
    tokenizer = metadata_entries(publication.teacher_record.tokenizer)
    folder.write_held_out(publication.held_out)
    base_name = publication.base.path.resolve().name if publication.base else None
    lineage = lineage_of(publication.teacher_record, publication.store, base_name)
    save_student(student, folder, tokenizer, publication.name, lineage)
    names = ExportNames(publication.name, origin_of(folder.read_identity()), lineage)
    with MappedTensors(folder.path) as kept:
        merged = merge(student, kept.keep) if isinstance(student, AdaptedStudent) else None
        model: Any = student if merged is None else merged
        parameters = sum(one.numel() for one in model.parameters())
        text = calibration_text(publication.store, publication.train, parameters)
        folder.write_calibration(text)
        importance = importance_of(folder, student.config.vocab_size, console, keep=True)
        export = Export(student, tokenizer, names, publication.held_out, merged, importance)
        proofs = _export(export, config.export.quant, folder, console)
        proof = proofs.only
        file = read_gguf(folder.gguf)
        context = int(file.value(f"{file.architecture}.context_length"))
        ends = publication.teacher_record.info.end_tokens
        warnings = write_modelfile(
            folder.modelfile, folder.gguf, file.fields, end_tokens=ends, context_length=context
        )
        for warning in warnings:
            console.warn(f"Modelfile: {warning}")
        record_files(folder, [describe_file(folder.gguf, proof.quant, proof, importance=True)])
        written = [folder.gguf, folder.modelfile, folder.calibration_file, folder.exports]
        if folder.importance.exists():
            written.append(folder.importance)
        record_export(folder.path, written, proof.quant, proof.to_json())
        _plain_folder(publication, merged, folder, console)
    return proofs


def _export(export: Export, wanted: str, folder: RunFolder, console: Console) -> Proofs:
    """Write and prove the student's file; in a more exact type if the one that is ``wanted`` loses
    more than it may, as a student of a large vocabulary can: training is not lost by that.

    Raises:
        ProofFailed, ExportError: see ``publish``.
    """
    with console.stage("Export and prove") as stage:
        for quant in (wanted, *MORE_EXACT):
            proofs = export_proved(export, {quant: folder.gguf})
            if not proofs.failed or quant == MORE_EXACT[-1]:
                break
            reason = "; ".join(proofs.failed.values())
            console.warn(f"{reason}: {folder.gguf.name} is of a more exact type")
        proofs.require(folder.path)
        stage.finish(_describe(proofs.only, proofs.original, folder))
    return proofs


def _plain_folder(
    publication: Publication, merged: PreTrainedModel | None, folder: RunFolder, console: Console
) -> None:
    """The plain model with its tokenizer, for transformers as it is."""
    teacher_record, base = publication.teacher_record, publication.base
    # What a tokenizer does may depend on the model's name.
    named = {
        "general.name": Field(teacher_record.info.name, GGUFValueType.STRING, None),
        **teacher_record.tokenizer,
    }
    ends = teacher_record.info.end_tokens
    with console.stage("Plain folder") as stage:
        if base is not None and merged is not None:
            fields = named if base.no_tokenizer is None else None
            written = save_plain(merged, base.dtype, fields, folder.plain, end_tokens=ends)
        else:
            student: Any = publication.student
            written = publish_plain(
                student, named, folder.plain, end_tokens=ends, warn=console.warn
            )
        stage.finish(f"{folder.plain}, {human_bytes(written)}, for transformers")


def _describe(proof: Proof, original: Proof, folder: RunFolder) -> str:
    text = (
        f"F32 within {original.max_logit_difference:.1e} of PyTorch's logits over "
        f"{original.positions} positions"
    )
    if proof.quant != "f32":
        text += f"; {proof.quant} KL {proof.mean_kl:.1e} from that"
    return f"{text}; {human_bytes(folder.gguf.stat().st_size)}"
