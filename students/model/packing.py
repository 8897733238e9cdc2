"""Attention within each of several sequences that lie one after another in one row.

All other work of a decoder is done token by token and needs no padding then. Letters: N tokens of
the row, S sequences, H heads, K key/value heads, W head width; b sequences of t tokens.
"""

from __future__ import annotations

from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stability.precision import full_precision

# Queries that a CPU computes together, for which no key behind them is looked at. Attention weights
# in float32 are kept for the backward pass up to a block, in bfloat16 up to more tokens; those of
# longer sequences are computed again.
BLOCK, KEPT_NARROW = 128, 512


class PackedRow:
    """Where the sequences of a row lie; ``groups``: (b, t) of neighbours of the same length, in
    order."""

    def __init__(self, lengths: Tensor) -> None:
        """``lengths [S]``: of the sequences, in order, in main memory."""
        self.lengths = lengths.tolist()
        self.groups = [(len(list(same)), length) for length, same in groupby(self.lengths)]

    def positions(self) -> Tensor:
        """``[1, N]``, of each token in its own sequence."""
        return torch.cat([torch.arange(length) for length in self.lengths])[None]


@cache
def has_bfloat16_products() -> bool:
    """Whether the processor has products of bfloat16 in its instructions (AMX, AVX-512): attention
    by them takes a half to a quarter of the time of float32 (docs/benchmarks.md)."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


@torch.compiler.disable
def attend_packed(query: Tensor, key: Tensor, value: Tensor, row: PackedRow) -> Tensor:
    """Causal attention of ``[1, H, N, W]`` over ``[1, K, N, W]``, within each sequence of ``row``.

    On a CPU in float32, whatever the inputs, unless it has products of bfloat16.
    """
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))  # [N, heads, W]
    attend = _attend_in_turn if query.device.type == "cpu" else attend_side_by_side
    mixed = attend(q, k, v, row)
    return mixed.to(query.dtype).transpose(0, 1)[None]


def attend_side_by_side(query: Tensor, key: Tensor, value: Tensor, row: PackedRow) -> Tensor:
    """All sequences padded to the longest for one call of PyTorch's kernel, which a GPU does in
    less time than several: ``[N, H, W]`` over ``[N, K, W]``."""
    q, k, v = (
        nn.utils.rnn.pad_sequence(part.split(row.lengths), batch_first=True).transpose(1, 2)
        for part in (query, key, value)
    )
    grouped = query.shape[1] != key.shape[1]
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    rows = zip(mixed.transpose(1, 2).unbind(), row.lengths, strict=True)
    return torch.cat([one[:length] for one, length in rows])


def _attend_in_turn(query: Tensor, key: Tensor, value: Tensor, row: PackedRow) -> Tensor:
    """The same, sequences of one length at a time."""
    sizes = [count * length for count, length in row.groups]
    inputs = (part if has_bfloat16_products() else part.float() for part in (query, key, value))
    parts = zip(*(part.split(sizes) for part in inputs), strict=True)
    mixed = []
    with full_precision(query):
        for (count, _), some in zip(row.groups, parts, strict=True):
            together = (part.unflatten(0, (count, -1)).transpose(1, 2) for part in some)
            mixed.append(BlockAttention.apply(*together).transpose(1, 2).flatten(0, 1))
    return torch.cat(mixed)


class BlockAttention(torch.autograd.Function):
    """Causal attention of ``[b, H, t, W]`` over ``[b, K, t, W]`` by plain products, a block of
    queries at a time; fewer passes over the weights than PyTorch's for a CPU.

    Products and what passes between them are of the inputs' type, which the softmax widens inside.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = key.flatten(0, 1), value.flatten(0, 1)  # [b K, t, W]
        scaled = query * query.shape[-1] ** -0.5
        queries = scaled.unflatten(1, (key.shape[1], -1)).flatten(0, 1)  # [b K, H / K, t, W]
        mixed, kept = torch.empty_like(queries), []
        for span in _blocks(query):
            weights = _weights(queries, keys, span)
            mixed[:, :, span] = (weights @ values[:, : span.stop]).view_as(queries[:, :, span])
            if span.stop <= (BLOCK if query.dtype == torch.float32 else KEPT_NARROW):
                kept.append(weights)
        ctx.save_for_backward(queries, keys, values, *kept)
        ctx.shape = query.shape
        return mixed.view_as(query)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, values, *kept = ctx.saved_tensors
        scale, count = queries.shape[-1] ** -0.5, ctx.shape[0]
        grads = grad.reshape(queries.shape)
        of_query = torch.empty_like(queries)
        wide = torch.promote_types(grad.dtype, torch.float32)
        of_key, of_value = (torch.zeros_like(part, dtype=wide) for part in (keys, values))
        for number, span in enumerate(_blocks(queries)):
            weights = kept[number] if number < len(kept) else _weights(queries, keys, span)
            block, some = (part[:, :, span].flatten(1, 2) for part in (grads, queries))
            change = block @ values[:, : span.stop].mT
            change = torch._softmax_backward_data(change, weights, -1, change.dtype)
            _add_product_(of_value[:, : span.stop], weights.mT, block)
            _add_product_(of_key[:, : span.stop], change.mT, some)
            of_query[:, :, span] = (change @ keys[:, : span.stop]).view_as(of_query[:, :, span])
        heads = (part.unflatten(0, (count, -1)).to(grad.dtype) for part in (of_key, of_value))
        return of_query.mul_(scale).view(ctx.shape), *heads


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to ``total``, which may be of a wider type."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total += left @ right


def _blocks(queries: Tensor) -> list[slice]:
    tokens = queries.shape[-2]
    return [slice(at, min(at + BLOCK, tokens)) for at in range(0, tokens, BLOCK)]


def _weights(queries: Tensor, keys: Tensor, span: slice) -> Tensor:
    """How much a block's scaled queries look at the keys up to its end, ``[b K, H / K · n,
    end]``."""
    size = span.stop - span.start
    block, seen = queries[:, :, span].flatten(1, 2), keys[:, : span.stop]
    scores = block @ seen.mT
    last = scores.unflatten(1, (-1, size))[..., span.start :]  # of the block's own keys
    last += torch.full((size, size), -torch.inf, dtype=scores.dtype).triu(1)
    return torch.softmax(scores, -1)
