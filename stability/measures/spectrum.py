"""Ranks and heavy-tail exponent of a weight matrix, from its singular values.

Letters: R rows, C columns, N = min(R, C) singular values σ, λ = σ² the eigenvalues of WᵀW.

Sources: effective rank, Roy and Vetterli (EUSIPCO 2007); power-law fit, Clauset, Shalizi and
Newman (SIAM Review 51, 2009); its exponent as a property of a weight matrix, Martin and Mahoney
(JMLR 22, 2021), who report 2 to 6 in well-trained layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from numerics.precision import float64, ieee_float32, where_float64

MIN_EIGENVALUES = 20  # needed for a fit
MIN_TAIL = 10  # eigenvalues in a fitted tail
NEGLIGIBLE = 1e-6  # σ / largest σ; smaller values may be rounding errors
LONG_SIDE_ROWS = 8192  # rows added to the Gram matrix at a time
CANDIDATE_CELLS = 1 << 20  # candidates x eigenvalues computed together: 8 MiB


@dataclass(frozen=True)
class TailFit:
    """A power law p(λ) ~ λ^-alpha for λ ≥ ``x_min``.

    ``tail_size``: eigenvalues in that tail. ``distance``: Kolmogorov and Smirnov's, between tail
    and law (0 to 1). The standard error of ``alpha`` is (alpha - 1) / √tail_size.
    """

    alpha: float
    x_min: float
    tail_size: int
    distance: float


def singular_values(matrix: Tensor) -> Tensor:
    """The singular values ``[N]`` of a finite ``[R, C]``, largest first, decomposed in float64."""
    _check_matrix(matrix)
    exact = float64(matrix.detach())
    if not bool(exact.isfinite().all()):
        raise ValueError("a matrix with values that are not finite has no singular values")
    return torch.linalg.svdvals(exact)


@ieee_float32()
def fast_singular_values(matrix: Tensor) -> Tensor:
    """The singular values ``[N]`` of ``[R, C]``, largest first, from the smaller Gram matrix.

    Computes in float64 for a float64 matrix, else in float32; returns float64. The error of σ is
    about ε·σ_max²/σ, and √ε·σ_max for tiny σ (ε = 1e-7 and 2e-16): float32 resolves values down to
    about 0.0005 of the largest, float64 to 1e-7. The effective rank of a full-rank matrix hardly
    changes. All NaN for a matrix that is not finite.
    """
    _check_matrix(matrix)
    wide = where_float64(matrix.detach())
    tall = wide if wide.shape[0] >= wide.shape[1] else wide.T
    number = tall.shape[1]
    if tall.numel() == 0:
        return tall.new_zeros(number, dtype=torch.float64)
    kind = torch.float64 if tall.dtype == torch.float64 else torch.float32
    scale = tall.abs().max().to(kind)  # so that squares neither overflow nor vanish
    if not bool(scale.isfinite()):
        return tall.new_full((number,), torch.nan, dtype=torch.float64)
    if not bool(scale > 0):
        return tall.new_zeros(number, dtype=torch.float64)
    gram = tall.new_zeros((number, number), dtype=kind)
    for rows in tall.split(LONG_SIDE_ROWS):
        part = rows.to(kind) / scale
        gram.addmm_(part.T, part)
    squares: Tensor = torch.linalg.eigvalsh(gram)
    return squares.flip(0).clamp(min=0).sqrt().double() * scale.double()


def effective_rank(values: Tensor) -> Tensor:
    """exp of the entropy of σ/Σσ, for singular values ``[N]``: N for N equal values; a scalar.

    0 for a spectrum without a positive value, NaN for one with a NaN.
    """
    shares = values / values.sum()
    return torch.where(values.sum() == 0, 0.0, torch.special.entr(shares).sum().exp())


def stable_rank(values: Tensor) -> Tensor:
    """Σσ² / σ_max² for singular values ``[N]``, a scalar.

    0 for a spectrum without a positive value, NaN for one with a NaN.
    """
    if values.numel() == 0:
        return values.sum()
    return torch.where(values.max() == 0, 0.0, (values / values.max()).square().sum())


def heavy_tail_exponent(values: Tensor) -> TailFit | None:
    """The power law of the largest eigenvalues λ = σ² of singular values ``[N]``, in any order.

    Maximum likelihood, with the x_min of the smallest Kolmogorov-Smirnov distance. None for fewer
    than ``MIN_EIGENVALUES`` non-negligible values, for values not finite, and if all are equal.
    """
    exact = float64(values.detach())
    if exact.numel() < MIN_EIGENVALUES or not bool(exact.isfinite().all()):
        return None
    positive = exact[(exact > NEGLIGIBLE * exact.max()) & (exact > 0)]
    number = positive.numel()
    if number < MIN_EIGENVALUES:
        return None
    logs = 2 * positive.sort().values.log()
    sizes = torch.arange(number, 0, -1, dtype=torch.float64, device=logs.device)
    excess = logs.flip(0).cumsum(0).flip(0) - sizes * logs  # Σ log(λ / x_min) over each tail
    new = torch.ones(number, dtype=torch.bool, device=logs.device)
    new[1:] = logs[1:] > logs[:-1]  # a tail begins with the first of equal values
    starts = (new & (sizes >= MIN_TAIL) & (excess > 1e-9 * sizes)).nonzero().squeeze(1)
    if starts.numel() == 0:
        return None
    slopes = sizes[starts] / excess[starts]
    step = max(1, CANDIDATE_CELLS // number)
    pieces = zip(starts.split(step), slopes.split(step), strict=True)
    distances = torch.cat([_distances(logs, some, slopes=slope) for some, slope in pieces])
    best = int(distances.argmin())
    start = int(starts[best])
    return TailFit(
        1 + float(slopes[best]), float(logs[start].exp()), number - start, float(distances[best])
    )


def _distances(logs: Tensor, starts: Tensor, *, slopes: Tensor) -> Tensor:
    """Kolmogorov-Smirnov distance ``[S]`` of each tail of ``logs`` ``[N]`` from its law."""
    first = int(starts[0])
    logs = logs[first:]
    indices = torch.arange(first, first + logs.numel(), device=logs.device)
    excess = logs - logs[starts - first].unsqueeze(1)  # log(λ / x_min), [S, N]
    law = -torch.expm1(-excess * slopes.unsqueeze(1))
    sizes = (first + logs.numel() - starts).double().unsqueeze(1)
    below = (indices - starts.unsqueeze(1)) / sizes  # share of the tail below each value
    distance = torch.maximum((law - below).abs(), (law - below - 1.0 / sizes).abs())
    return distance.masked_fill(excess < 0, 0.0).amax(dim=1)


def _check_matrix(matrix: Tensor) -> None:
    if matrix.dim() != 2:
        raise ValueError(f"singular values need a matrix, not shape {tuple(matrix.shape)}")
