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


@torch.no_grad()
def balance(student: SO8TForCausalLM) -> None:
    """Balance all weights in place; but for the norms' epsilon the logits stay the same."""
    model, config = student.model, student.config
    layers = [layer for layer in model.layers if isinstance(layer, DecoderLayer)]
    table, output, gain = model.embed_tokens.weight, student.lm_head.weight, model.norm.weight
    factor = _mean(gain)
    if config.tie_word_embeddings:
        gain.div_(factor or 1.0)
    else:
        _move(gain, [output])
        factor = 1.0
    factor = factor or 1.0
    # The norms divide the whole stream by its size.
    for written in (table, *(layer.self_attn.o_proj.weight for layer in layers)):
        written.mul_(factor)
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        mlp.down_proj.weight.mul_(factor)
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
