"""What the rest of the project may ask of a student, whatever it is made of.

Letters: B batch, T tokens, V vocabulary, D width, L layers, N blocks of an SO(8) gate, G = 8.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from students.model.heads import Heads, VerificationHead
from students.model.safety_head import SafetyHead

if TYPE_CHECKING:
    from transformers import Cache
    from typing_extensions import Unpack

    from students.model.gate import SO8Gate


class StudentFacts(Protocol):
    """What a student's configuration says, whatever class it has.

    ``vocab_size`` is the teacher's. ``safety_shape`` (``students.model.safety_head.shape_of``) and
    ``trust`` are set once the heads are fitted; ``decision_thresholds`` by older versions only.
    """

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    safety_head: bool
    verification_head: bool
    safety_shape: dict[str, Any] | None
    decision_thresholds: list[float] | None
    trust: float


class Outputs(TypedDict, total=False):
    """What a forward pass returns.

    ``with_logits`` (default true): without, the caller applies ``Student.output_matrix`` itself, as
    the training loss does. ``layers_to_keep``: layers, from 0, whose output before the final norm
    is returned too. ``lengths [S]``, where ``Student.packs``: ``input_ids [1, N]`` are S sequences
    one after another, none of which sees another; in main memory.
    """

    with_logits: bool
    lengths: Tensor | None
    layers_to_keep: Collection[int]


class Student(nn.Module, ABC):
    """A causal decoder with an SO(8) gate on every layer's attention output, and the two heads."""

    packs = False  # whether it takes sequences packed into one row (``Outputs``)
    config: StudentFacts
    safety_head: SafetyHead  # both only where ``config`` says so
    verification_head: VerificationHead

    @abstractmethod
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        **outputs: Unpack[Outputs],
    ) -> SO8TOutput:
        """Logits ``[B, T, V]`` of ``input_ids [B, T]``, or of the last ``logits_to_keep`` tokens.

        ``attention_mask [B, T]`` marks real tokens with 1 and is needed only for left-padded
        prompts: a causal decoder never looks at padding on the right. With ``use_cache`` the output
        has ``past_key_values`` for the next call.
        """

    @abstractmethod
    def output_matrix(self) -> Tensor:
        """The language-model head's weight ``[V, D]``."""

    @abstractmethod
    def gates(self) -> Sequence[SO8Gate]:
        """The gate of every layer, in order."""

    @abstractmethod
    def rotations(self) -> Tensor:
        """The current rotations ``[L, 2, N, 8, 8]``: R_safe (0) and R_cmd (1)."""

    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """The decoder's layers, in order."""

    @abstractmethod
    def own_weights(self) -> dict[str, Tensor]:
        """Everything that training may change, by name; detached, not copied."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.parameters()).device

    def heads(self) -> Heads:
        """The heads that this student has, with their rules."""
        thresholds = None
        if self.config.decision_thresholds is not None:
            refuse, allow = self.config.decision_thresholds
            thresholds = (refuse, allow)
        return Heads(
            self.safety_head if self.config.safety_head else None,
            self.verification_head if self.config.verification_head else None,
            self.config.trust,
            thresholds=thresholds,
        )

    def replace_safety_head(self, head: SafetyHead | None) -> None:
        """Give it another safety head, or take it away; the rest stays as it is."""
        self.config.safety_head = head is not None
        self.config.decision_thresholds = None
        self.config.safety_shape = None if head is None else head.shape.to_json()
        if head is None:
            del self.safety_head
        else:
            self.safety_head = head.to(self.device)

    def parameter_count(self) -> int:
        """Number of parameters, with gates and heads; tied matrices count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def checkpoint_activations(self, wanted: bool) -> None:
        """Whether the backward pass recomputes activations instead of keeping them."""
        model: Any = self
        # Older transformers (for Python 3.10) know it by its older name.
        if wanted:
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        else:
            disable = getattr(model, "activation_checkpointing_disable", None)
            (disable or model.gradient_checkpointing_disable)()


@dataclass
class SO8TOutput(CausalLMOutputWithPast):
    """A causal-LM output with the last hidden state ``[B, T, D]`` and each layer's rotations.

    ``rotations [L, 2, N, 8, 8]``: R_safe (0) and R_cmd (1) of this forward pass, which regularizers
    reuse. ``layer_states``: output ``[B, T, D]`` of each requested layer.
    """

    last_hidden_state: Tensor | None = None
    rotations: Tensor | None = None
    layer_states: dict[int, Tensor] | None = None
