"""From a trained student to what a run gives away: importance matrix, proved GGUF file,
Modelfile, plain folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray
from transformers import PreTrainedModel

from distill.base_models.base_model import Base
from distill.capture.tokenizer_only import metadata_entries
from distill.config.schema import RunConfig
from distill.export.export import IMPORTANCE_DATASET, Export, Proofs, export_proved, origin_of
from distill.export.ollama_modelfile import write_modelfile
from distill.export.student_folder import save_student
from distill.export.transformers_folder import publish_plain, save_plain
from distill.runs.audit_events import record_export
from distill.runs.exports import describe_file, record_files
from distill.runs.folder import HeldOut, RunFolder
from distill.runs.proof_record import Proof
from distill.runs.provenance import lineage_of
from distill.runtime.format import human_bytes, human_count
from distill.runtime.progress import Console
from students.adapter.adapter import AdaptedStudent
from students.adapter.merge import merge
from students.gguf.architectures import architecture_of, to_gguf_name
from students.gguf.imatrix import measure_importance, write_importance
from students.gguf.metadata import ExportNames
from students.mapped_tensors import MappedTensors
from students.model.decoder import SO8TForCausalLM
from students.model.fold import to_llama
from students.model.interface import Student
from teachers.gguf.file import Field, read_gguf
from teachers.store.store import SoftTargetStore
from teachers.store.teacher_record import TeacherRecord

MORE_EXACT = (
    "f16",
    "f32",
)  # than any other type; an F32 file is the one that PyTorch is compared to
# Enough for means of squares, and not more than a minute or two of computing even for a large base.
IMPORTANCE_TOKENS, IMPORTANCE_LEAST, IMPORTANCE_FLOPS = 16_384, 2_048, 2e13


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
    base_name = publication.base.folder.path.resolve().name if publication.base else None
    lineage = lineage_of(publication.teacher_record, publication.store, base_name)
    save_student(student, folder, tokenizer, publication.name, lineage)
    names = ExportNames(publication.name, origin_of(folder.read_identity()), lineage)
    with MappedTensors(folder.path) as kept:
        merged = merge(student, kept.keep) if isinstance(student, AdaptedStudent) else None
        importance = _importance(publication, merged, folder, console)
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
        written = [folder.gguf, folder.modelfile, folder.importance, folder.exports]
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


def evenly_spaced(lengths: NDArray[np.int32], tokens: int) -> NDArray[np.int64]:
    """About as many sequences as make so many tokens, evenly from the first to the last."""
    count = min(len(lengths), max(1, round(tokens / float(lengths.mean()))))
    return np.linspace(0, len(lengths) - 1, count).astype(np.int64)


def _importance(
    publication: Publication, merged: PreTrainedModel | None, folder: RunFolder, console: Console
) -> dict[str, NDArray[np.float32]]:
    """Measure the importance matrix on training text and keep it in the run."""
    student, store = publication.student, publication.store
    if merged is not None:
        model, gguf_name = merged, architecture_of(merged.config).to_gguf_name
    else:
        assert isinstance(student, SO8TForCausalLM)
        model, gguf_name = to_llama(student), to_gguf_name
    affordable = int(IMPORTANCE_FLOPS / (2 * model.num_parameters()))
    tokens = min(IMPORTANCE_TOKENS, max(IMPORTANCE_LEAST, affordable))
    some = evenly_spaced(store.lengths()[publication.train], tokens)
    chosen = [store.tokens(int(index)) for index in publication.train[some]]
    with console.stage("Importance", total=len(chosen)) as stage:
        importance = measure_importance(model, chosen, gguf_name, stage.update)
        temporary = folder.importance.with_name(f".{folder.importance.name}.{os.getpid()}.tmp")
        write_importance(importance, temporary, [IMPORTANCE_DATASET])
        temporary.replace(folder.importance)
        stage.finish(
            f"{human_count(importance.tokens)} tokens of training text, for quantizers: "
            f"{folder.importance}"
        )
    return importance.mean_squares()


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
