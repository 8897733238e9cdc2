"""A weight tensor by the figures that tell a healthy one from a broken one.

Letters: R rows, C columns, N = min(R, C) singular values σ of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from stability.measures.spectrum import (
    TailFit,
    effective_rank,
    fast_singular_values,
    heavy_tail_exponent,
    singular_values,
    stable_rank,
)

EXACT_SIDE = 2048  # a smaller side beyond that makes a full decomposition take minutes
EXACT_CELLS = 1 << 24  # and so does a matrix of more values, whatever its smaller side: 128 MiB in float64
PLOT_POINTS = 64  # of one spectrum at most
BLOCK_VALUES = 1 << 22  # looked at together: 32 MiB in float64

EXACT, GRAM = "exact", "gram"
NOT_A_MATRIX, NOT_FINITE, EMPTY = "not a matrix", "not finite", "empty"


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a matrix, largest first.

    ``route``: ``exact`` (a decomposition in float64) or ``gram`` (by way of the Gram matrix, see
    ``fast_singular_values`` for its accuracy). ``spectral_norm``: the largest value; ``full_rank``: N. ``tail``: None
    where too few values or none but equal ones. ``ranks`` (from 1) and ``values``: at most ``PLOT_POINTS`` of them,
    evenly spread over log(rank), for a plot.
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
        """Effective rank as a share of the full one."""
        return self.effective_rank / self.full_rank


@dataclass(frozen=True)
class WeightFigures:
    """One tensor's figures; ``norm``, ``spread`` and ``largest`` are over its finite values.

    ``norm``: Euclidean; ``spread``: standard deviation over all of them; ``largest``: magnitude. ``zero_share``:
    values that are exactly 0. ``dead_rows``, ``dead_columns``: all zero; None for what is not a matrix.
    ``no_spectrum``: why there is none, empty where there is one.
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
def weigh(name: str, tensor: Tensor, *, exact_side: int = EXACT_SIDE) -> WeightFigures:
    """The figures of one tensor of any shape, on its device; a block of it at a time is held in float64.

    ``exact_side``: a matrix whose smaller side is longer, or that has more than ``EXACT_CELLS`` values, has its
    spectrum found by way of the Gram matrix, in float32.
    """
    sums, dead_rows, live_columns = _sums(tensor)
    finite = max(1, tensor.numel() - int(sums["not_finite"]))
    mean = sums["total"] / finite
    no_spectrum = ""
    if tensor.numel() == 0:
        no_spectrum = EMPTY
    elif tensor.dim() != 2:
        no_spectrum = NOT_A_MATRIX
    elif sums["not_finite"]:
        no_spectrum = NOT_FINITE
    return WeightFigures(
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


def weigh_all(named: Iterable[tuple[str, Tensor]], *, exact_side: int = EXACT_SIDE) -> list[WeightFigures]:
    """The figures of each named tensor, one after the other: an iterator that reads them never holds two."""
    return [weigh(name, tensor, exact_side=exact_side) for name, tensor in named]


def _sums(tensor: Tensor) -> tuple[dict[str, float], int | None, Tensor | None]:
    """Sums over all values, dead rows and which columns ``[C]`` are alive; the last two of a matrix only."""
    sums = dict.fromkeys(("total", "squares", "largest", "not_finite", "zeros"), 0.0)
    matrix = tensor.dim() == 2
    rows = tensor.detach() if matrix else tensor.detach().reshape(1, -1)
    live_columns = torch.zeros(rows.shape[1], dtype=torch.bool, device=rows.device)
    dead_rows = 0
    width = min(max(1, rows.shape[1]), BLOCK_VALUES)
    for start in range(0, rows.shape[1], width):
        for block in rows[:, start : start + width].split(max(1, BLOCK_VALUES // width)):
            _add(sums, block.double())
            live_columns[start : start + width] |= (block != 0).any(dim=0)
    if matrix:
        dead_rows = sum(
            int((~(block != 0).any(dim=1)).sum()) for block in rows.split(max(1, BLOCK_VALUES // width))
        )
    return sums, (dead_rows if matrix else None), (live_columns if matrix else None)


def _add(sums: dict[str, float], block: Tensor) -> None:
    """Put a block's part into the sums; a value that is not finite is counted and passed over."""
    finite = block.isfinite()
    bad = int((~finite).sum())
    if bad:
        block = torch.where(finite, block, 1.0)  # neither a zero nor the largest; taken off again below
    sums["not_finite"] += bad
    sums["zeros"] += int((block == 0).sum())
    sums["total"] += float(block.sum()) - bad
    sums["squares"] += float(block.square().sum()) - bad
    if bad < block.numel():
        sums["largest"] = max(sums["largest"], float(torch.where(finite, block, 0.0).abs().max()))


def _spectrum(matrix: Tensor, exact_side: int) -> Spectrum:
    exact = min(matrix.shape) <= exact_side and matrix.numel() <= EXACT_CELLS
    values = singular_values(matrix) if exact else fast_singular_values(matrix)
    places = plot_places(len(values))
    return Spectrum(
        route=EXACT if exact else GRAM,
        full_rank=len(values),
        spectral_norm=float(values[0]),
        effective_rank=float(effective_rank(values)),
        stable_rank=float(stable_rank(values)),
        tail=heavy_tail_exponent(values),
        ranks=tuple(place + 1 for place in places),
        values=tuple(values[places].tolist()),
    )


def plot_places(number: int, limit: int = PLOT_POINTS) -> list[int]:
    """Places of at most ``limit`` of ``number`` values, both ends among them, evenly spread over log(place + 1)."""
    if number <= limit:
        return list(range(number))
    return sorted({round(number ** (step / (limit - 1))) - 1 for step in range(limit)})
