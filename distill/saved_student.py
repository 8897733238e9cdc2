"""A trained student on disk: what a later export needs of it, and the plain model that transformers loads by itself."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill.base_student import load_base_student, open_base
from distill.checkpoint import plain_weights, set_weights
from distill.errors import UserError
from distill.plain_tokenizer import write_plain_tokenizer
from distill.run_folder import RunFolder
from students.adapter import AdaptedStudent, AdapterFacts
from students.export import MetadataEntry, write_tokenizer
from students.lineage import Lineage
from students.model import SO8TForCausalLM
from students.student import Student
from teachers.files import write_whole
from teachers.gguf_file import Field, read_gguf, tokenizer_fields
from teachers.tokenizer_metadata import read_roles

ADAPTER = "adapter.json"
LINEAGE = "lineage.json"
WEIGHTS = "model.safetensors"
SHARD_BYTES = 2_000_000_000


def save_student(
    student: Student, folder: RunFolder, tokenizer: dict[str, MetadataEntry], name: str, lineage: Lineage
) -> None:
    """Write ``student/`` (weights, configuration, tokenizer, lineage) whole or not at all; of one made of a base only
    what was trained.

    Raises:
        OSError: the disk refuses.
    """
    with _whole_folder(folder.student) as temporary:
        if isinstance(student, AdaptedStudent):
            content = {"config": asdict(student.config)}
            write_whole(temporary / ADAPTER, (json.dumps(content, indent=2) + "\n").encode())
        else:
            assert isinstance(student, SO8TForCausalLM)
            student.config.architectures = [type(student).__name__]
            student.config.dtype = "float32"
            student.config.save_pretrained(temporary)
            generation: Any = student.generation_config
            if generation is not None:
                generation.save_pretrained(temporary)
        # Not save_pretrained's own writer: its errors do not say that the disk is full.
        weights = safetensors.torch.save(plain_weights(student), metadata={"format": "pt"})
        write_whole(temporary / WEIGHTS, weights)
        write_tokenizer(temporary / folder.tokenizer.name, tokenizer, name)
        where_from = json.dumps(lineage.to_json(), indent=2, ensure_ascii=False) + "\n"
        write_whole(temporary / LINEAGE, where_from.encode())


def save_plain(
    model: PreTrainedModel,
    dtype: torch.dtype,
    tokenizer: Mapping[str, Field] | None,
    folder: Path,
    end_tokens: Sequence[int] = (),
) -> int:
    """Write a plain transformers folder, whole or not at all.

    With a tokenizer made from the GGUF one, and its special tokens, where that can be (else ``tokenizer`` is none).
    ``generate`` stops at ``end_tokens``, if any are given.

    Returns:
        The bytes of its weights.

    Raises:
        TokenizerConversionError: that tokenizer cannot be carried over.
        OSError: the disk refuses.
    """
    size = 0
    with _whole_folder(folder) as temporary:
        settings: Any = model.config
        generation: Any = model.generation_config
        if tokenizer is not None:
            write_plain_tokenizer(tokenizer, temporary)
            _take_roles(tokenizer, settings, generation)
        if generation is not None and end_tokens:
            generation.eos_token_id = sorted(end_tokens)
        before, settings.dtype = settings.dtype, dtype
        settings.architectures = [type(model).__name__]
        settings.save_pretrained(temporary)
        settings.dtype = before
        if generation is not None:
            generation.save_pretrained(temporary)
        tied = settings.tie_word_embeddings
        state = {
            key: value for key, value in model.state_dict().items() if not (tied and key == "lm_head.weight")
        }
        plan = split_torch_state_dict_into_shards(state, max_shard_size=SHARD_BYTES)
        for file, names in plan.filename_to_tensors.items():
            part = {key: state[key].to(dtype).contiguous() for key in names}
            content = safetensors.torch.save(part, metadata={"format": "pt"})
            write_whole(temporary / file, content)
            size += len(content)
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            write_whole(temporary / f"{WEIGHTS}.index.json", (json.dumps(index, indent=2) + "\n").encode())
    return size


def _take_roles(tokenizer: Mapping[str, Field], *configs: Any) -> None:
    """Where text begins and ends, and padding, are as the tokenizer has them."""
    roles = read_roles(tokenizer, len(tokenizer["tokenizer.ggml.tokens"].value))
    for config in configs:
        for role in ("bos", "eos", "pad"):
            if config is not None:
                setattr(config, f"{role}_token_id", roles.get(role))


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
        raise UserError(f"student {folder.student} is a {type(student).__name__}, not an SO8T student")
    return student


def _load_adapted(folder: RunFolder) -> AdaptedStudent:
    """A student made of a base: the base once more, and what was trained in its place."""
    config = folder.read_config()
    try:
        saved = json.loads((folder.student / ADAPTER).read_text(encoding="utf-8"))
        facts = AdapterFacts(**saved["config"])
        if {field.name for field in fields(facts)} != saved["config"].keys():
            raise ValueError("it lacks facts")
        weights = safetensors.torch.load_file(folder.student / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"student {folder.student} is damaged: {' '.join(str(error).split())}; run distill again"
        ) from None
    tokenizer = tokenizer_fields(read_gguf(folder.tokenizer, model=False))
    base = open_base(config, tokenizer, facts.vocab_size, "the base of this run,")
    known = folder.read_identity().get("base_sha256", "")
    if base.sha256 != known:
        raise UserError(
            f"the base {config.student.base} has changed since this run (SHA-256 {base.sha256[:12]}… instead of "
            f"{known[:12]}…); put the one it was trained with back"
        )
    student = load_base_student(base, config, facts.vocab_size)
    try:
        set_weights(student, weights)
    except (KeyError, ValueError) as error:
        raise UserError(f"student {folder.student} is damaged: {error}; run distill again") from None
    student.config = facts
    return student


@contextmanager
def _whole_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``final``, in place of what is there, once everything is in it."""
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if final.exists():
            shutil.rmtree(final)  # from an earlier, interrupted end of this same run
        temporary.replace(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
