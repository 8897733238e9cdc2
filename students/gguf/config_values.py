"""What a model's configuration states for its GGUF file, and whether llama.cpp computes that."""

from __future__ import annotations

from typing import Any

from students.gguf.architectures import architecture_of
from students.gguf.metadata import ExportError
from students.gguf.rope_scaling import rope_scaling, rope_theta, rope_type


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
