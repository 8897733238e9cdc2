"""A Llama's forward pass in PyTorch, with all inner activations, one layer in memory at a time.

llama.cpp runs teachers faster, but does not give these activations. Letters: N tokens of all
sequences one after another, D width, H heads, K key/value heads, W head width, F feed-forward
width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from teachers.base import Floats, Tokens
from teachers.gguf.llama_weights import LayerWeights, LlamaFacts, LlamaWeights

VOCABULARY_ROWS = 8192


@dataclass(frozen=True)
class LayerTrace:
    """What one layer computes, float32.

    ``before``, ``middle``, ``after`` ``[N, D]``: the residual stream before the layer, after its
    attention, and after it. ``query [N, H·W]``, ``key`` and ``value [N, K·W]``: with biases and
    head norms, before the rotary embedding. ``mixed [N, H·W]``: the heads' outputs. ``gate`` and
    ``up [N, F]``: of the feed-forward part, before its activation.
    """

    number: int
    weights: LayerWeights
    before: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    mixed: Tensor
    middle: Tensor
    gate: Tensor
    up: Tensor
    after: Tensor


def embed(teacher: LlamaWeights, sequences: Sequence[Tokens]) -> Tensor:
    """The embeddings of all tokens, ``[N, D]``; only rows that occur are kept.

    Raises:
        TeacherFileError: an embedding is not finite.
        IndexError: a token that the teacher does not have.
    """
    tokens = np.concatenate(sequences).astype(np.int64)
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < teacher.facts.vocab_size:
        raise IndexError(
            f"tokens {tokens.min()} to {tokens.max()} of a vocabulary of {teacher.facts.vocab_size}"
        )
    rows = np.empty((len(tokens), teacher.facts.width), dtype=np.float32)
    for start in range(0, teacher.facts.vocab_size, VOCABULARY_ROWS):
        stop = min(start + VOCABULARY_ROWS, teacher.facts.vocab_size)
        here = (tokens >= start) & (tokens < stop)
        if here.any():
            rows[here] = teacher.embedding_rows(start, stop)[tokens[here] - start]
    return torch.from_numpy(rows)


@torch.no_grad()
def trace(teacher: LlamaWeights, sequences: Sequence[Tokens]) -> Iterator[LayerTrace]:
    """Run ``sequences`` through all layers, one after another.

    Raises:
        TeacherFileError: a weight is not finite or cannot be read.
        IndexError: a token that the teacher does not have.
    """
    facts, lengths = teacher.facts, [len(tokens) for tokens in sequences]
    rotary = _rotary(facts, max(lengths))
    state = embed(teacher, sequences)
    for number in range(facts.layers):
        layer = _layer(number, teacher.layer(number), facts, state, lengths, rotary)
        yield layer
        state = layer.after


@torch.no_grad()
def final_states(teacher: LlamaWeights, state: Tensor) -> Tensor:
    """The output matrix's input: the last layer's ``state [N, D]`` after the final norm."""
    return _normed(state, teacher.final_norm(), teacher.facts.rms_eps)


def logits(teacher: LlamaWeights, sequences: Sequence[Tokens]) -> Floats:
    """Logits as of ``Teacher.logits``, ``[N − number of sequences, V]``."""
    state = torch.empty(0)
    for layer in trace(teacher, sequences):
        state = layer.after
    ends = np.cumsum([len(tokens) for tokens in sequences]) - 1
    states = np.delete(final_states(teacher, state).numpy(), ends, axis=0)
    return states @ teacher.output_rows(0, teacher.facts.vocab_size).T


def _layer(
    number: int,
    weights: LayerWeights,
    facts: LlamaFacts,
    state: Tensor,
    lengths: Sequence[int],
    rotary: tuple[Tensor, Tensor],
) -> LayerTrace:
    inputs = _normed(state, weights.input_norm, facts.rms_eps)
    query = _head_normed(_linear(inputs, weights.q_proj, weights.q_bias), weights.q_norm, facts)
    key = _head_normed(_linear(inputs, weights.k_proj, weights.k_bias), weights.k_norm, facts)
    value = _linear(inputs, weights.v_proj, weights.v_bias)
    mixed = _attend(query, key, value, facts.head_width, lengths, rotary)
    middle = state + _linear(mixed, weights.o_proj)
    inputs = _normed(middle, weights.post_norm, facts.rms_eps)
    gate, up = _linear(inputs, weights.gate_proj), _linear(inputs, weights.up_proj)
    after = middle + _linear(F.silu(gate) * up, weights.down_proj)
    return LayerTrace(number, weights, state, query, key, value, mixed, middle, gate, up, after)


def _linear(x: Tensor, weight: Floats, bias: Floats | None = None) -> Tensor:
    return F.linear(x, torch.from_numpy(weight), None if bias is None else torch.from_numpy(bias))


def _normed(x: Tensor, gain: Floats, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * torch.from_numpy(gain)


def _head_normed(x: Tensor, gain: Floats | None, facts: LlamaFacts) -> Tensor:
    """``x [N, heads · W]`` with each head normalized on its own, where the teacher does that."""
    if gain is None:
        return x
    return _normed(x.view(len(x), -1, facts.head_width), gain, facts.rms_eps).reshape(x.shape)


def _rotary(facts: LlamaFacts, positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[positions, W / 2]`` of the rotary embedding (Su et al. 2021)."""
    angles = torch.arange(positions)[:, None] * torch.from_numpy(facts.frequencies)
    return angles.cos() * facts.rotary_scale, angles.sin() * facts.rotary_scale


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_width: int,
    lengths: Sequence[int],
    rotary: tuple[Tensor, Tensor],
) -> Tensor:
    """Causal attention within each sequence: ``[N, H·W]`` from query, key and value."""
    split: Callable[[Tensor], Tensor] = lambda x: x.view(len(x), -1, head_width).transpose(0, 1)  # noqa: E731
    mixed, start = torch.empty_like(query), 0
    for length in lengths:
        rows = slice(start, start + length)
        start += length
        heads = F.scaled_dot_product_attention(
            _turned(split(query[rows]), rotary)[None],
            _turned(split(key[rows]), rotary)[None],
            split(value[rows])[None],
            is_causal=True,
            enable_gqa=True,
        )[0]
        mixed[rows] = heads.transpose(0, 1).reshape(length, -1)
    return mixed


def _turned(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs (i, i + W/2) of ``x [heads, T, W]`` by the angles of positions 0 to T − 1."""
    cos, sin = (table[: x.shape[1]] for table in rotary)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
