"""Statistics that tell a healthy weight tensor from a broken one.

Letters: R rows, C columns, N = min(R, C) singular values σ of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from numerics.precision import float64
from stability.measures.spectrum import (
    TailFit,
    effective_rank,
    fast_singular_values,
    heavy_tail_exponent,
    singular_values,
    stable_rank,
)

# The decomposition of a matrix with a longer smaller side, or of more values, takes minutes.
EXACT_SIDE, EXACT_CELLS = 2048, 1 << 24
PLOT_POINTS = 64  # per spectrum
BLOCK_VALUES = 1 << 22  # read at a time: 32 MiB in float64

EXACT, GRAM = "exact", "gram"
NOT_A_MATRIX, NOT_FINITE, EMPTY = "not a matrix", "not finite", "empty"


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a matrix, largest first.

    ``route``: ``exact`` (``singular_values``) or ``gram`` (``fast_singular_values``).
    ``spectral_norm``: the largest value; ``full_rank``: N. ``tail``: see ``heavy_tail_exponent``.
    ``ranks`` (from 1) and ``values``: at most ``PLOT_POINTS``, evenly spaced in log(rank).
    """

    route: str
    full_rank: int
    spectral_norm: float
    effective_rank: float
    stable_rank: float
    tail: TailFit | None
    ranks: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def rank_share(self) -> float:
        return self.effective_rank / self.full_rank


@dataclass(frozen=True)
class WeightStats:
    """Statistics of one tensor; ``norm``, ``spread`` and ``largest`` cover its finite values.

    ``norm``: Euclidean; ``spread``: standard deviation; ``largest``: magnitude. ``zero_share``:
    share of exact zeros. ``dead_rows``, ``dead_columns``: all zero; None unless a matrix.
    ``no_spectrum``: the reason, if there is none.
    """

    name: str
    shape: tuple[int, ...]
    count: int
    norm: float
    spread: float
    largest: float
    not_finite: int
    zero_share: float
    dead_rows: int | None
    dead_columns: int | None
    spectrum: Spectrum | None
    no_spectrum: str = ""


@torch.no_grad()
def weigh(name: str, tensor: Tensor, *, exact_side: int = EXACT_SIDE) -> WeightStats:
    """Statistics of one tensor of any shape, on its device, block by block in float64.

    The spectrum of a matrix with both sides above ``exact_side``, or of more than ``EXACT_CELLS``
    values, comes from its Gram matrix in float32.
    """
    sums, dead_rows, live_columns = _sums(tensor)
    finite = max(1, tensor.numel() - int(sums["not_finite"]))
    mean = sums["total"] / finite
    reasons = {
        EMPTY: tensor.numel() == 0,
        NOT_A_MATRIX: tensor.dim() != 2,
        NOT_FINITE: sums["not_finite"],
    }
    no_spectrum = next((reason for reason, holds in reasons.items() if holds), "")
    return WeightStats(
        name=name,
        shape=tuple(tensor.shape),
        count=tensor.numel(),
        norm=sums["squares"] ** 0.5,
        spread=max(0.0, sums["squares"] / finite - mean**2) ** 0.5,
        largest=sums["largest"],
        not_finite=int(sums["not_finite"]),
        zero_share=sums["zeros"] / max(1, tensor.numel()),
        dead_rows=dead_rows,
        dead_columns=None if live_columns is None else int((~live_columns).sum()),
        spectrum=None if no_spectrum else _spectrum(tensor, exact_side),
        no_spectrum=no_spectrum,
    )


def _sums(tensor: Tensor) -> tuple[dict[str, float], int | None, Tensor | None]:
    """Sums over all values; of a matrix also dead rows and which columns ``[C]`` are alive."""
    sums = dict.fromkeys(("total", "squares", "largest", "not_finite", "zeros"), 0.0)
    matrix = tensor.dim() == 2
    rows = tensor.detach() if matrix else tensor.detach().reshape(1, -1)
    live_columns = torch.zeros(rows.shape[1], dtype=torch.bool, device=rows.device)
    width = min(max(1, rows.shape[1]), BLOCK_VALUES)
    height = max(1, BLOCK_VALUES // width)
    for start in range(0, rows.shape[1], width):
        for block in rows[:, start : start + width].split(height):
            _add(sums, float64(block))
            live_columns[start : start + width] |= (block != 0).any(dim=0)
    if not matrix:
        return sums, None, None
    dead_rows = sum(int((~(block != 0).any(dim=1)).sum()) for block in rows.split(height))
    return sums, dead_rows, live_columns


def _add(sums: dict[str, float], block: Tensor) -> None:
    """Add a block to the sums; values that are not finite are only counted."""
    finite = block.isfinite()
    bad = int((~finite).sum())
    if bad:
        block = torch.where(finite, block, 1.0)  # not a zero; subtracted again below
    sums["not_finite"] += bad
    sums["zeros"] += int((block == 0).sum())
    sums["total"] += float(block.sum()) - bad
    sums["squares"] += float(block.square().sum()) - bad
    if bad < block.numel():
        sums["largest"] = max(sums["largest"], float(torch.where(finite, block, 0.0).abs().max()))


def _spectrum(matrix: Tensor, exact_side: int) -> Spectrum:
    exact = min(matrix.shape) <= exact_side and matrix.numel() <= EXACT_CELLS
    values = singular_values(matrix) if exact else fast_singular_values(matrix)
    indices = plot_indices(len(values))
    return Spectrum(
        route=EXACT if exact else GRAM,
        full_rank=len(values),
        spectral_norm=float(values[0]),
        effective_rank=float(effective_rank(values)),
        stable_rank=float(stable_rank(values)),
        tail=heavy_tail_exponent(values),
        ranks=tuple(index + 1 for index in indices),
        values=tuple(values[indices].tolist()),
    )


def plot_indices(number: int, limit: int = PLOT_POINTS) -> list[int]:
    """At most ``limit`` indices below ``number``, with both ends, evenly spaced in logarithms."""
    if number <= limit:
        return list(range(number))
    return sorted({round(number ** (step / (limit - 1))) - 1 for step in range(limit)})
