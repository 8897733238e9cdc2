"""A student made of an existing model. What could not be exported in the end is refused first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from distill.base_models.folder import base_folder
from distill.base_models.vocabulary_match import VocabularyMatch, compare_vocabularies
from distill.config.schema import RunConfig
from distill.errors import UserError
from distill.runtime.device import base_dtype, training_device
from students.adapter.adapter import AdaptedStudent, adapt
from students.adapter.base_model import AdapterSettings
from students.gguf.config_values import context_length, head_width, require_exportable
from students.gguf.metadata import ExportError
from students.model.shape import GROUP
from teachers.gguf.file import Field, TeacherFileError
from teachers.huggingface.checkpoint import load_model
from teachers.huggingface.folder import ModelFolder
from teachers.tokenizer.gguf_metadata import TokenizerConversionError
from teachers.tokenizer.tokenizer_json import build_tokenizer


@dataclass(frozen=True)
class Base:
    """A folder that can become a student: what its ``config.json`` says, and how its vocabulary
    meets the teacher's.

    ``no_tokenizer``: why the teacher's tokenizer cannot be written for transformers; ``None`` where
    it can.
    """

    folder: ModelFolder
    config: Any
    match: VocabularyMatch
    load_in_4bit: bool
    no_tokenizer: str | None = None

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return int(self.config.num_hidden_layers)

    @property
    def context_length(self) -> int:
        """Tokens up to which the exported file computes as the base does."""
        return context_length(self.config)

    @property
    def dtype(self) -> torch.dtype:
        """What its weights are saved in, and those of the merged model again."""
        stated = getattr(self.config, "dtype", None)
        dtype = getattr(torch, stated, None) if isinstance(stated, str) else stated
        return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32

    @cached_property
    def sha256(self) -> str:
        """Digest of configuration, weights and how they are loaded."""
        return self.folder.sha256(load_in_4bit=self.load_in_4bit)


def open_base(
    config: RunConfig, tokenizer: Mapping[str, Field], vocab_size: int, what: str = "--student-base"
) -> Base:
    """Look at the folder that ``config.student.base`` names, which errors call ``what``.

    ``tokenizer``: the teacher's, as GGUF metadata, of ``vocab_size`` tokens.

    Raises:
        UserError: it is no such folder, cannot be exported, has another vocabulary, or a shape
        without whole gates.
    """
    assert config.student.base is not None
    path = Path(config.student.base)
    folder = base_folder(path, what)
    try:
        settings = AutoConfig.from_pretrained(path, local_files_only=True)
    # Settings that transformers cannot make sense of.
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(f"{what} {path}: config.json cannot be used: {text}") from None
    try:
        require_exportable(settings)
    except ExportError as error:
        raise UserError(f"{what} {path} could not be exported in the end: {error}") from None
    width = head_width(settings) * int(settings.num_attention_heads)
    if width % GROUP:
        raise UserError(
            f"{what} {path}: its attention output is {width} wide, not divisible by {GROUP}, as "
            "the SO(8) gates need; choose another base"
        )
    try:
        match = compare_vocabularies(tokenizer, path, int(settings.vocab_size), vocab_size)
    except UserError as error:
        raise UserError(f"{what} {path}: {error}") from None
    obstacle = None
    try:
        build_tokenizer(tokenizer)
    except TokenizerConversionError as error:
        obstacle = " ".join(str(error).split())
    return Base(folder, settings, match, config.student.load_in_4bit, obstacle)


def load_base_student(base: Base, config: RunConfig, vocab_size: int) -> AdaptedStudent:
    """The initial student on the device that it is trained on; the same settings give the same
    bytes.

    Raises:
        UserError: transformers or bitsandbytes cannot load the folder.
    """
    device = training_device()
    try:
        model = load_model(
            base.folder,
            device,
            base_dtype(device, load_in_4bit=base.load_in_4bit),
            load_in_4bit=base.load_in_4bit,
            double_quantization=True,
        )
    except TeacherFileError as error:
        raise UserError(f"--student-base: {error}") from None
    if base.match.rows_to_add:
        _add_rows(model, vocab_size)
    settings = AdapterSettings(
        config.student.lora_rank, config.student.lora_alpha, config.student.lora_dropout
    )
    try:
        return adapt(
            model,
            settings,
            vocab_size,
            seed=config.seed,
            safety_head=config.safety_head,
            verification_head=config.verification_head,
        )
    except ValueError as error:
        raise UserError(f"--student-base {base.folder.path}: {error}") from None


@torch.no_grad()
def _add_rows(model: Any, vocab_size: int) -> None:
    """Give the model a row for each of the teacher's padding tokens: the mean of all others."""
    known = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    tables: list[nn.Module] = [model.get_input_embeddings(), model.get_output_embeddings()]
    for table in tables:
        weight: Any = table.weight
        weight[known:] = weight[:known].float().mean(dim=0).to(weight.dtype)
    model.requires_grad_(False)
