"""Settings of what a run is made of: teacher, student, data; and what all settings share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from students.model.shape import ChosenShape, StudentSize, attention_shape, parse_request
from teachers.tokenizer.chat_template import GIVEN
from teachers.vocabulary.size import VocabularySize

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of every section: frozen, unknown keys and non-finite numbers refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TeacherConfig(Section):
    """The teacher.

    ``path``: a GGUF file, a transformers folder to capture from, or the address of a server
    (http://HOST:PORT): `distill serve`, or vLLM; none: the example teacher. ``token``: what such a
    server wants to hear, better kept in DISTILL_TEACHER_TOKEN; it is never written anywhere.
    ``tokenizer``: of a server that gives none: a GGUF file, of which only the vocabulary is read.
    ``mix_with``: further teachers with the same vocabulary; ``weights``: of all in the mixture, the
    first included (none: equal). ``load_in_4bit``: NF4 for folders, through bitsandbytes.
    ``template_variables``: values that its chat template uses where a conversation has none of its
    own, such as ``enable_thinking: false``, ``tools`` or ``documents``; the student's chat template
    keeps them.

    ``gpu_layers``: layers on a GPU where llama.cpp has one, −1 for all. ``main_gpu``: the one GPU
    to use, from 0 (none: each process of a launch its own; one alone all of them, by their free
    memory), or ``tensor_split``: the share of the layers for each. ``cache_type``: of the numbers
    in the KV cache. ``weights_as``: a quantised file's matrices are written out as this type while
    they are needed, and llama.cpp computes with them. ``batch_tokens``: computed at once;
    ``sequences``: decoded together, at most (both none: by the memory).
    """

    path: str | None = None
    token: Annotated[str | None, Field(exclude=True, repr=False)] = None
    tokenizer: str | None = None
    gpu_layers: Annotated[int, Field(ge=-1)] = -1
    main_gpu: Annotated[int, Field(ge=0)] | None = None
    tensor_split: tuple[NonNegative, ...] = ()
    cache_type: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    weights_as: Literal["f16", "bf16", "f32"] | None = None
    batch_tokens: Annotated[int, Field(ge=32, le=1 << 16)] | None = None
    sequences: Count | None = None
    mix_with: tuple[str, ...] = ()
    weights: tuple[Positive, ...] = ()
    load_in_4bit: bool = False
    template_variables: dict[str, JsonValue] = {}

    @field_validator("token", mode="before")
    @classmethod
    def _as_text(cls, token: Any) -> Any:
        """YAML reads digits as a number."""
        return str(token) if type(token) is int else token

    @field_validator("template_variables", mode="before")
    @classmethod
    def _as_json(cls, variables: Any) -> Any:
        """YAML reads 2024-07-26 as a date."""
        return json.loads(json.dumps(variables, default=str))

    @field_validator("template_variables")
    @classmethod
    def _named(cls, variables: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for name in variables:
            if name in GIVEN or not (name.isascii() and name.isidentifier()):
                raise ValueError(
                    f"{name!r} is no variable that can be set; {', '.join(GIVEN)} come from the "
                    "conversation and the tokenizer"
                )
        for name in ("tools", "documents"):
            value = variables.get(name)
            objects = isinstance(value, list) and all(isinstance(one, dict) for one in value)
            if value is not None and not objects:
                raise ValueError(f"{name} = {value!r} is no list of objects; write [{{…}}]")
        return variables

    @model_validator(mode="after")
    def _one_place(self) -> TeacherConfig:
        """Refuse GPUs that are named twice, or in vain."""
        if self.tensor_split and not any(self.tensor_split):
            raise ValueError(
                f"tensor_split = {list(self.tensor_split)} gives no GPU a share; give one, or set "
                "gpu_layers = 0 to compute on the processor"
            )
        if self.tensor_split and self.main_gpu is not None:
            raise ValueError(
                f"main_gpu = {self.main_gpu} is one GPU, tensor_split = {list(self.tensor_split)} "
                "several; give the one or the other"
            )
        if self.gpu_layers == 0 and (self.tensor_split or self.main_gpu is not None):
            raise ValueError(
                "main_gpu and tensor_split say which GPU, but gpu_layers = 0 means none; leave one "
                "of them out"
            )
        return self


class StudentConfig(Section):
    """The student.

    ``size``: width × layers, such as 512x4, or a share of the teacher's parameters, such as 25%, or
    a number of parameters, such as 50M; none: half the teacher's width and depth.
    ``tie_embeddings``: one matrix for the input embedding and the output. ``heads``, ``kv_heads``,
    ``head_width``, ``ffn_width``: none follows the teacher's shape
    (``students.model.build.student_config``). ``init``: the first weights: teacher (projected from
    the teacher's), embeddings (random, with the teacher's token embeddings), random, or auto
    (teacher if possible). ``vocab``: its vocabulary is the teacher's, cut down to so many tokens:
    16k, 12.5% or auto (``teachers.vocabulary.size``); none: the whole.

    ``base``: folder of a transformers model with the teacher's vocabulary, which becomes the
    student: frozen, with LoRA of ``lora_rank``, scaled by ``lora_alpha / lora_rank``, and
    ``lora_dropout``. ``load_in_4bit``: its matrices in NF4, through bitsandbytes.
    """

    size: str | None = None
    vocab: str | None = None
    base: str | None = None
    lora_rank: Annotated[int, Field(ge=1, le=1 << 12)] = 16
    lora_alpha: Positive = 32.0
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    load_in_4bit: bool = False
    init: Literal["auto", "teacher", "embeddings", "random"] = "auto"
    tie_embeddings: bool = True
    heads: Annotated[int, Field(ge=1, le=1 << 12)] | None = None
    kv_heads: Annotated[int, Field(ge=1, le=1 << 12)] | None = None
    head_width: Annotated[int, Field(ge=2, le=1 << 12, multiple_of=2)] | None = None
    ffn_width: Annotated[int, Field(ge=1, le=1 << 20)] | None = None

    @field_validator("base")
    @classmethod
    def _absolute(cls, base: str | None) -> str | None:
        """A run is exported again from other folders too."""
        return None if base is None else str(Path(base).absolute())

    @field_validator("size")
    @classmethod
    def _readable(cls, size: str | None) -> str | None:
        if size is not None:
            parse_request(size)
        return size

    @field_validator("vocab")
    @classmethod
    def _a_size(cls, vocab: str | None) -> str | None:
        if vocab is not None:
            VocabularySize.parse(vocab)
        return vocab

    @model_validator(mode="after")
    def _fits(self) -> StudentConfig:
        """Refuse heads that do not fit, as far as that does not depend on the teacher."""
        size = parse_request(self.size) if self.size else None
        if isinstance(size, StudentSize) and (self.heads or self.head_width):
            attention_shape(size.width, chosen=self.chosen)
        return self

    @model_validator(mode="after")
    def _one_kind(self) -> StudentConfig:
        """Refuse settings of a new student together with a base, and a base's without one."""
        if self.base is None:
            own = ("load_in_4bit", "lora_rank", "lora_alpha", "lora_dropout")
            fields = type(self).model_fields
            if given := [name for name in own if getattr(self, name) != fields[name].default]:
                raise ValueError(
                    f"{', '.join(given)} would be of a student made of a base; name one with "
                    "--student-base"
                )
            return self
        new = {"size": self.size, "heads": self.heads, "kv_heads": self.kv_heads}
        new |= {"head_width": self.head_width, "ffn_width": self.ffn_width}
        new |= {"init": None if self.init == "auto" else self.init}
        if given := [name for name, value in new.items() if value is not None]:
            raise ValueError(
                f"{', '.join(given)} would be of a new student, but base = {self.base} is what the "
                "student is made of; give the one or the other"
            )
        return self

    @property
    def label(self) -> str | None:
        """A short name: its size, or its base and the rank of LoRA."""
        if self.base is None:
            return self.size
        name = Path(self.base).resolve().name.removesuffix(".gguf")
        return f"{name}-lora{self.lora_rank}"

    @property
    def chosen(self) -> ChosenShape:
        """What is said here about the student's shape beside its size."""
        return ChosenShape(self.heads, self.kv_heads, self.head_width, self.ffn_width)


class DataConfig(Section):
    """What the teacher reads or generates.

    ``path``: rows, text or a folder of them; none: the teacher generates it. ``split``: of data in
    several (none: train). ``columns``: names of ours, such as text, and what the data calls them;
    null: not to be used. ``samples``: sequences at most (none: all, or 4,096 generated ones), of
    ``max_length`` tokens at most (none: 256, or as long as the conversations, see
    ``distill.capture.lengths``). ``train_on``: the assistant's tokens of conversations (and all of
    other text), or all. ``held_out``: share of the sequences kept for evaluation.
    ``sampling_temperature``, ``top_p``: of generation.
    """

    path: str | None = None
    split: str | None = None
    columns: dict[str, str | None] = {}
    samples: Annotated[int, Field(ge=2)] | None = None
    max_length: Annotated[int, Field(ge=8)] | None = None
    train_on: Literal["assistant", "all"] = "assistant"
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.03
    sampling_temperature: NonNegative = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
