"""The model types whose GGUF architecture computes the same in llama.cpp; all others are refused.

A new one is one entry of ``ARCHITECTURES``. Letters: D width, H heads, W head width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from students.gguf.metadata import ExportError

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names of kinds of layers
_GLOBAL = {
    "model.embed_tokens.weight": EMBEDDING,
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": OUTPUT,
}
_SHARED = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_SPLIT = {
    **{f"self_attn.{name}_proj.weight": f"attn_{name}.weight" for name in "qkv"},
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
}
_FUSED = {
    "self_attn.qkv_proj.weight": "attn_qkv.weight",
    "mlp.gate_up_proj.weight": "ffn_up.weight",
}
_INPUT_BIASES = {f"self_attn.{name}_proj.bias": f"attn_{name}.bias" for name in "qkv"}
_OTHER_BIASES = {
    "self_attn.o_proj.bias": "attn_output.bias",
    **{f"mlp.{name}_proj.bias": f"ffn_{name}.bias" for name in ("gate", "up", "down")},
}
_GEMMA3 = {
    **{key: name for key, name in _SHARED.items() if key != "post_attention_layernorm.weight"},
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
}
_HEAD_NORMS = {f"self_attn.{name}_norm.weight": f"attn_{name}_norm.weight" for name in "qk"}


class UnmappedTensor(KeyError):
    """A tensor name outside the table: exporting without it would lose weights silently."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Architecture:
    """How one GGUF architecture holds a model, and what llama.cpp's implementation of it can do.

    ``layer_names``: names of a layer's tensors in transformers → in GGUF. ``permuted``: query and
    key rows stand in rotary pairs (2i, 2i + 1) instead of (i, i + W/2). ``own_head_width``: H·W
    need not be D. ``partial_rotary``: a head may be turned in part. ``ignores_window``: llama.cpp
    has the key of a sliding window (older versions refuse a file without it), but computes none.
    ``refused_flags``: configuration values that add what llama.cpp does not compute.

    ``model_type``: transformers' name where it is another. ``activation``: of the feed-forward
    part, by transformers' name. ``norm_offset``: what the file adds to the gains of norms.
    ``window_period``: of so many layers all but the last attend to a sliding window, with a rotary
    base of their own (0: llama.cpp has no windows for it). ``wide_query_layers``: a model of this
    depth divides attention scores by √(D/H), all others by √W.
    """

    name: str
    layer_names: Mapping[str, str]
    rope_types: tuple[str, ...]
    permuted: bool = False
    own_head_width: bool = False
    partial_rotary: bool = False
    ignores_window: bool = False
    refused_flags: tuple[str, ...] = ()
    model_type: str = ""
    activation: str = "silu"
    norm_offset: float = 0.0
    window_period: int = 0
    wide_query_layers: int = 0

    def to_gguf_name(self, name: str) -> str:
        """GGUF name of a transformers tensor.

        Raises:
            UnmappedTensor: the table has no such name.
        """
        return self._renamed(name, "model.layers.", "blk.", False)

    def from_gguf_name(self, name: str) -> str:
        """The inverse of ``to_gguf_name``."""
        return self._renamed(name, "blk.", "model.layers.", True)

    def _renamed(self, name: str, prefix: str, new_prefix: str, inverse: bool) -> str:
        if match := re.fullmatch(re.escape(prefix) + r"(0|[1-9]\d*)\.(.+)", name):
            names, key, new_prefix = self.layer_names, match[2], f"{new_prefix}{match[1]}."
        else:
            names, key, new_prefix = _GLOBAL, name, ""
        if inverse:
            names = {theirs: ours for ours, theirs in names.items()}
        if key not in names:
            raise UnmappedTensor(
                f"tensor {name!r} has no counterpart in the name table of GGUF architecture "
                f"{self.name}"
            )
        return new_prefix + names[key]


ARCHITECTURES = {
    architecture.model_type or architecture.name: architecture
    for architecture in (
        Architecture(
            "llama",
            _SHARED | _SPLIT | _INPUT_BIASES | _OTHER_BIASES,
            rope_types=("default", "linear", "llama3", "yarn"),
            permuted=True,
            own_head_width=True,
        ),
        Architecture(
            "phi3",
            _SHARED | _FUSED,
            rope_types=("default", "longrope"),
            partial_rotary=True,
            ignores_window=True,
        ),
        Architecture(
            "qwen2", _SHARED | _SPLIT | _INPUT_BIASES, rope_types=("default", "linear", "yarn")
        ),
        Architecture(
            "qwen3",
            _SHARED | _SPLIT | _HEAD_NORMS,
            rope_types=("default", "linear", "yarn"),
            own_head_width=True,
            refused_flags=("attention_bias",),
        ),
        Architecture(
            "gemma3",
            _GEMMA3 | _SPLIT | _HEAD_NORMS,
            rope_types=("default", "linear"),
            own_head_width=True,
            refused_flags=(
                "attention_bias",
                "attn_logit_softcapping",
                "final_logit_softcapping",
                "use_bidirectional_attention",
            ),
            model_type="gemma3_text",
            activation="gelu_pytorch_tanh",
            norm_offset=1.0,
            window_period=6,
            wide_query_layers=62,
        ),
    )
}
# A folded SO8T student is a Llama without biases.
FOLDED = replace(ARCHITECTURES["llama"], layer_names=_SHARED | _SPLIT)
to_gguf_name, from_gguf_name = FOLDED.to_gguf_name, FOLDED.from_gguf_name


def architecture_of(config: Any) -> Architecture:
    """The architecture of a transformers configuration, by its model type.

    Raises:
        ExportError: there is none that computes the same.
    """
    if config.model_type not in ARCHITECTURES:
        raise ExportError(
            f"a model of type {config.model_type!r} cannot be exported to GGUF; "
            f"{', '.join(ARCHITECTURES)} can"
        )
    return ARCHITECTURES[config.model_type]
