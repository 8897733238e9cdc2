"""One tree of settings. File and flags → ``RunConfig`` (frozen, unknown keys refused) → each part
gets its own.

Nothing here looks at hardware or files, so a configuration can be checked anywhere.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from distill.config.sources import (
    Count,
    DataConfig,
    Fraction,
    NonNegative,
    Positive,
    Section,
    StudentConfig,
    TeacherConfig,
)
from students.gguf.file_types import Quantization

LayerNumber = Annotated[int, Field(ge=0)]
DivergenceName = Literal[
    "forward_kl", "reverse_kl", "jensen_shannon", "skewed_forward_kl", "skewed_reverse_kl"
]
USUAL_LENGTH = 256  # tokens of a sequence, where neither settings nor data say another number
# A file type, and types of token rows, as ``students.gguf.file_types.Quantization`` writes them.
Quant = Annotated[str, AfterValidator(lambda text: str(Quantization.parse(text)))]


class TargetsConfig(Section):
    """The soft targets.

    ``kind``: compact (top-k, the tail's mass and a sketch of its shape), hidden (the final hidden
    state, which gives every logit back) or dense (every logit). ``num_topk``: tokens stored
    exactly. ``sketch_bytes``: for the tail's shape (none: the rest of 200 a token, more where that
    is too few; 0: no sketch).
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

    ``vocabulary_sample``: tokens that the divergence and cross-entropy of a step are taken over,
    drawn anew for each (see ``distill.losses.vocabulary_sample``); 0: all (none: on a CPU
    12,288, where that is at most half of them). Targets of other kinds than compact always take
    all.

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
    vocabulary_sample: Annotated[int, Field(ge=0)] | None = None
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
    come in every n-th. ``most_read``: prompts of each part that the trained student reads for its
    head (none: what 2·10¹² operations are enough for; with --budget, a tenth of its time).
    """

    labels: str = "builtin"
    prompts: str | None = None
    passes: Count = 1024
    together: Count = 16
    most_read: Annotated[int, Field(ge=64)] | None = None

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
    """The training loop. ``epochs``; ``steps``: of the optimizer at most (none: all of the epochs);
    ``batch_size``: sequences per optimizer step, over all
    processes, or in its place ``batch_tokens``: up to so many tokens; ``accumulation``: into how
    many micro-batches a process divides its part of them; ``optimizer``: adamw, muon (for the
    matrices of layers), or auto, whichever pays for the size of a step; ``learning_rate``: peak
    (none: 0.5 / width, less from the teacher's weights, see ``distill.initialization.start``);
    ``schedule``: after the warm-up a straight line, a cosine, or
    wsd (constant until the last ``decay`` of the steps, then a cosine down); ``warmup``: share of
    the steps; ``min_lr``: share of the peak it ends at; ``max_grad_norm``; ``weight_decay``: of
    matrices only; ``precision``: ``bf16`` autocast, ``fp32``, or ``auto``,
    whichever is faster (``distill.runtime.faster_precision``); ``evaluations``: how
    often validation KL is measured, first and last step included, on a part of the validation
    text; ``patience``: stop after so many of them without a better one (none: never).

    ``gradient_checkpointing``: compute layers again in the backward pass instead of keeping what
    they computed (none: only for a student made of a base); ``compile``: torch.compile.
    ``trackers``: tensorboard, wandb. ``on_policy``: share of each batch whose text, after its
    beginning, the student writes itself, at ``on_policy_temperature``; the teacher stays loaded and
    scores it. ``guard``: see ``GuardConfig``.
    """

    epochs: Count = 8
    steps: Count | None = None
    batch_size: Count = 16
    batch_tokens: Annotated[int, Field(ge=16)] | None = None
    accumulation: Count = 1
    optimizer: Literal["auto", "adamw", "muon"] = "auto"
    learning_rate: Positive | None = None
    schedule: Literal["cosine", "linear", "wsd"] = "linear"
    decay: Fraction = 0.2
    warmup: Fraction = 0.05
    min_lr: Fraction = 0.0
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
            and self.batch_size != type(self).model_fields["batch_size"].default
        ):
            raise ValueError(
                f"batch_size = {self.batch_size} and batch_tokens = {self.batch_tokens} are two "
                "sizes of one batch; give the one or the other"
            )
        return self


class ExportConfig(Section):
    """The exported file; ``quant``: a llama.cpp file type, after which the types of token rows may
    stand (``students.gguf.file_types``)."""

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

    @model_validator(mode="after")
    def _has_output(self) -> RunConfig:
        """Refuse a type for rows that the student will not have."""
        tied = self.student.base is None and self.student.tie_embeddings
        if tied and "output" in Quantization.parse(self.export.quant).rows:
            raise ValueError(
                f"export.quant = {self.export.quant}: the student's output matrix is its embedding "
                "(student.tie_embeddings); give the type of its rows as embedding="
            )
        return self

    @model_validator(mode="after")
    def _has_logits(self) -> RunConfig:
        """Refuse targets into which dropped tokens' probability cannot be folded."""
        if self.student.vocab is not None and self.targets.kind == "hidden":
            raise ValueError(
                "targets.kind = hidden keeps no probabilities, into which those of dropped tokens "
                f"could be folded (student.vocab = {self.student.vocab}); use compact or dense"
            )
        return self

    @property
    def safety_head(self) -> bool:
        """Whether the student gets a safety head."""
        return self.safety.labels != "none" and self.loss.lambda_safety > 0

    @property
    def verification_head(self) -> bool:
        """Whether the student gets a verification head."""
        return self.loss.lambda_verification > 0
