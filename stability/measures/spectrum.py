"""What the singular values of a weight matrix say: how many directions it uses, and how heavy its tail is.

Letters: R rows, C columns, N = min(R, C) singular values σ, λ = σ² the eigenvalues of WᵀW.

Sources: effective rank, Roy and Vetterli (EUSIPCO 2007); power-law fit, Clauset, Shalizi and Newman (SIAM Review 51,
2009); its exponent as a figure of a weight matrix, Martin and Mahoney (JMLR 22, 2021), who find it between 2 and 6 in
well-trained layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_EIGENVALUES = 20  # fewer say nothing about a tail
MIN_TAIL = 10  # eigenvalues that a fitted tail has at least
NEGLIGIBLE = 1e-6  # σ / largest σ; what is smaller may be rounding, of either way to find σ
LONG_SIDE_ROWS = 8192  # rows put into the Gram matrix at a time
CANDIDATE_CELLS = 1 << 20  # candidates x eigenvalues looked at together: 8 MiB


@dataclass(frozen=True)
class TailFit:
    """A power law p(λ) ~ λ^-alpha for λ ≥ ``x_min``.

    ``tail_size``: eigenvalues in that tail. ``distance``: Kolmogorov and Smirnov's, between tail and law (0 to 1).
    The standard error of ``alpha`` is (alpha - 1) / √tail_size.
    """

    alpha: float
    x_min: float
    tail_size: int
    distance: float


def singular_values(matrix: Tensor) -> Tensor:
    """The singular values of ``[R, C]`` in float64, largest first, ``[N]``; as exact as a decomposition makes them.

    Raises:
        ValueError: not a matrix, or not finite.
    """
    _check_matrix(matrix)
    exact = matrix.detach().double()
    if not bool(exact.isfinite().all()):
        raise ValueError("a matrix with values that are not finite has no singular values")
    found: Tensor = torch.linalg.svdvals(exact)
    return found


def fast_singular_values(matrix: Tensor) -> Tensor:
    """The singular values of ``[R, C]`` by way of the smaller Gram matrix, largest first, ``[N]`` in float64.

    Works in float64 for a float64 matrix and in float32 for any other. A value σ comes out within about ε·σ_max²/σ,
    and within √ε·σ_max where it is tiny: ε = 1e-7 and 2e-16, so float32 knows nothing below some 0.0005 of the
    largest value, float64 below some 1e-7. For a matrix of full rank that hardly moves its effective rank.
    All NaN where the matrix has a value that is not finite.

    Raises:
        ValueError: not a matrix.
    """
    _check_matrix(matrix)
    tall = matrix.detach() if matrix.shape[0] >= matrix.shape[1] else matrix.detach().T
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
    """exp of the entropy of σ/Σσ, of singular values ``[N]``: 1 for one direction, N for N equal ones; a scalar.

    0 for a spectrum without a positive value, NaN for one with a NaN.
    """
    shares = values / values.sum()
    return torch.where(values.sum() == 0, 0.0, torch.special.entr(shares).sum().exp())


def stable_rank(values: Tensor) -> Tensor:
    """Σσ² / σ_max² of singular values ``[N]``: the number of directions as long as the longest; a scalar.

    0 for a spectrum without a positive value, NaN for one with a NaN.
    """
    if values.numel() == 0:
        return values.sum()
    return torch.where(values.max() == 0, 0.0, (values / values.max()).square().sum())


def heavy_tail_exponent(values: Tensor) -> TailFit | None:
    """The power law of the largest eigenvalues λ = σ² that singular values ``[N]``, in any order, have.

    By maximum likelihood, from the x_min with the smallest Kolmogorov-Smirnov distance. None for fewer than
    ``MIN_EIGENVALUES`` that are more than rounding, for values that are not finite, and where all are equal.
    """
    exact = values.detach().double()
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
    distances = torch.cat([_distances(logs, some, slope) for some, slope in pieces])
    best = int(distances.argmin())
    start = int(starts[best])
    return TailFit(1 + float(slopes[best]), float(logs[start].exp()), number - start, float(distances[best]))


def _distances(logs: Tensor, starts: Tensor, slopes: Tensor) -> Tensor:
    """Kolmogorov and Smirnov's distance ``[S]`` of each tail of ``logs`` ``[N]``, ascending, from its own power law."""
    first = int(starts[0])
    logs = logs[first:]
    places = torch.arange(first, first + logs.numel(), device=logs.device)
    behind = logs - logs[starts - first].unsqueeze(1)  # log(λ / x_min), [S, N]
    law = -torch.expm1(-behind * slopes.unsqueeze(1))
    sizes = (first + logs.numel() - starts).double().unsqueeze(1)
    below = (places - starts.unsqueeze(1)) / sizes  # the share of the tail under each value
    distance = torch.maximum((law - below).abs(), (law - below - 1.0 / sizes).abs())
    return distance.masked_fill(behind < 0, 0.0).amax(dim=1)


def _check_matrix(matrix: Tensor) -> None:
    if matrix.dim() != 2:
        raise ValueError(f"singular values are of a matrix, not of shape {tuple(matrix.shape)}")
