"""Ridge regression whose strength is chosen on validation rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from teachers.targets.threads import every_thread

ROWS_TOGETHER = 2048
LARGE = 1e9  # multiplications that are worth more than one thread
# Strength of the ridge as a share of the inputs' mean square, tried from the weakest.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# From so many inputs on one factorization takes seconds: fewer strengths are tried.
MANY_INPUTS = 3072
STRENGTHS_OF_MANY = (1e-2, 1e-1)


def corrections(
    inputs: Tensor,
    errors: list[Tensor],
    checked: Tensor,
    weights: Tensor | None = None,
    strengths: Sequence[float] | None = None,
) -> list[Tensor]:
    """Corrections of linear maps of the same ``inputs [N, I]`` that reduce their ``errors [N, O]``.

    Each Δ ``[O, I]`` minimizes Σ ‖error − Δ · input‖² + ρ ‖Δ‖². ρ is the strength that, without the
    rows where ``checked [N]`` is true, predicts these best; Δ is 0 where none predicts them better
    than no correction. ``weights [N]``: factors of the rows' errors; ``strengths``: to choose from,
    ascending.
    """
    if weights is not None:
        inputs, errors = inputs * weights[:, None], [error * weights[:, None] for error in errors]
    fit, val = ~checked, checked
    gram, cross = moments(inputs[fit], inputs[fit]), [moments(inputs[fit], e[fit]) for e in errors]
    seen, wanted = inputs[val], [error[val] for error in errors]

    def changes(strength: float) -> list[float]:
        """Of the squared errors on the validation rows."""
        predicted = [seen @ part.float() for part in _solved(gram, cross, strength)]
        pairs = zip(predicted, wanted, strict=True)
        return [float((part * (part - 2.0 * error)).sum()) for part, error in pairs]

    usual = STRENGTHS if inputs.shape[1] < MANY_INPUTS else STRENGTHS_OF_MANY
    chosen = _best(strengths or usual, changes)
    gram += moments(seen, seen)
    result = [torch.zeros(error.shape[1], inputs.shape[1]) for error in errors]
    for strength in sorted(set(chosen) - {0.0}):
        indices = [index for index, own in enumerate(chosen) if own == strength]
        totals = [cross[index] + moments(seen, wanted[index]) for index in indices]
        for index, solution in zip(indices, _solved(gram, totals, strength), strict=True):
            result[index] = solution.T.float()
    return result


def _best(strengths: Sequence[float], changes: Callable[[float], list[float]]) -> list[float]:
    """Of each error the strength with the least change, 0 where none is below 0.

    From the middle on, in both directions, only as far as some error's change still falls.
    """
    middle = len(strengths) // 2
    found = {middle: changes(strengths[middle])}
    for step in (-1, 1):
        place = middle + step
        while 0 <= place < len(strengths):
            found[place] = changes(strengths[place])
            if not any(map(float.__lt__, found[place], found[place - step])):
                break
            place += step
    columns = [
        min((change, place) for place, change in zip(found, column, strict=True))
        for column in zip(*found.values(), strict=True)
    ]
    return [strengths[place] if change < 0.0 else 0.0 for change, place in columns]


def moments(left: Tensor, right: Tensor) -> Tensor:
    """``leftᵀ · right``, ``[N, I]`` and ``[N, O]`` → ``[I, O]``, summed in float64 over blocks."""
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    large = len(left) * total.numel() > LARGE
    with every_thread() if large else nullcontext():
        for start in range(0, len(left), ROWS_TOGETHER):
            rows = slice(start, start + ROWS_TOGETHER)
            total += left[rows].T @ right[rows]
    return total


def _solved(gram: Tensor, cross: list[Tensor], strength: float) -> list[Tensor]:
    """(gram + ridge)⁻¹ · cross for each of ``cross``."""
    ridge = strength * gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    return [torch.cholesky_solve(part, factor) for part in cross]
