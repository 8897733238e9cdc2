"""One tree of settings. File and flags → ``RunConfig`` (frozen, unknown keys refused) → each part
gets its own.

Nothing here looks at hardware or files, so a configuration can be checked anywhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from students.model.shape import ChosenShape, StudentSize, attention_shape, parse_request
from teachers.tokenizer.chat_template import GIVEN

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
LayerNumber = Annotated[int, Field(ge=0)]
DivergenceName = Literal[
    "forward_kl", "reverse_kl", "jensen_shannon", "skewed_forward_kl", "skewed_reverse_kl"
]
USUAL_LENGTH = 256  # tokens of a sequence, where neither settings nor data say another number
Quant = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_nl"]


class Section(BaseModel):
    """Base of every section: frozen, unknown keys and non-finite numbers refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TeacherConfig(Section):
    """The teacher.

    ``path``: a GGUF file, or a transformers folder to capture from; none: the example teacher.
    ``mix_with``: further teachers with the same vocabulary; ``weights``: of all in the mixture, the
    first included (none: equal). ``load_in_4bit``: NF4 for folders, through bitsandbytes.
    ``template_variables``: values that its chat template uses where a conversation has none of its
    own, such as ``enable_thinking: false``, ``tools`` or ``documents``; the student's chat template
    keeps them.

    ``gpu_layers``: layers on a GPU where llama.cpp has one, −1 for all. ``main_gpu``: the one GPU
    to use, from 0 (none: each process of a launch its own; one alone all of them, by their free
    memory), or ``tensor_split``: the share of the layers for each. ``cache_type``: of the numbers
    in the KV cache. ``batch_tokens``: computed at once; ``sequences``: decoded together, at most
    (both none: by the memory).
    """

    path: str | None = None
    gpu_layers: Annotated[int, Field(ge=-1)] = -1
    main_gpu: Annotated[int, Field(ge=0)] | None = None
    tensor_split: tuple[NonNegative, ...] = ()
    cache_type: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    batch_tokens: Annotated[int, Field(ge=32, le=1 << 16)] | None = None
    sequences: Count | None = None
    mix_with: tuple[str, ...] = ()
    weights: tuple[Positive, ...] = ()
    load_in_4bit: bool = False
    template_variables: dict[str, JsonValue] = {}

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
    (teacher if possible).

    ``base``: folder of a transformers model with the teacher's vocabulary, which becomes the
    student: frozen, with LoRA of ``lora_rank``, scaled by ``lora_alpha / lora_rank``, and
    ``lora_dropout``. ``load_in_4bit``: its matrices in NF4, through bitsandbytes.
    """

    size: str | None = None
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
        return f"{Path(self.base).resolve().name}-lora{self.lora_rank}"

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


class TargetsConfig(Section):
    """The soft targets.

    ``kind``: compact (top-k, the tail's mass and a sketch of its shape), hidden (the final hidden
    state, which gives every logit back) or dense (every logit). ``num_topk``: tokens stored
    exactly. ``sketch_bytes``: for the tail's shape (none: the rest of 200 a token; 0: no sketch).
    ``layers``: teacher layers whose output is stored too, from 0; ``layer_bytes``: bytes of each.
    """

    kind: Literal["compact", "hidden", "dense"] = "compact"
    num_topk: Count = 16
    sketch_bytes: Annotated[int, Field(ge=0)] | None = None
    layers: tuple[LayerNumber, ...] = ()
    layer_bytes: Count = 128


class LossConfig(Section):
    """α·T²·KL_T(teacher‖student) + β·CE + γ·hidden + λ_so8t·(PET + inertia + non-commutation)
    + λ_safety·safety + λ_verification·verification.

    ``temperature`` T, ``alpha`` α, ``beta`` β, ``lambda_so8t`` λ_so8t. ``final_temperature``: T
    from ``final_from`` of training on (none: T to the end). ``pet``: weight of the squared second
    difference of the final hidden states in each third of training (to 30 %, to 70 %, to the end).
    ``inertia``: weight of the rotations' squared distance from their moving average.
    ``inertia_decay``: of that average, per step. ``commutator_margin``: below this norm the
    non-commutation term pushes.

    ``divergence``: what stands for KL_T in the formula (see ``distill.losses.divergences``);
    ``js_mixing``: the teacher's share b in the mixture of jensen_shannon; ``skew``: s of the skewed
    KLs. ``gamma`` γ: weight of the hidden-state loss, where the store holds hidden states
    (``targets.layers``). ``layer_map``: pairs (student's layer, teacher's layer) it compares, from
    0; none: each kept layer with the one at the same relative depth.

    ``lambda_safety`` λ_safety and ``lambda_verification`` λ_verification: weights of the two heads;
    0: the student has no such head.
    """

    temperature: Annotated[float, Field(ge=1.0)] = 3.0
    final_temperature: Annotated[float, Field(ge=1.0)] | None = None
    final_from: Fraction = 0.1
    divergence: DivergenceName = "forward_kl"
    js_mixing: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    skew: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    alpha: NonNegative = 0.7
    beta: NonNegative = 0.3
    gamma: NonNegative = 0.1
    layer_map: tuple[tuple[LayerNumber, LayerNumber], ...] = ()
    lambda_so8t: NonNegative = 0.5
    pet: tuple[NonNegative, NonNegative, NonNegative] = (0.0, 0.001, 0.002)
    inertia: NonNegative = 0.1
    inertia_decay: Fraction = 0.99
    commutator_margin: NonNegative = 0.1
    lambda_safety: NonNegative = 0.3
    lambda_verification: NonNegative = 0.2


class SafetyConfig(Section):
    """What the safety head learns.

    ``labels``: builtin (the built-in prompts), a JSONL file of ``prompt`` and ``label`` (ALLOW,
    ESCALATE, REFUSE), teacher (its own judgment of the prompts, as probabilities), or none.
    ``prompts``: JSONL file for the teacher to judge (none: the built-in ones). ``passes``: prompts
    in training altogether, at most ``together`` in a step; if they need not be in every step, they
    come in every n-th.
    """

    labels: str = "builtin"
    prompts: str | None = None
    passes: Count = 1024
    together: Count = 16

    def rhythm(self, steps: int) -> tuple[int, int]:
        """Prompts come in every n-th of ``steps`` steps, and how many then: (n, count)."""
        every = max(1, self.together * steps // self.passes)
        return every, min(self.together, -(-self.passes * every // max(1, steps)))


class GuardConfig(Section):
    """What keeps training from being damaged (docs/stability.md).

    ``enabled``: without it, a loss or gradient that is not finite ends the run, and nothing else is
    watched. ``z_clip``: gradients are clipped this many standard deviations above past norms.
    ``snapshot_every``: steps between snapshots in memory, the newest ``snapshots`` of which are
    kept. ``rollbacks``: how often in a row before giving up; each multiplies the learning rate by
    ``lower``, which is reached again over ``rewarm`` steps and recovers over ``recover`` steps.
    ``probe_every``: steps between probes on validation text.
    """

    enabled: bool = True
    z_clip: Positive = 5.0
    snapshot_every: Count = 25
    snapshots: Annotated[int, Field(ge=1, le=100)] = 3
    rollbacks: Count = 3
    lower: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    rewarm: Annotated[int, Field(ge=0)] = 10
    recover: Count = 50
    probe_every: Count = 25


class TrainConfig(Section):
    """The training loop. ``epochs``; ``batch_size``: sequences per optimizer step, over all
    processes, or in its place ``batch_tokens``: up to so many tokens; ``accumulation``: into how
    many micro-batches a process divides its part of them;
    ``learning_rate``: peak (none: 0.5 / width, less from the teacher's weights, see
    ``distill.initialization.start``); ``schedule``: after the warm-up a cosine, a straight line, or
    wsd (constant until the last ``decay`` of the steps, then a cosine down); ``warmup``: share of
    the steps; ``min_lr``: share of the peak it ends at; ``max_grad_norm``; ``weight_decay``: of
    matrices only; ``precision``: ``bf16`` autocast, ``fp32``, or ``auto``; ``evaluations``: how
    often validation KL is measured, first and last step included; ``patience``: stop after so many
    of them without a better one (none: never).

    ``gradient_checkpointing``: compute layers again in the backward pass instead of keeping what
    they computed (none: only for a student made of a base); ``compile``: torch.compile.
    ``trackers``: tensorboard, wandb. ``on_policy``: share of each batch whose text, after its
    beginning, the student writes itself, at ``on_policy_temperature``; the teacher stays loaded and
    scores it. ``guard``: see ``GuardConfig``.
    """

    epochs: Count = 8
    batch_size: Count = 16
    batch_tokens: Annotated[int, Field(ge=16)] | None = None
    accumulation: Count = 1
    learning_rate: Positive | None = None
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    decay: Fraction = 0.2
    warmup: Fraction = 0.05
    min_lr: Fraction = 0.02
    max_grad_norm: Positive = 1.0
    weight_decay: NonNegative = 0.01
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    evaluations: Annotated[int, Field(ge=2)] = 12
    patience: Count | None = None
    gradient_checkpointing: bool | None = None
    compile: bool = False
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    on_policy: Fraction = 0.0
    on_policy_temperature: Positive = 1.0
    guard: GuardConfig = GuardConfig()

    @model_validator(mode="after")
    def _one_size(self) -> TrainConfig:
        """Refuse two sizes of a batch."""
        if (
            self.batch_tokens is not None
            and self.batch_size != self.model_fields["batch_size"].default
        ):
            raise ValueError(
                f"batch_size = {self.batch_size} and batch_tokens = {self.batch_tokens} are two "
                "sizes of one batch; give the one or the other"
            )
        return self


class ExportConfig(Section):
    """The exported file; ``quant``: a llama.cpp file type (``students.gguf.file_types``)."""

    quant: Quant = "q8_0"


class RunConfig(Section):
    """Everything one run depends on. The same configuration and seed give the same bytes on CPU.

    ``store``: the folder of soft targets that ``distill train`` learns from, without a teacher."""

    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    data: DataConfig = DataConfig()
    targets: TargetsConfig = TargetsConfig()
    loss: LossConfig = LossConfig()
    safety: SafetyConfig = SafetyConfig()
    train: TrainConfig = TrainConfig()
    export: ExportConfig = ExportConfig()
    store: str | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0

    @property
    def safety_head(self) -> bool:
        """Whether the student gets a safety head."""
        return self.safety.labels != "none" and self.loss.lambda_safety > 0

    @property
    def verification_head(self) -> bool:
        """Whether the student gets a verification head."""
        return self.loss.lambda_verification > 0
