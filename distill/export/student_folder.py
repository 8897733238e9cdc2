"""A trained student on disk, as a later export needs it."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from distill.base_models.base_model import load_base_student, open_base
from distill.errors import UserError
from distill.runs.folder import RunFolder
from distill.runs.provenance import LINEAGE
from distill.runtime.files import whole_folder
from students.adapter.adapter import AdaptedStudent, AdapterFacts
from students.gguf.metadata import MetadataEntry, write_tokenizer
from students.gguf.provenance import Lineage
from students.model.decoder import SO8TForCausalLM
from students.model.interface import Student
from students.model.safety_head import SafetyHead, shape_of
from students.weights import as_safetensors, plain_weights, set_weights
from teachers.atomic_files import write_whole
from teachers.gguf.file import read_gguf, tokenizer_fields

ADAPTER = "adapter.json"
WEIGHTS = "model.safetensors"
WRITTEN_BY_PYTORCH = {"format": "pt"}  # transformers asks for it


def save_student(
    student: Student,
    folder: RunFolder,
    tokenizer: dict[str, MetadataEntry],
    name: str,
    lineage: Lineage,
) -> None:
    """Write ``student/`` (weights, configuration, tokenizer, lineage) whole or not at all; of one
    made of a base only what was trained.

    Raises:
        OSError: the disk refuses.
    """
    with whole_folder(folder.student) as temporary:
        if isinstance(student, AdaptedStudent):
            content = json.dumps({"config": asdict(student.config)}, indent=2) + "\n"
            write_whole(temporary / ADAPTER, content.encode())
        else:
            assert isinstance(student, SO8TForCausalLM)
            student.config.architectures = [type(student).__name__]
            student.config.dtype = "float32"
            student.config.save_pretrained(temporary)
            generation: Any = student.generation_config
            if generation is not None:
                generation.save_pretrained(temporary)
        # Not save_pretrained's own writer: its errors do not say that the disk is full.
        weights = as_safetensors(plain_weights(student), metadata=WRITTEN_BY_PYTORCH)
        write_whole(temporary / WEIGHTS, weights)
        write_tokenizer(temporary / folder.tokenizer.name, tokenizer, name)
        content = json.dumps(lineage.to_json(), indent=2, ensure_ascii=False) + "\n"
        write_whole(temporary / LINEAGE, content.encode())


def load_student(folder: RunFolder) -> Student:
    """The trained student of a run: in float32, or as its base was loaded.

    Raises:
        UserError: its files are damaged, or its base is not there any more as it was.
    """
    if (folder.student / ADAPTER).exists():
        return _load_adapted(folder)
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
        raise UserError(
            f"student {folder.student} is a {type(student).__name__}, not an SO8T student"
        )
    return student


def _load_adapted(folder: RunFolder) -> AdaptedStudent:
    """A student made of a base: the base with the trained weights in it."""
    config = folder.read_config()
    try:
        saved = json.loads((folder.student / ADAPTER).read_text(encoding="utf-8"))
        facts = AdapterFacts(**saved["config"])
        needed = {field.name for field in fields(facts)} - {"safety_shape"}  # older ones lack it
        if not needed <= saved["config"].keys():
            raise ValueError("it lacks facts")
        shape = shape_of(facts.safety_shape)
        weights = safetensors.torch.load_file(folder.student / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"student {folder.student} is damaged: {' '.join(str(error).split())}; run distill "
            "again"
        ) from None
    tokenizer = tokenizer_fields(read_gguf(folder.tokenizer, model=False))
    base = open_base(config, tokenizer, facts.vocab_size, "the base of this run,")
    known = folder.read_identity().get("base_sha256", "")
    if base.sha256 != known:
        raise UserError(
            f"the base {config.student.base} has changed since this run (SHA-256 "
            f"{base.sha256[:12]}… instead of {known[:12]}…); put the one it was trained with back"
        )
    student = load_base_student(base, config, facts.vocab_size)
    if config.safety_head:
        head = SafetyHead(facts.hidden_size, shape) if facts.safety_head else None
        student.replace_safety_head(head)
    try:
        set_weights(student, weights)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"student {folder.student} is damaged: {error}; run distill again"
        ) from None
    student.config = facts
    return student
