"""From a number of parameters to the width and depth of a student.

Parameters are those of the exported file, without the folded gates. Letters: D width, L layers,
V vocabulary, H heads, K key/value heads, W head width, F feed-forward width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from students.model.shape import GROUP, MAX_LAYERS, MAX_WIDTH, PARAMETERS_PER_BLOCK, StudentSize

if TYPE_CHECKING:
    from students.model.config import SO8TConfig

TOLERANCE = 0.05  # of the requested number, within which proportions count


def layer_parameters(config: SO8TConfig, *, gates: bool = False) -> int:
    """Parameters of one layer: 2·D·W·(H + K) + 3·D·F + 2·D; with ``gates`` 2·28·H·W/8 more."""
    width, heads = config.hidden_size, config.num_attention_heads + config.num_key_value_heads
    matrices = 2 * heads * config.head_dim + 3 * config.intermediate_size
    return width * (matrices + 2) + (2 * PARAMETERS_PER_BLOCK * config.num_blocks if gates else 0)


def decoder_parameters(config: SO8TConfig, *, gates: bool = False) -> int:
    """Parameters of an exported decoder: V·D (twice where untied), L layers, D for the last norm.

    With ``gates``: as it is trained.
    """
    tables = 1 if config.tie_word_embeddings else 2
    outer = config.hidden_size * (tables * config.vocab_size + 1)
    return outer + config.num_hidden_layers * layer_parameters(config, gates=gates)


@dataclass(frozen=True)
class Candidate:
    """A possible size and its parameters."""

    size: StudentSize
    parameters: int


def choose_size(
    wanted: int,
    teacher: StudentSize,
    shape: Callable[[StudentSize], SO8TConfig],
) -> StudentSize:
    """The student with ``wanted`` parameters whose proportions are most like its teacher's.

    Candidates are all widths (multiples of 8, from 128 on of 64, from 512 on of 256) and depths up
    to the teacher's, and the teacher's width. Of those within 5 % of ``wanted``, the one wins whose
    width per layer is nearest to the teacher's, as a ratio; without any, the nearest to ``wanted``.
    Only where all are too small is the student wider than its teacher, never deeper. ``shape``
    gives a size's settings; sizes it refuses with a ``ValueError`` are skipped.

    Raises:
        ValueError: every student is larger than ``wanted``; says which is the smallest. Or
            ``shape`` refuses every size; its reason for the teacher's width.
    """
    limit, layers = min(max(teacher.width, GROUP), MAX_WIDTH), min(teacher.layers, MAX_LAYERS)
    widths = _widths(limit)
    if limit % GROUP == 0 and limit not in widths:
        widths.append(limit)
    candidates = _candidates(widths, layers, shape)
    if not candidates or max(one.parameters for one in candidates) < wanted * (1 - TOLERANCE):
        wider = [width for width in _widths(MAX_WIDTH) if width > limit]
        candidates += _candidates(wider, layers, shape)
    if not candidates:
        shape(StudentSize(widths[-1], 1))  # raises the reason
    smallest = min(candidates, key=lambda one: one.parameters)
    if smallest.parameters > wanted * (1 + TOLERANCE):
        raise ValueError(
            f"no student is as small as {wanted:,} parameters: the smallest with this vocabulary "
            f"is {smallest.size} with {smallest.parameters:,}"
        )
    aspect = teacher.width / teacher.layers

    def unlikeness(one: Candidate) -> float:
        return abs(math.log(one.size.width / one.size.layers / aspect))

    def distance(one: Candidate) -> float:
        return abs(math.log(one.parameters / wanted))

    near = [one for one in candidates if abs(one.parameters / wanted - 1) <= TOLERANCE]
    if near:
        return min(near, key=lambda one: (unlikeness(one), distance(one))).size
    return min(candidates, key=lambda one: (distance(one), unlikeness(one))).size


def _widths(limit: int) -> list[int]:
    return [
        *range(GROUP, min(limit, 127) + 1, GROUP),
        *range(128, min(limit, 511) + 1, 64),
        *range(512, limit + 1, 256),
    ]


def _candidates(
    widths: list[int], layers: int, shape: Callable[[StudentSize], SO8TConfig]
) -> list[Candidate]:
    """Every size of these widths with at most ``layers`` layers."""
    candidates = []
    for width in widths:
        try:
            config = shape(StudentSize(width, 1))
        except ValueError:  # heads that the user chose and this width cannot have
            continue
        first, each = decoder_parameters(config), layer_parameters(config)
        candidates += [
            Candidate(StudentSize(width, number + 1), first + number * each)
            for number in range(layers)
        ]
    return candidates
