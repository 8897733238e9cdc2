"""Reductions of long rows of logits, a few rows at a time: faster than PyTorch's own.

Letters: N positions, V vocabulary, M nodes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from teachers.targets.recipe import NODES

LOGITS_TOGETHER = 1 << 18  # read together: 1 MB, which stays in a core's own cache


def logsumexp(values: Tensor, spare: Tensor | None = None) -> Tensor:
    """``values.logsumexp(-1)`` with the faster exponential (see ``tail_sums``)."""
    top = values.amax(dim=-1, keepdim=True)
    relative = torch.sub(values, top, out=spare).mul_(1.0 / math.log(2.0))
    return relative.exp2_().sum(dim=-1).log() + top[..., 0]


def tail_sums(logits: Tensor, origin: Tensor, ids: Tensor) -> Tensor:
    """Σ exp((z_v − origin) · node) over all tokens but ``ids``, at every node: ``[N, M]``.

    One exponential serves all nodes: exp(x/6) and its powers up to the sixth. A few rows at a time,
    so that everything stays in a core's own cache; base 2, by far PyTorch's faster exponential.
    """
    scale = NODES[0] / math.log(2.0)
    sums = logits.new_empty(len(logits), len(NODES))
    together = _rows_together(logits)
    space = logits.new_empty(3, min(together, len(logits)), logits.shape[-1])
    for start in range(0, len(logits), together):
        rows = slice(start, start + together)
        root, square, cube = space[:, : len(logits[rows])]
        torch.sub(logits[rows], origin[rows], out=root).mul_(scale).exp2_()
        root.scatter_(-1, ids[rows], 0.0)
        torch.mul(root, root, out=square)
        torch.mul(square, root, out=cube)
        torch.sum(root, dim=-1, out=sums[rows, 0])
        for column, (left, right) in enumerate(
            ((root, root), (square, root), (square, square), (square, cube), (cube, cube)), 1
        ):
            sums[rows, column] = torch.linalg.vecdot(left, right)
    return sums


def topk(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``torch.topk(logits, count)`` of ``[N, V]``, about twice as fast for long rows.

    Divided into columns c, c + B, c + 2B, …, the ``count`` greatest of a row lie in the ``count``
    columns with the greatest maxima (or in the rest that fills no column); only those are searched.
    """
    size = logits.shape[-1]
    columns = math.isqrt(size * count)  # as many maxima to choose from as there will be candidates
    depth = size // max(1, columns)
    if depth < 2 or columns <= count or logits.device.type != "cpu":
        values, ids = torch.topk(logits, count, dim=-1)
        return values, ids
    steps = torch.arange(depth, device=logits.device) * columns
    rest = torch.arange(depth * columns, size, device=logits.device)
    parts = []
    together = _rows_together(logits)
    for start in range(0, len(logits), together):
        rows = logits[start : start + together]
        maxima = rows[:, : depth * columns].view(len(rows), depth, columns).amax(dim=1)
        chosen = torch.topk(maxima, count, dim=-1, sorted=False).indices
        ids = (chosen[:, :, None] + steps).flatten(1)
        ids = torch.cat((ids, rest.expand(len(rows), -1)), dim=-1)
        values, order = torch.topk(rows.gather(-1, ids), count, dim=-1)
        parts.append((values, ids.gather(-1, order)))
    if not parts:
        return logits.new_empty(0, count), logits.new_empty(0, count, dtype=torch.int64)
    return torch.cat([values for values, _ in parts]), torch.cat([ids for _, ids in parts])


def _rows_together(logits: Tensor) -> int:
    """How many rows of ``[N, V]`` to work on together: on a GPU, which has room for them, all."""
    few = LOGITS_TOGETHER // logits.shape[-1] if logits.device.type == "cpu" else len(logits)
    return max(1, few)


def lagrange(points: tuple[float, ...], at: float) -> list[float]:
    """Weights of the values at ``points`` in the polynomial through them, evaluated at ``at``."""
    return [
        float(np.prod([(at - other) / (point - other) for other in points if other != point]))
        for point in points
    ]
