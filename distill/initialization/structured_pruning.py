"""What a smaller student keeps of a teacher: directions, layers, heads and feed-forward units.

Letters: N tokens, D the teacher's width, S the student's, H query heads, K key/value heads, W head
width, F feed-forward units; the teacher's unless stated otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill.initialization.ridge import moments
from distill.initialization.teacher_trace import LayerTrace
from students.model.config import SO8TConfig
from teachers.base import Floats
from teachers.gguf.llama_weights import LlamaFacts

CLEARLY_LESS = 0.65
GELU_SLOPE = 1.702  # silu(1.702 x) / 1.702 is GELU to 0.02 (Hendrycks & Gimpel 2016)


def root_mean_square(x: Tensor, eps: float = 0.0) -> Tensor:
    """Of the last dimension, which stays with length 1."""
    return (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()


# -- the residual stream --------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """Between the residual streams.

    The student's state is the teacher's times ``down [D, S]``; ``up [D, S]`` times the student's
    state approximates the teacher's. ``signs [S]``: −1 for the directions that the teacher's final
    gain turns round, else 1.
    """

    down: Tensor
    up: Tensor
    signs: Tensor

    @property
    def narrows(self) -> bool:
        """Whether the student's stream has fewer directions than the teacher's."""
        return self.down.shape[1] < self.down.shape[0]


def stream_moment(states: Tensor, scale: Tensor) -> Tensor:
    """Uncentered second moment ``[D, D]`` of ``states [N, D]`` times ``scale [D]``.

    All tokens have equal weight: some states (the first token's above all) are hundreds of times as
    large as others, but the layers see them normalized.
    """
    scaled = states * scale
    scaled = scaled / root_mean_square(scaled).clamp_min(1e-30)
    return moments(scaled, scaled) / len(states)


def identity_projection(width: int, student_width: int) -> Projection:
    """For a student at least as wide as its teacher: new coordinates are zero."""
    same = torch.eye(width, student_width)
    return Projection(same, same, torch.ones(student_width))


def principal_projection(
    moment: Tensor, scale: Tensor, signs: Tensor, student_width: int
) -> Projection:
    """The directions that keep most of a stream with ``moment [D, D]`` (of states times ``scale``).

    No direction mixes coordinates of different ``signs [D]``: a gain can turn a whole direction
    round, not a part of one. Each direction's greatest entry is positive, so that equal teachers
    give equal students.
    """
    energies, parts = list[Tensor](), list[Tensor]()
    for sign in (1.0, -1.0):
        own = (signs == sign).nonzero()[:, 0]
        found = torch.linalg.eigh(moment[own][:, own])
        energies.append(found.eigenvalues)
        parts.append(torch.zeros(len(signs), len(own), dtype=moment.dtype))
        parts[-1][own] = found.eigenvectors
    order = torch.cat(energies).argsort(descending=True, stable=True)[:student_width]
    directions = torch.cat(parts, dim=1)[:, order]
    greatest = directions.abs().argmax(dim=0, keepdim=True)
    kept = (directions * directions.gather(0, greatest).sign()).float()
    return Projection(kept * scale[:, None], kept / scale[:, None], signs[greatest[0]])


# -- layers ---------------------------------------------------------------------------------------


def layer_spans(layers: int, count: int) -> list[range]:
    """Divide a teacher's ``layers`` among ``count`` student layers as equally as possible, the
    longer spans spread evenly; at most as many spans as teacher layers."""
    count = min(count, layers)
    ends = [-(-number * layers // count) for number in range(count + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(ends)]


def relative_changes(states: Sequence[Tensor]) -> Tensor:
    """How much a teacher's layers change its residual stream, ``[L + 1, L + 1]``.

    ``states``: L + 1 of ``[N, D]``, before the first layer and after each. Entry ``i, j`` is the
    median over tokens of ‖x_j − x_i‖² / ‖x_j‖² for i < j, else 0; a mean would be that of the first
    token, whose state is hundreds of times as large.
    """
    changes = torch.zeros(len(states), len(states), dtype=torch.float64)
    for before, after in itertools.combinations(range(len(states)), 2):
        change = (states[after] - states[before]).square().sum(dim=1)
        whole = states[after].square().sum(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        changes[before, after] = (change / whole).median()
    return changes


def chosen_spans(changes: Tensor, count: int) -> list[range]:
    """Divide a teacher's layers among ``count`` student layers, each initialized from the first of
    its span, so that the layers that are dropped change the stream least.

    ``changes [L + 1, L + 1]``: see ``relative_changes``. Σ changes[start + 1, stop] over spans is
    the least of all divisions whose spans are at most one layer longer than equal ones, as one
    layer can stand for few. The equal ones stay unless that is at most ``CLEARLY_LESS`` of theirs:
    small differences say nothing (docs/benchmarks.md).
    """
    layers = len(changes) - 1
    equal = layer_spans(layers, count)
    longest = max(map(len, equal)) + 1
    best: dict[int, tuple[float, list[range]]] = {0: (0.0, [])}  # by where the last span ends
    for _ in equal:
        found: dict[int, tuple[float, list[range]]] = {}
        for start, (total, spans) in best.items():
            for stop in range(start + 1, min(start + longest, layers) + 1):
                cost = total + float(changes[start + 1, stop])
                if stop not in found or cost < found[stop][0]:
                    found[stop] = cost, [*spans, range(start, stop)]
        best = found
    cost, spans = best[layers]
    theirs = sum(float(changes[span.start + 1, span.stop]) for span in equal)
    return spans if cost <= CLEARLY_LESS * theirs else equal


# -- heads ----------------------------------------------------------------------------------------


def match_rotary_pairs(theirs: Floats, ours: Floats) -> tuple[Tensor, Tensor]:
    """Match rotary pairs of the teacher and the student by their angles per position.

    ``theirs [W/2]`` and ``ours [W'/2]`` decrease. Every pair of the shorter one gets the nearest of
    the other, in order and none twice. Returns the teacher's and the student's indices.
    """
    few, many = sorted((np.log(theirs), np.log(ours)), key=len)
    # Dynamic programming over (pairs matched, partners considered): cost of the best matching.
    best = np.full((len(few) + 1, len(many) + 1), np.inf)
    best[0] = 0.0
    for pair, partner in itertools.product(range(len(few)), range(len(many))):
        taken = best[pair, partner] + abs(few[pair] - many[partner])
        best[pair + 1, partner + 1] = min(best[pair + 1, partner], taken)
    chosen, partner = [], len(many)
    for pair in range(len(few), 0, -1):
        while best[pair, partner - 1] == best[pair, partner]:
            partner -= 1
        partner -= 1
        chosen.append(partner)
    first, second = torch.arange(len(few)), torch.tensor(chosen[::-1])
    return (first, second) if len(theirs) <= len(ours) else (second, first)


@dataclass(frozen=True)
class HeadGroup:
    """A key/value head of the teacher and the query heads kept with it: one of the student's."""

    kv_head: int
    heads: tuple[int, ...]


def choose_head_groups(
    importance: Sequence[float], kv_heads: int, config: SO8TConfig
) -> list[HeadGroup]:
    """The most important groups of heads, one per key/value head of the student, in order.

    ``importance [H]``; ``kv_heads``: the teacher's K. A group with more query heads than the
    student's is divided, the most important first; its key/value head is then kept several times.
    """
    size, kept = len(importance) // kv_heads, query_heads_per_group(config)
    groups = []
    for kv_head in range(kv_heads):
        own = sorted(
            range(kv_head * size, (kv_head + 1) * size),
            key=lambda head: (-importance[head], head),
        )
        groups += [
            HeadGroup(kv_head, tuple(sorted(own[start : start + kept])))
            for start in range(0, size, kept)
        ]
    groups.sort(key=lambda group: (-sum(importance[head] for head in group.heads), group.heads))
    return sorted(groups[: config.num_key_value_heads], key=lambda group: group.heads)


def query_heads_per_group(config: SO8TConfig) -> int:
    """Query heads that share one key/value head of the student."""
    return config.num_attention_heads // config.num_key_value_heads


# -- one layer ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TargetRows:
    """Some rows of one of the student's matrices.

    ``rows [R]``: their indices; ``target [N, R]``: their desired outputs; ``weight [R, D]``: the
    teacher's weights for them, whose input is its normalized state times the gain.
    """

    rows: Tensor
    target: Tensor
    weight: Tensor


@dataclass(frozen=True)
class PrunedLayer:
    """What a student layer keeps: inner rows, and their columns ``[D, R]`` of output matrices.

    ``before`` and ``middle [N, D]``: the teacher's residual stream before the layer and after its
    attention. ``head_norms``: whether the teacher normalizes query and key heads, which a constant
    factor has to replace.
    """

    before: Tensor
    middle: Tensor
    input_norm: Tensor
    post_norm: Tensor
    query: TargetRows
    key: TargetRows
    value: TargetRows
    output: Tensor
    gate: TargetRows
    up: TargetRows
    down: Tensor
    head_norms: bool


def prune_layer(
    layer: LayerTrace, facts: LlamaFacts, projection: Projection, config: SO8TConfig
) -> PrunedLayer:
    """The heads and units of ``layer`` that write most into the student's residual stream."""
    weights, rms = layer.weights, root_mean_square(layer.before).clamp_min(1e-30)
    output = _with_gain(weights.o_proj, weights.o_norm)
    down = _with_gain(weights.down_proj, weights.down_norm)
    written = (projection.down.T @ output).view(-1, facts.heads, facts.head_width)
    mixed = layer.mixed * layer.mixed_scale / rms
    importance = _head_energies(mixed.view(-1, *written.shape[1:]), written)
    groups = choose_head_groups(importance.tolist(), facts.kv_heads, config)
    count = min(config.intermediate_size, len(weights.gate_proj))
    active = layer.active * layer.active_scale / rms
    energies = active.square().mean(dim=0) * (projection.down.T @ down).square().sum(dim=0)
    kept = energies.argsort(descending=True, stable=True)[:count].sort().values
    gate, up = (torch.from_numpy(matrix)[kept] for matrix in (weights.gate_proj, weights.up_proj))
    query, key = _rotary_rows(layer, facts, groups, config)
    value, columns = _value_rows(layer, output, facts, groups, config)
    rows, slope = torch.arange(count), GELU_SLOPE if facts.gelu else 1.0
    if weights.o_norm is not None:
        columns *= _usual(layer.mixed_scale, (layer.middle - layer.before) / rms)
    if weights.down_norm is not None:
        down = down * _usual(layer.active_scale, (layer.after - layer.middle) / rms)
    return PrunedLayer(
        before=layer.before,
        middle=layer.middle,
        input_norm=torch.from_numpy(weights.input_norm),
        post_norm=torch.from_numpy(weights.post_norm),
        query=query,
        key=key,
        value=value,
        output=columns,
        gate=TargetRows(rows, layer.gate[:, kept] * slope, gate * slope),
        up=TargetRows(rows, layer.up[:, kept], up),
        down=down[:, kept] / slope,
        head_norms=weights.q_norm is not None or weights.k_norm is not None,
    )


def _with_gain(matrix: Floats, gain: Floats | None) -> Tensor:
    """An output matrix ``[D, I]``, times the gain ``[D]`` of the norm that follows it, if any."""
    weight = torch.from_numpy(matrix)
    return weight if gain is None else weight * torch.from_numpy(gain)[:, None]


def _usual(scale: Tensor, added: Tensor) -> Tensor:
    """The one factor that replaces a norm's ``scale [N, 1]`` best, by least squares of ``added``.

    ``added [N, D]``: what the norm gives, so ``added / scale`` is its input.
    """
    energy = added.square().sum(dim=-1, keepdim=True)
    return (energy / scale).sum() / (energy / scale.square()).sum().clamp_min(1e-30)


def _head_energies(heads: Tensor, written: Tensor) -> Tensor:
    """Mean square of what each head adds to the student's stream, ``[H]``.

    From their outputs ``[N, H, W]`` and the output matrix into that stream, ``[S, H, W]``.
    """
    grams = torch.einsum("nhw,nhv->hwv", heads, heads) / len(heads)
    return torch.einsum("shw,hwv,shv->h", written, grams, written)


def _rotary_rows(
    layer: LayerTrace, facts: LlamaFacts, groups: Sequence[HeadGroup], config: SO8TConfig
) -> tuple[TargetRows, TargetRows]:
    """Queries and keys.

    The queries absorb what attention divides by, and the scale of the rotary embedding.
    """
    width = config.head_dim
    exponents = np.arange(0, width, 2, dtype=np.float64) / width
    theirs, ours = match_rotary_pairs(
        facts.frequencies(layer.number), (config.rope_theta**-exponents).astype(np.float32)
    )
    theirs = torch.cat((theirs, theirs + facts.head_width // 2))
    ours = torch.cat((ours, ours + width // 2))

    def rows(
        heads: dict[int, int], states: Tensor, matrix: Floats, gain: Floats | None, factor: float
    ) -> TargetRows:
        """``heads``: the student's → the teacher's."""
        taken = _rows(list(heads.values()), facts.head_width, theirs)
        gains = torch.ones(facts.head_width) if gain is None else torch.from_numpy(gain)
        weight = torch.from_numpy(matrix)[taken]
        weight = weight * (factor * gains[taken % facts.head_width])[:, None]
        return TargetRows(_rows(list(heads), width, ours), states[:, taken] * factor, weight)

    room, weights = query_heads_per_group(config), layer.weights
    queries = {
        index * room + number: head
        for index, group in enumerate(groups)
        for number, head in enumerate(group.heads)
    }
    keys = {index: group.kv_head for index, group in enumerate(groups)}
    scale = (width / facts.query_width) ** 0.5 * facts.rotary_scale**2
    return (
        rows(queries, layer.query, weights.q_proj, weights.q_norm, scale),
        rows(keys, layer.key, weights.k_proj, weights.k_norm, 1.0),
    )


def _value_rows(
    layer: LayerTrace,
    output: Tensor,
    facts: LlamaFacts,
    groups: Sequence[HeadGroup],
    config: SO8TConfig,
) -> tuple[TargetRows, Tensor]:
    """Values, and every query head's columns ``[D, H'·W']`` of the ``output [D, H·W]`` matrix.

    Narrower heads keep the strongest directions.
    """
    matrix = torch.from_numpy(layer.weights.v_proj)
    whole, room = facts.head_width, query_heads_per_group(config)
    width = min(config.head_dim, whole)
    targets, weights = [], []
    columns = torch.zeros(len(output), config.num_attention_heads, config.head_dim)
    for index, group in enumerate(groups):
        own = slice(group.kv_head * whole, (group.kv_head + 1) * whole)
        values = layer.value[:, own]
        basis = torch.eye(whole)
        if width < whole:
            directions = torch.linalg.eigh(moments(values, values)).eigenvectors
            basis = directions.flip(1)[:, :width].float()
        targets.append(values @ basis)
        weights.append(basis.T @ matrix[own])
        for number, head in enumerate(group.heads):
            theirs = output[:, head * whole : (head + 1) * whole]
            columns[:, index * room + number, :width] = theirs @ basis
    rows = _rows(range(len(groups)), config.head_dim, torch.arange(width))
    return TargetRows(rows, torch.cat(targets, dim=1), torch.cat(weights)), columns.flatten(1)


def _rows(heads: Sequence[int], width: int, within: Tensor) -> Tensor:
    """Row indices of the dimensions ``within`` of ``heads`` of ``width``."""
    return (torch.tensor(list(heads))[:, None] * width + within).flatten()
