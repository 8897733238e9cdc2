"""The few settings of an SO8T student; everything else is derived from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from students.model.heads import DEFAULT_TRUST
from students.model.shape import GROUP


class SO8TConfig(PretrainedConfig):
    """Shape of an SO8T decoder: a Llama with two SO(8) rotations on every attention output.

    Args:
        vocab_size: number of tokens; equals the teacher's.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of decoder layers.
        num_attention_heads: query heads; divides ``hidden_size``.
        num_key_value_heads: key/value heads (grouped-query attention); divides the query heads.
        head_dim: width of one head, even; the heads together must fill whole blocks of 8. None:
            ``hidden_size`` is divided evenly among the heads.
        intermediate_size: width of the SwiGLU feed-forward.
        max_position_embeddings: longest context the exported file announces.
        rope_theta: base of the rotary position embedding.
        rms_norm_eps: epsilon of every RMSNorm.
        initializer_range: standard deviation of the initial weights.
        rotation_init_std: standard deviation of the initial rotation parameters (radians). Not 0:
            at exactly the identity the two rotations commute.
        safety_head, verification_head: whether there is one (see ``students.model.heads``).
        safety_shape: what the safety head looks at (``students.model.safety_head.SafetyShape``), as
            a mapping; None: the last state alone, as in training.
        decision_thresholds: of REFUSE and ALLOW, in students of older versions (see
            ``students.model.heads.decide_by_thresholds``).
        trust: probability of agreeing with the teacher below which it should be asked.

    Raises:
        ValueError: a width that cannot be split into heads or 8-dimensional blocks.
    """

    model_type = "so8t"

    def __init__(
        self,
        vocab_size: int = 32064,
        hidden_size: int = 512,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 8,
        num_key_value_heads: int = 4,
        intermediate_size: int = 1536,
        max_position_embeddings: int = 2048,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        rotation_init_std: float = 0.05,
        head_dim: int | None = None,
        safety_head: bool = False,
        verification_head: bool = False,
        safety_shape: Mapping[str, Any] | None = None,
        decision_thresholds: Sequence[float] | None = None,
        trust: float = DEFAULT_TRUST,
        tie_word_embeddings: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = self._head_width() if head_dim is None else head_dim
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.rotation_init_std = rotation_init_std
        self.safety_head = safety_head
        self.verification_head = verification_head
        self.safety_shape = dict(safety_shape) if safety_shape is not None else None
        self.decision_thresholds = (
            None if decision_thresholds is None else list(decision_thresholds)
        )
        self.trust = trust
        self._check()
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            **kwargs,
        )

    @property
    def attention_width(self) -> int:
        """Width of the attention output: all heads side by side."""
        return self.num_attention_heads * self.head_dim

    @property
    def num_blocks(self) -> int:
        """Number of 8-dimensional blocks of the attention output."""
        return self.attention_width // GROUP

    def _head_width(self) -> int:
        """Width of a head where the residual stream is divided evenly among them."""
        if self.hidden_size % GROUP:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by {GROUP}: the SO(8) gates need "
                f"whole blocks; use {max(GROUP, round(self.hidden_size / GROUP) * GROUP)}"
            )
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} does not split into {self.num_attention_heads} "
                "heads of even width (rotary embeddings need pairs)"
            )
        return self.hidden_size // self.num_attention_heads

    def _check(self) -> None:
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is not even (rotary embeddings need pairs)")
        # Whatever head_dim is: transformers' own Llama requires it.
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.attention_width % GROUP:
            raise ValueError(
                f"{self.num_attention_heads} heads of width {self.head_dim} are "
                f"{self.attention_width} wide together, which is not divisible by {GROUP}: the "
                "SO(8) gates need whole blocks"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
