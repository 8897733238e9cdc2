"""What of a teacher's layers a smaller student keeps: directions, layers, heads and feed-forward
units.

Letters: N tokens, D the teacher's width, S the student's, H query heads, K key/value heads, W head
width, F feed-forward units; the teacher's where nothing else is said.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from distill.initialization.ridge import moments
from students.model.config import SO8TConfig

Floats = NDArray[np.float32]


class TeacherWeights(Protocol):
    """The weights of one layer of a Llama, rows are outputs, rotary pairs half-split."""

    @property
    def input_norm(self) -> Floats: ...
    @property
    def q_proj(self) -> Floats: ...
    @property
    def k_proj(self) -> Floats: ...
    @property
    def v_proj(self) -> Floats: ...
    @property
    def o_proj(self) -> Floats: ...
    @property
    def post_norm(self) -> Floats: ...
    @property
    def gate_proj(self) -> Floats: ...
    @property
    def up_proj(self) -> Floats: ...
    @property
    def down_proj(self) -> Floats: ...
    @property
    def q_norm(self) -> Floats | None: ...
    @property
    def k_norm(self) -> Floats | None: ...


class TeacherLayer(Protocol):
    """What a layer of the teacher computes: see ``Parts``, which is cut out of it.

    ``before``, ``middle`` ``[N, D]``; ``query``, ``mixed [N, H·W]``; ``key``, ``value [N, K·W]``;
    ``gate``, ``up [N, F]``.
    """

    @property
    def weights(self) -> TeacherWeights: ...
    @property
    def before(self) -> Tensor: ...
    @property
    def middle(self) -> Tensor: ...
    @property
    def query(self) -> Tensor: ...
    @property
    def key(self) -> Tensor: ...
    @property
    def value(self) -> Tensor: ...
    @property
    def mixed(self) -> Tensor: ...
    @property
    def gate(self) -> Tensor: ...
    @property
    def up(self) -> Tensor: ...


def root_mean_square(x: Tensor, eps: float = 0.0) -> Tensor:
    """Of the last dimension, which stays with length 1."""
    return (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()


# -- the residual stream -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """Between the residual streams: the student's state is the teacher's times ``read [D, S]``, and
    ``lift [D, S]`` times the student's is what is known of the teacher's."""

    read: Tensor
    lift: Tensor

    @property
    def narrows(self) -> bool:
        """Whether the student's stream has fewer directions than the teacher's."""
        return self.read.shape[1] < self.read.shape[0]


def stream_moment(states: Tensor, scale: Tensor) -> Tensor:
    """Uncentred second moment ``[D, D]`` of ``states [N, D]`` times ``scale [D]``, every token
    counting alike.

    Some tokens' states (the first one's above all) are hundreds of times as large as all others,
    and what follows only sees them normalised.
    """
    scaled = states * scale
    scaled = scaled / root_mean_square(scaled).clamp_min(1e-30)
    return moments(scaled, scaled) / len(states)


def whole_stream(width: int, student_width: int) -> Projection:
    """A student at least as wide as its teacher: the same coordinates, zeros in those that are
    new."""
    same = torch.eye(width, student_width)
    return Projection(same, same)


def principal_stream(moment: Tensor, scale: Tensor, student_width: int) -> Projection:
    """The directions that keep most of a stream with second moment ``moment [D, D]`` (of states
    times ``scale``).

    Each direction points to where its greatest entry is positive, so that equal teachers give equal
    students.
    """
    directions = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :student_width]
    greatest = directions.abs().argmax(dim=0, keepdim=True)
    kept = (directions * directions.gather(0, greatest).sign()).float()
    return Projection(kept * scale[:, None], kept / scale[:, None])


# -- layers --------------------------------------------------------------------------------------------------------


def layer_spans(layers: int, count: int) -> list[range]:
    """Divide a teacher's ``layers`` among ``count`` student layers, each of which starts from the
    first of its span.

    Spans are as equal as they can be, the longer ones spread evenly: one layer can stand for two,
    hardly for three (measured against choices by how much each layer changes the stream,
    docs/benchmarks.md). Student layers without a span (there are more than the teacher has) are not
    in the answer.
    """
    count = min(count, layers)
    ends = [-(-place * layers // count) for place in range(count + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(ends)]


# -- heads ---------------------------------------------------------------------------------------------------------


def rotary_places(theirs: Floats, ours: Floats) -> tuple[Tensor, Tensor]:
    """Which rotary pair of the teacher goes to which of the student, by their angles per position.

    ``theirs [W/2]`` and ``ours [W'/2]`` fall. Every pair of the side that has fewer gets the
    nearest on the other, in order and none twice. Returns the teacher's and the student's pairs, as
    many of both.
    """
    few, many = sorted((np.log(theirs), np.log(ours)), key=len)
    # Dynamic programming over (pairs placed, places used): cost of the best placement so far.
    best = np.full((len(few) + 1, len(many) + 1), np.inf)
    best[0] = 0.0
    for pair, place in itertools.product(range(len(few)), range(len(many))):
        taken = best[pair, place] + abs(few[pair] - many[place])
        best[pair + 1, place + 1] = min(best[pair + 1, place], taken)
    chosen, place = [], len(many)
    for pair in range(len(few), 0, -1):
        while best[pair, place - 1] == best[pair, place]:
            place -= 1
        place -= 1
        chosen.append(place)
    first, second = torch.arange(len(few)), torch.tensor(chosen[::-1])
    return (first, second) if len(theirs) <= len(ours) else (second, first)


@dataclass(frozen=True)
class HeadLayout:
    """How heads are cut: ``heads`` and ``kv_heads`` of the teacher, their width, and its rotary
    ``frequencies``.

    ``rotary_scale``: what the teacher multiplies cosine and sine by.
    """

    heads: int
    kv_heads: int
    width: int
    frequencies: Floats
    rotary_scale: float


@dataclass(frozen=True)
class Unit:
    """A key/value head of the teacher with some of its query heads: what one key/value head of
    the student holds."""

    kv_head: int
    heads: tuple[int, ...]


def choose_units(importance: Sequence[float], layout: HeadLayout, config: SO8TConfig) -> list[Unit]:
    """The most important groups of heads, as many as the student has key/value heads, in the
    teacher's order.

    A group with more query heads than the student's is divided, the most important first; its
    key/value head is then kept several times.
    """
    group, room = (
        layout.heads // layout.kv_heads,
        config.num_attention_heads // config.num_key_value_heads,
    )
    units = []
    for kv_head in range(layout.kv_heads):
        own = sorted(
            range(kv_head * group, (kv_head + 1) * group),
            key=lambda head: (-importance[head], head),
        )
        units += [
            Unit(kv_head, tuple(sorted(own[start : start + room])))
            for start in range(0, group, room)
        ]
    units.sort(key=lambda unit: (-sum(importance[head] for head in unit.heads), unit.heads))
    return sorted(units[: config.num_key_value_heads], key=lambda unit: unit.heads)


# -- one layer -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Some rows of one of the student's matrices: which ``rows [R]``, what they should answer,
    ``target [N, R]``, and the teacher's weights for them, ``weight [R, D]``, which read its
    normalised state times the gain.
    """

    rows: Tensor
    target: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Parts:
    """What a student layer takes over: inner parts, and the output matrices' columns for them,
    ``[D, R]``.

    ``before`` and ``middle [N, D]``: the teacher's residual stream at the layer's begin and after
    its attention. ``head_norms``: whether the teacher normalises query and key heads, which a
    constant has to stand for.
    """

    before: Tensor
    middle: Tensor
    input_norm: Tensor
    post_norm: Tensor
    query: Part
    key: Part
    value: Part
    output: Tensor
    gate: Part
    up: Part
    down: Tensor
    head_norms: bool


def cut_layer(layer: TeacherLayer, layout: HeadLayout, read: Tensor, config: SO8TConfig) -> Parts:
    """The heads and units of ``layer`` that write most into what the student sees of the
    residual stream."""
    weights, loudness = layer.weights, root_mean_square(layer.before).clamp_min(1e-30)
    output, down = torch.from_numpy(weights.o_proj), torch.from_numpy(weights.down_proj)
    importance = _head_energies(layer.mixed / loudness, output, read, layout)
    units = choose_units(importance.tolist(), layout, config)
    count = min(config.intermediate_size, len(weights.gate_proj))
    active = F.silu(layer.gate) * layer.up / loudness
    energies = active.square().mean(dim=0) * (read.T @ down).square().sum(dim=0)
    kept = energies.argsort(descending=True, stable=True)[:count].sort().values
    gate, up = (torch.from_numpy(part)[kept] for part in (weights.gate_proj, weights.up_proj))
    query, key = _rotary_parts(layer, layout, units, config)
    value, mixed = _value_part(layer, layout, units, output, config)
    rows = torch.arange(count)
    return Parts(
        before=layer.before,
        middle=layer.middle,
        input_norm=torch.from_numpy(weights.input_norm),
        post_norm=torch.from_numpy(weights.post_norm),
        query=query,
        key=key,
        value=value,
        output=mixed,
        gate=Part(rows, layer.gate[:, kept], gate),
        up=Part(rows, layer.up[:, kept], up),
        down=down[:, kept],
        head_norms=weights.q_norm is not None or weights.k_norm is not None,
    )


def _head_energies(mixed: Tensor, output: Tensor, read: Tensor, layout: HeadLayout) -> Tensor:
    """Mean square of what each head writes into the student's stream, ``[H]``."""
    heads = mixed.view(len(mixed), layout.heads, layout.width)
    written = (read.T @ output).view(-1, layout.heads, layout.width)
    grams = torch.einsum("nhw,nhv->hwv", heads, heads) / len(mixed)
    return torch.einsum("shw,hwv,shv->h", written, grams, written)


def _rotary_parts(
    layer: TeacherLayer, layout: HeadLayout, units: Sequence[Unit], config: SO8TConfig
) -> tuple[Part, Part]:
    """Queries and keys. Attention divides by √W and the teacher may scale its rotary embedding:
    both are put into the queries."""
    width = config.head_dim
    exponents = np.arange(0, width, 2, dtype=np.float64) / width
    theirs, ours = rotary_places(
        layout.frequencies, (config.rope_theta**-exponents).astype(np.float32)
    )
    theirs, ours = (
        torch.cat((theirs, theirs + layout.width // 2)),
        torch.cat((ours, ours + width // 2)),
    )
    room = config.num_attention_heads // config.num_key_value_heads
    heads = [head for unit in units for head in unit.heads]
    places = [
        place * room + number
        for place, unit in enumerate(units)
        for number in range(len(unit.heads))
    ]
    strength = (width / layout.width) ** 0.5 * layout.rotary_scale**2
    weights = layer.weights
    query = _rows(heads, layout.width, theirs), _rows(places, width, ours)
    key = (
        _rows([unit.kv_head for unit in units], layout.width, theirs),
        _rows(range(len(units)), width, ours),
    )
    gains = [
        torch.ones(layout.width) if gain is None else torch.from_numpy(gain)
        for gain in (weights.q_norm, weights.k_norm)
    ]
    found = []
    for (taken, rows), states, matrix, gain, factor in (
        (query, layer.query, weights.q_proj, gains[0], strength),
        (key, layer.key, weights.k_proj, gains[1], 1.0),
    ):
        scaled = torch.from_numpy(matrix)[taken] * (factor * gain[taken % layout.width])[:, None]
        found.append(Part(rows, states[:, taken] * factor, scaled))
    return found[0], found[1]


def _value_part(
    layer: TeacherLayer,
    layout: HeadLayout,
    units: Sequence[Unit],
    output: Tensor,
    config: SO8TConfig,
) -> tuple[Part, Tensor]:
    """Values, and the output matrix's columns for every query head; narrower heads keep the
    strongest directions."""
    matrix, width = torch.from_numpy(layer.weights.v_proj), min(config.head_dim, layout.width)
    targets, weights = [], []
    room = config.num_attention_heads // config.num_key_value_heads
    columns = torch.zeros(len(output), config.num_attention_heads, config.head_dim)
    for place, unit in enumerate(units):
        own = slice(unit.kv_head * layout.width, (unit.kv_head + 1) * layout.width)
        values = layer.value[:, own]
        basis = torch.eye(layout.width)
        if width < layout.width:
            basis = (
                torch.linalg.eigh(moments(values, values)).eigenvectors.flip(1)[:, :width].float()
            )
        targets.append(values @ basis)
        weights.append(basis.T @ matrix[own])
        for number, head in enumerate(unit.heads):
            theirs = output[:, head * layout.width : (head + 1) * layout.width]
            columns[:, place * room + number, :width] = theirs @ basis
    rows = _rows(range(len(units)), config.head_dim, torch.arange(width))
    return Part(rows, torch.cat(targets, dim=1), torch.cat(weights)), columns.flatten(1)


def _rows(heads: Sequence[int], width: int, within: Tensor) -> Tensor:
    """Row numbers of some dimensions ``within`` some ``heads`` of ``width``."""
    return (torch.tensor(list(heads))[:, None] * width + within).flatten()
