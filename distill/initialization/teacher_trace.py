"""A teacher's forward pass in PyTorch, with all inner activations, one layer in memory at a time.

llama.cpp runs teachers faster, but does not give these activations. Letters: N tokens of all
sequences one after another, D width, H heads, K key/value heads, W head width, F feed-forward
width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.initialization.products import linear
from teachers.base import Floats, Tokens
from teachers.gguf.llama_weights import LayerWeights, LlamaFacts, LlamaWeights

VOCABULARY_ROWS = 8192


@dataclass(frozen=True)
class LayerTrace:
    """What one layer computes, float32.

    ``before``, ``middle``, ``after`` ``[N, D]``: the residual stream before the layer, after its
    attention, and after it. ``query [N, H·W]``, ``key`` and ``value [N, K·W]``: with biases and
    head norms, before the rotary embedding. ``mixed [N, H·W]``: the heads' outputs. ``gate`` and
    ``up [N, F]``: of the feed-forward part, before its activation; ``active [N, F]``: their product
    after it. ``mixed_scale`` and ``active_scale [N, 1]``: by what a norm multiplies what the output
    matrices give before its gain; ones where there is no norm.
    """

    number: int
    weights: LayerWeights
    before: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    mixed: Tensor
    mixed_scale: Tensor
    middle: Tensor
    gate: Tensor
    up: Tensor
    active: Tensor
    active_scale: Tensor
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
def trace(
    teacher: LlamaWeights, sequences: Sequence[Tokens], *, narrow: bool = False
) -> Iterator[LayerTrace]:
    """Run ``sequences`` through all layers, one after another; ``narrow``: with products of
    bfloat16.

    Raises:
        TeacherFileError: a weight is not finite or cannot be read.
        IndexError: a token that the teacher does not have.
    """
    lengths, state = [len(tokens) for tokens in sequences], embed(teacher, sequences)
    for number in range(teacher.facts.layers):
        layer = _layer(number, teacher.layer(number), teacher.facts, state, lengths, narrow)
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
    parts = [part for _, part in logit_blocks(teacher, torch.from_numpy(states))]
    return torch.cat(parts, dim=1).numpy()


def logit_blocks(teacher: LlamaWeights, states: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of the output matrix at a time, ``[R, D]``, and their logits ``[N, R]``.

    ``states [N, D]``: the output matrix's input. In float32 a whole matrix can be gigabytes.
    """
    for start in range(0, teacher.facts.vocab_size, VOCABULARY_ROWS):
        stop = min(start + VOCABULARY_ROWS, teacher.facts.vocab_size)
        rows = torch.from_numpy(teacher.output_rows(start, stop))
        yield rows, _capped(states @ rows.T, teacher.facts.caps[1])


def _layer(
    number: int,
    weights: LayerWeights,
    facts: LlamaFacts,
    state: Tensor,
    lengths: Sequence[int],
    narrow: bool,
) -> LayerTrace:
    def through(x: Tensor, weight: Floats, bias: Floats | None = None) -> Tensor:
        offset = None if bias is None else torch.from_numpy(bias)
        return linear(x, torch.from_numpy(weight), offset, narrow=narrow)

    inputs = _normed(state, weights.input_norm, facts.rms_eps)
    query = _head_normed(through(inputs, weights.q_proj, weights.q_bias), weights.q_norm, facts)
    key = _head_normed(through(inputs, weights.k_proj, weights.k_bias), weights.k_norm, facts)
    value = through(inputs, weights.v_proj, weights.v_bias)
    mixed = _attend(query, key, value, number, facts, lengths)
    added, mixed_scale = _added(through(mixed, weights.o_proj), weights.o_norm, facts)
    middle = state + added
    inputs = _normed(middle, weights.post_norm, facts.rms_eps)
    gate, up = through(inputs, weights.gate_proj), through(inputs, weights.up_proj)
    active = (F.gelu(gate, approximate="tanh") if facts.gelu else F.silu(gate)) * up
    added, active_scale = _added(through(active, weights.down_proj), weights.down_norm, facts)
    return LayerTrace(
        number,
        weights,
        before=state,
        query=query,
        key=key,
        value=value,
        mixed=mixed,
        mixed_scale=mixed_scale,
        middle=middle,
        gate=gate,
        up=up,
        active=active,
        active_scale=active_scale,
        after=middle + added,
    )


def _added(x: Tensor, gain: Floats | None, facts: LlamaFacts) -> tuple[Tensor, Tensor]:
    """What ``x [N, D]`` adds to the stream, and the scale ``[N, 1]`` that its norm has, if any."""
    if gain is None:
        return x, torch.ones(len(x), 1)
    scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + facts.rms_eps)
    return x * scale * torch.from_numpy(gain), scale


def _normed(x: Tensor, gain: Floats, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * torch.from_numpy(gain)


def _head_normed(x: Tensor, gain: Floats | None, facts: LlamaFacts) -> Tensor:
    """``x [N, heads · W]`` with each head normalized on its own, where the teacher does that."""
    if gain is None:
        return x
    return _normed(x.view(len(x), -1, facts.head_width), gain, facts.rms_eps).reshape(x.shape)


def _rotary(facts: LlamaFacts, layer: int, positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[positions, W / 2]`` of a layer's rotary embedding (Su et al. 2021)."""
    angles = torch.arange(positions)[:, None] * torch.from_numpy(facts.frequencies(layer))
    return angles.cos() * facts.rotary_scale, angles.sin() * facts.rotary_scale


def _attend(
    query: Tensor, key: Tensor, value: Tensor, layer: int, facts: LlamaFacts, lengths: Sequence[int]
) -> Tensor:
    """Causal attention within each sequence: ``[N, H·W]`` from query, key and value."""
    split: Callable[[Tensor], Tensor] = lambda x: x.view(len(x), -1, width).transpose(0, 1)  # noqa: E731
    width, window = facts.head_width, facts.window_of(layer)
    rotary = _rotary(facts, layer, max(lengths))
    mixed, start = torch.empty_like(query), 0
    for length in lengths:
        rows = slice(start, start + length)
        start += length
        heads = _mixed_heads(
            _turned(split(query[rows]), rotary),
            _turned(split(key[rows]), rotary),
            split(value[rows]),
            length if window is None else window,
            facts,
        )
        mixed[rows] = heads.transpose(0, 1).reshape(length, -1)
    return mixed


def _mixed_heads(
    query: Tensor, key: Tensor, value: Tensor, window: int, facts: LlamaFacts
) -> Tensor:
    """One sequence's ``query [H, T, W]`` attends to the latest ``window`` of key and value."""
    scale, cap = 1.0 / math.sqrt(facts.query_width), facts.caps[0]
    if not cap and window >= query.shape[1]:
        return F.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, enable_gqa=True, scale=scale
        )[0]
    key, value = (part.repeat_interleave(len(query) // len(part), 0) for part in (key, value))
    scores = _capped(query @ key.mT * scale, cap)
    seen = torch.ones_like(scores[0], dtype=torch.bool).tril().triu(1 - window)
    return scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ value


def _capped(x: Tensor, cap: float) -> Tensor:
    """``x``, softly bounded by ``cap`` where that is not 0."""
    return cap * torch.tanh(x / cap) if cap else x


def _turned(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs (i, i + W/2) of ``x [heads, T, W]`` by the angles of positions 0 to T − 1."""
    cos, sin = (table[: x.shape[1]] for table in rotary)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
