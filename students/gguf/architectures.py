"""The model types whose GGUF architecture computes the same in llama.cpp; all others are refused.

A new one is one entry of ``ARCHITECTURES``; its name is the same in transformers and in GGUF.
Letters: D width, H heads, W head width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from students.gguf.metadata import ExportError
from students.gguf.rope_scaling import rope_scaling, rope_theta, rope_type

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
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
    """

    name: str
    layer_names: Mapping[str, str]
    rope_types: tuple[str, ...]
    permuted: bool = False
    own_head_width: bool = False
    partial_rotary: bool = False
    ignores_window: bool = False
    refused_flags: tuple[str, ...] = ()

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
    architecture.name: architecture
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
    )
}
# A folded SO8T student is a Llama without biases.
FOLDED = replace(ARCHITECTURES["llama"], layer_names=_SHARED | _SPLIT)
to_gguf_name, from_gguf_name = FOLDED.to_gguf_name, FOLDED.from_gguf_name


def architecture_of(config: Any) -> Architecture:
    """The architecture of a transformers configuration.

    Raises:
        ExportError: there is none that computes the same.
    """
    if config.model_type not in ARCHITECTURES:
        raise ExportError(
            f"a model of type {config.model_type!r} cannot be exported to GGUF; "
            f"{', '.join(ARCHITECTURES)} can"
        )
    return ARCHITECTURES[config.model_type]


def require_exportable(config: Any) -> None:
    """Refuse a transformers configuration that llama.cpp would not compute as PyTorch does.

    It needs no weights: to be asked before anything that takes long.

    Raises:
        ExportError: says in one line what cannot be exported, and what can.
    """
    architecture = architecture_of(config)
    name = architecture.name
    if config.hidden_act != "silu":
        raise ExportError(
            f"hidden_act is {config.hidden_act!r}; only a {name} model with 'silu' can be exported"
        )
    for flag in architecture.refused_flags:
        if getattr(config, flag, False):
            raise ExportError(f"{flag} is set; only a {name} model without it can be exported")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ExportError(f"{heads} heads do not divide among {kv_heads} key/value heads")
    width = head_width(config)
    if not architecture.own_head_width and heads * width != config.hidden_size:
        raise ExportError(
            f"{heads} heads of width {width} do not fill the model's {config.hidden_size}, which a "
            f"{name} file needs"
        )
    kind = rope_type(config)
    if kind not in architecture.rope_types:
        raise ExportError(
            f"rope_type {kind!r} of a {name} model cannot be exported; "
            f"{', '.join(architecture.rope_types)} can"
        )
    dimensions = rotary_dimensions(config)
    partial = dimensions < width and not architecture.partial_rotary
    if partial or dimensions % 2 or not 2 <= dimensions <= width:
        raise ExportError(
            f"rotary embeddings that turn {dimensions} of {width} values of a head cannot be "
            f"exported for {name}"
        )
    rope_theta(config)
    rope_scaling(config, dimensions)
    context_length(config)


def head_width(config: Any) -> int:
    """Width of one attention head, W."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def rotary_dimensions(config: Any) -> int:
    """How many values of a head the rotary embedding turns, as transformers counts them.

    Raises:
        ExportError: ``partial_rotary_factor`` is not above 0 and at most 1.
    """
    share = config.rope_parameters.get("partial_rotary_factor")
    if share is None:
        return head_width(config)
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise ExportError(
            f"partial_rotary_factor is {share!r}; a number above 0 and at most 1 is needed"
        )
    return int(head_width(config) * share)


def context_length(config: Any) -> int:
    """Tokens up to which the file computes what the model computes, to be written as its context.

    Where llama.cpp ignores the sliding window, a window shorter than the context becomes the
    context: within it both see all tokens.

    Raises:
        ExportError: layers whose window is shorter than the context.
    """
    context = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    if architecture_of(config).ignores_window:
        return context if window is None else min(context, int(window))
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if sliding and window is not None and window < context:
        raise ExportError(
            f"sliding windows of {window} tokens cannot be exported for {config.model_type}; a "
            "model without use_sliding_window can"
        )
    return context
