"""Ridge regression whose strength is chosen on validation rows."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_TOGETHER = 2048
# Strength of the ridge as a share of the inputs' mean square, tried from the weakest.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# From so many inputs on one factorization takes seconds: fewer strengths are tried.
MANY_INPUTS = 3072
STRENGTHS_OF_MANY = (1e-2, 1e-1)


def corrections(
    inputs: Tensor, errors: list[Tensor], checked: Tensor, weights: Tensor | None = None
) -> list[Tensor]:
    """Corrections of linear maps of the same ``inputs [N, I]`` that reduce their ``errors [N, O]``.

    Each Δ ``[O, I]`` minimizes Σ ‖error − Δ · input‖² + ρ ‖Δ‖². ρ is the strength that, without the
    rows where ``checked [N]`` is true, predicts these best; Δ is 0 where none predicts them better
    than no correction. ``weights [N]``: factors of the rows' errors.
    """
    if weights is not None:
        inputs, errors = inputs * weights[:, None], [error * weights[:, None] for error in errors]
    fit, val = ~checked, checked
    gram, gram_val = moments(inputs[fit], inputs[fit]), moments(inputs[val], inputs[val])
    cross = [moments(inputs[fit], error[fit]) for error in errors]
    cross_val = [moments(inputs[val], error[val]) for error in errors]
    least, chosen = [0.0] * len(errors), [0.0] * len(errors)
    for strength in STRENGTHS if inputs.shape[1] < MANY_INPUTS else STRENGTHS_OF_MANY:
        for index, tried in enumerate(_solved(gram, cross, strength)):
            # The change of the squared error on the validation rows.
            change = float(
                (tried * (gram_val @ tried)).sum() - 2.0 * (tried * cross_val[index]).sum()
            )
            if change < least[index]:
                least[index], chosen[index] = change, strength
    gram += gram_val
    result = [torch.zeros(error.shape[1], inputs.shape[1]) for error in errors]
    for strength in sorted(set(chosen) - {0.0}):
        indices = [index for index, own in enumerate(chosen) if own == strength]
        totals = [cross[index] + cross_val[index] for index in indices]
        for index, solution in zip(indices, _solved(gram, totals, strength), strict=True):
            result[index] = solution.T.float()
    return result


def moments(left: Tensor, right: Tensor) -> Tensor:
    """``leftᵀ · right``, ``[N, I]`` and ``[N, O]`` → ``[I, O]``, summed in float64 over blocks."""
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for start in range(0, len(left), ROWS_TOGETHER):
        rows = slice(start, start + ROWS_TOGETHER)
        total += left[rows].T @ right[rows]
    return total


def _solved(gram: Tensor, cross: list[Tensor], strength: float) -> list[Tensor]:
    """(gram + ridge)⁻¹ · cross for each of ``cross``."""
    ridge = strength * gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    return [torch.cholesky_solve(part, factor) for part in cross]
