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

from distill.base_models.gguf_model import configuration, load_weights
from distill.base_models.source import BaseSource, base_source, digest_of, path_of
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
from teachers.gguf.llama_weights import LlamaWeights
from teachers.huggingface.checkpoint import load_model
from teachers.tokenizer.gguf_metadata import TokenizerConversionError
from teachers.tokenizer.tokenizer_json import build_tokenizer


@dataclass(frozen=True)
class Base:
    """A model that can become a student: what it says of itself, and how its vocabulary meets the
    teacher's.

    ``no_tokenizer``: why the teacher's tokenizer cannot be written for transformers; ``None`` where
    it can.
    """

    source: BaseSource
    config: Any
    match: VocabularyMatch
    load_in_4bit: bool
    no_tokenizer: str | None = None

    @property
    def path(self) -> Path:
        """Its folder or file."""
        return path_of(self.source)

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
        return digest_of(self.source, self.load_in_4bit)


def open_base(
    config: RunConfig, tokenizer: Mapping[str, Field], vocab_size: int, what: str = "--student-base"
) -> Base:
    """Look at the folder or file that ``config.student.base`` names, which errors call ``what``.

    ``tokenizer``: the teacher's, as GGUF metadata, of ``vocab_size`` tokens.

    Raises:
        UserError: it is no such model, cannot be exported, has another vocabulary, or a shape
        without whole gates.
    """
    assert config.student.base is not None
    path = Path(config.student.base)
    source = base_source(path, config.student.load_in_4bit, what)
    try:
        settings = _settings(source)
    except Exception as error:  # a configuration of untrusted values fails in every way there is
        text = " ".join(str(error).split())[:200]
        raise UserError(f"{what} {path}: its configuration cannot be used: {text}") from None
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
        theirs = source.file.fields if isinstance(source, LlamaWeights) else path
        match = compare_vocabularies(tokenizer, theirs, int(settings.vocab_size), vocab_size)
    except UserError as error:
        raise UserError(f"{what} {path}: {error}") from None
    obstacle = None
    try:
        build_tokenizer(tokenizer)
    except TokenizerConversionError as error:
        obstacle = " ".join(str(error).split())
    return Base(source, settings, match, config.student.load_in_4bit, obstacle)


def _settings(source: BaseSource) -> Any:
    if isinstance(source, LlamaWeights):
        return configuration(source)
    return AutoConfig.from_pretrained(source.path, local_files_only=True)


def load_base(base: Base, device: torch.device, dtype: torch.dtype) -> Any:
    """The base's model as transformers has it, for inference.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        if isinstance(base.source, LlamaWeights):
            return load_weights(base.source, device, dtype)
        return load_model(
            base.source,
            device,
            dtype,
            load_in_4bit=base.load_in_4bit,
            double_quantization=True,
        )
    except TeacherFileError as error:
        raise UserError(f"--student-base: {error}") from None


def load_base_student(base: Base, config: RunConfig, vocab_size: int) -> AdaptedStudent:
    """The initial student on the device that it is trained on; the same settings give the same
    bytes.

    Raises:
        UserError: transformers or bitsandbytes cannot load it.
    """
    device = training_device()
    model = load_base(base, device, base_dtype(device, load_in_4bit=base.load_in_4bit))
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
        raise UserError(f"--student-base {base.path}: {error}") from None


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
