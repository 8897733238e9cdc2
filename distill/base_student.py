"""A student made of an existing model: its folder is looked at before anything takes long, then adapted.

What cannot become an exported student in the end is refused in the beginning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoConfig

from distill.adapter_memory import AdapterMemory, how_to_fit, memory_of
from distill.config import RunConfig
from distill.console import Console, human_bytes, human_count
from distill.errors import UserError
from distill.preflight import base_folder
from distill.vocabulary import VocabularyMatch, compare_vocabularies
from students.adapter import AdaptedStudent, adapt
from students.adapter_base import AdapterSettings
from students.architectures import context_length, head_width, require_exportable
from students.export import ExportError
from students.shape import GROUP
from teachers.gguf_file import Field, TeacherFileError
from teachers.huggingface_folder import load_model
from teachers.model_folder import ModelFolder
from teachers.tokenizer_json import TokenizerConversionError, build_tokenizer


@dataclass(frozen=True)
class Base:
    """A folder that can become a student: what its ``config.json`` says, and how its vocabulary meets the teacher's.

    ``no_tokenizer``: why the teacher's tokenizer cannot be written for transformers; ``None`` where it can.
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
        found = getattr(torch, stated, None) if isinstance(stated, str) else stated
        return found if found in (torch.bfloat16, torch.float16) else torch.float32

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
        UserError: it is no such folder, cannot be exported, has another vocabulary, or a shape without whole gates.
    """
    assert config.student.base is not None
    path = Path(config.student.base)
    folder = base_folder(path, what)
    try:
        settings = AutoConfig.from_pretrained(path, local_files_only=True)
    # Settings that transformers cannot make sense of.
    except (OSError, ValueError, KeyError, TypeError) as error:
        words = " ".join(str(error).split())[:200]
        raise UserError(f"{what} {path}: config.json cannot be used: {words}") from None
    try:
        require_exportable(settings)
    except ExportError as error:
        raise UserError(f"{what} {path} could not be exported in the end: {error}") from None
    width = head_width(settings) * int(settings.num_attention_heads)
    if width % GROUP:
        raise UserError(
            f"{what} {path}: its attention output is {width} wide, not divisible by {GROUP}, as the SO(8) "
            "gates need; choose another base"
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


def training_memory(base: Base, config: RunConfig, vocab_size: int) -> AdapterMemory:
    """What training takes at most, estimated."""
    return memory_of(base.config, config, vocab_size)


def describe_base(base: Base, config: RunConfig, vocab_size: int, console: Console) -> None:
    """Say what the student is made of."""
    memory = training_memory(base, config, vocab_size)
    kind = "in NF4" if base.load_in_4bit else "as it is"
    console.note(
        f"student: {base.folder.path.name} ({base.config.model_type}, {human_count(memory.base_numbers)} parameters, "
        f"{kind}) with LoRA of rank {config.student.lora_rank} and SO(8) gates, {human_count(memory.trained_numbers)} "
        f"trained; about {human_bytes(memory.total)} of memory"
    )
    console.note(f"vocabulary: {base.match.words()}")
    if base.no_tokenizer is not None:
        console.warn(f"the merged transformers folder will have no tokenizer: {base.no_tokenizer}")
    if base.context_length < config.data.max_length:
        console.warn(
            f"the exported file will be exact up to {base.context_length} tokens; sequences have up to "
            f"{config.data.max_length} (data.max_length)"
        )


def require_fit(base: Base, config: RunConfig, vocab_size: int, limit: int, where: str) -> None:
    """See that training fits into ``limit`` bytes, merging into main memory, and sequences into the base's window.

    Raises:
        UserError: one of them does not; says what would.
    """
    memory = training_memory(base, config, vocab_size)
    window, longest = getattr(base.config, "sliding_window", None), config.data.max_length
    if base.config.model_type == "phi3" and window is not None and window < longest:
        raise UserError(
            f"{base.folder.path} looks back {window} tokens (sliding_window), which llama.cpp does not do for phi3; "
            f"sequences have up to {longest}; set data.max_length={window} or less"
        )
    main = psutil.virtual_memory().total
    if memory.at_the_end > main:
        raise UserError(
            f"merging {base.folder.path} at the end takes about {human_bytes(memory.at_the_end)} of main memory, this "
            f"machine has {human_bytes(main)}; choose a smaller base"
        )
    if memory.total > limit:
        ways = how_to_fit(limit, base.config, config, vocab_size)
        raise UserError(
            f"training {base.folder.path} takes about {human_bytes(memory.total)}, {where} has "
            f"{human_bytes(limit)}: {'; '.join(ways)}"
        )


def training_device() -> torch.device:
    """Where this process trains."""
    device = PartialState().device
    # Metal lacks the float64 that rotations and scores are computed in.
    return torch.device("cpu") if device.type == "mps" else device


def load_base_student(base: Base, config: RunConfig, vocab_size: int) -> AdaptedStudent:
    """The student as training begins, on the device that it is trained on; the same settings give the same bytes.

    NF4 computes in bfloat16; a base that is not quantised is float32 on a CPU and bfloat16 elsewhere.

    Raises:
        UserError: transformers or bitsandbytes cannot load the folder.
    """
    device = training_device()
    narrow = base.load_in_4bit or device.type != "cpu"
    try:
        model = load_model(
            base.folder,
            device,
            torch.bfloat16 if narrow else torch.float32,
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
    """Give the model a row for each of the teacher's padding tokens: the mean of all others, which says nothing."""
    known = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    tables: list[nn.Module] = [model.get_input_embeddings(), model.get_output_embeddings()]
    for table in tables:
        weight: Any = table.weight
        weight[known:] = weight[:known].float().mean(dim=0).to(weight.dtype)
    model.requires_grad_(False)


def judge_base(base: Base, config: RunConfig, vocab_size: int, longest: int, console: Console) -> None:
    """Say how large the student is, before anything of that size is allocated. ``longest``: tokens of a sequence.

    Raises:
        UserError: this machine has not the memory to train it; says what would help.
    """
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_length": longest})})
    describe_base(base, config, vocab_size, console)
    limit, where = available_memory()
    require_fit(base, config, vocab_size, limit, where)


def available_memory() -> tuple[int, str]:
    """Bytes of memory where this process trains, and what has them."""
    device = training_device()
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory, "this GPU"
    return psutil.virtual_memory().total, "this machine"


def with_checkpointing(config: RunConfig, wanted: bool) -> RunConfig:
    """The settings with gradient checkpointing or without, unless they say so themselves."""
    if config.train.gradient_checkpointing is not None:
        return config
    return config.model_copy(
        update={"train": config.train.model_copy(update={"gradient_checkpointing": wanted})}
    )
