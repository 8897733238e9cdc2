"""Balance the scales of a fitted student's weights; what it computes stays the same.

Adam moves every weight by about the learning rate, whatever its size. A teacher's weights differ a
thousandfold in size, so that at any rate some are destroyed by the first step and others never move
(docs/benchmarks.md). Factors that cancel go from one tensor to another until gains have a mean
square of 1 and matrices in a row the same one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from students.model.decoder import DecoderLayer, SO8TForCausalLM

EPSILONS = 1000.0  # a stream's mean square is at least so many of the norms' epsilon


@torch.no_grad()
def balance(student: SO8TForCausalLM) -> None:
    """Balance all weights in place; but for the norms' epsilon the logits stay the same."""
    model, config = student.model, student.config
    layers = [layer for layer in model.layers if isinstance(layer, DecoderLayer)]
    if config.tie_word_embeddings:
        _scale_stream(student, layers)
    else:
        _move(model.norm.weight, [student.lm_head.weight])
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        query, key, value = (
            part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        _move(layer.input_layernorm.weight, [query, key, value])
        _move(layer.post_attention_layernorm.weight, [mlp.gate_proj.weight, mlp.up_proj.weight])
        groups = config.num_key_value_heads
        for pair in zip(query.chunk(groups), key.chunk(groups), strict=True):
            _equalize(*pair)
        _equalize(value, attention.o_proj.weight)
        _equalize(mlp.up_proj.weight, mlp.down_proj.weight)


def _scale_stream(student: SO8TForCausalLM, layers: Sequence[DecoderLayer]) -> None:
    """Move the final gain's size into the tied matrix, and with it into the whole stream, which
    every norm divides by its size; not so far that the norms' epsilon begins to count."""
    table, gain = student.model.embed_tokens.weight, student.model.norm.weight
    least = (EPSILONS * student.config.rms_norm_eps) ** 0.5
    if (factor := _mean(gain)) and (size := _mean(table)):
        factor = max(factor, min(1.0, least / size))
        gain.div_(factor)
        written = [
            part for layer in layers for part in (layer.self_attn.o_proj, layer.mlp.down_proj)
        ]
        for weight in (table, *(part.weight for part in written)):
            weight.mul_(factor)


def _mean(x: Tensor) -> float:
    """Root mean square of all elements."""
    return float(x.double().square().mean().sqrt())


def _move(gain: Tensor, matrices: Sequence[Tensor]) -> None:
    """Move a gain's size into the matrices behind it."""
    if size := _mean(gain):
        gain.div_(size)
        for matrix in matrices:
            matrix.mul_(size)


def _equalize(first: Tensor, second: Tensor) -> None:
    """Give two matrices whose product counts the same size; one that is silent stays so."""
    if (before := _mean(first)) and (after := _mean(second)):
        factor = (after / before) ** 0.5
        first.mul_(factor)
        second.div_(factor)
