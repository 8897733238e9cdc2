"""What a model's configuration states for its GGUF file, and whether llama.cpp computes that."""

from __future__ import annotations

from typing import Any

from students.gguf.architectures import FULL, SLIDING, Architecture, architecture_of
from students.gguf.metadata import ExportError
from students.gguf.rope_scaling import (
    rope_parameters,
    rope_scaling,
    rope_theta,
    rope_type,
    window_theta,
)


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
    share = rope_parameters(config).get("partial_rotary_factor")
    if share is None:
        return head_width(config)
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise ExportError(
            f"partial_rotary_factor is {share!r}; a number above 0 and at most 1 is needed"
        )
    return int(head_width(config) * share)


def window_of(config: Any) -> int:
    """How many of the latest tokens a layer with a sliding window attends to, as the file says it;
    0: none has one.

    Raises:
        ExportError: other layers have one than in llama.cpp.
    """
    period, window = architecture_of(config).window_period, getattr(config, "sliding_window", None)
    kinds = list(getattr(config, "layer_types", None) or [])
    if not period or window is None or SLIDING not in kinds:
        return 0
    usual = [FULL if number % period == period - 1 else SLIDING for number in range(len(kinds))]
    if kinds != usual:
        raise ExportError(
            f"layer_types of a {config.model_type} model can be exported where all attend to all "
            f"tokens, or all but every {period}th to a window; here it is otherwise"
        )
    return int(window)


def context_length(config: Any) -> int:
    """Tokens up to which the file computes what the model computes, to be written as its context.

    Where llama.cpp ignores the sliding window, a window shorter than the context becomes the
    context: within it both see all tokens.

    Raises:
        ExportError: layers whose window is shorter than the context.
    """
    context = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    architecture = architecture_of(config)
    if architecture.ignores_window:
        return context if window is None else min(context, int(window))
    if architecture.window_period:
        return context
    sliding = SLIDING in (getattr(config, "layer_types", None) or ())
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
    field = "hidden_activation" if hasattr(config, "hidden_activation") else "hidden_act"
    if (activation := getattr(config, field)) != architecture.activation:
        raise ExportError(
            f"{field} is {activation!r}; only a {name} model with {architecture.activation!r} can "
            "be exported"
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
    _require_query_scale(config, architecture)
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
    if window_of(config):
        window_theta(config)


def _require_query_scale(config: Any, architecture: Architecture) -> None:
    """Gemma states what attention scores are divided by the root of; the file does not."""
    stated = getattr(config, "query_pre_attn_scalar", None)
    if stated is None:
        return
    wide = config.num_hidden_layers == architecture.wide_query_layers
    usual = config.hidden_size // config.num_attention_heads if wide else head_width(config)
    if stated != usual:
        raise ExportError(
            f"query_pre_attn_scalar is {stated!r}; a {config.model_type} model of "
            f"{config.num_hidden_layers} layers can be exported with {usual}"
        )
