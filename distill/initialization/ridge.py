"""Ridge regression that says by itself how far the examples can be trusted."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_TOGETHER = 2048
# Strength of the ridge as a share of the inputs' mean square, tried from the weakest.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
HARD = (
    3072  # inputs from which on one factorisation takes seconds, so that fewer strengths are tried
)
STRENGTHS_OF_MANY = (1e-2, 1e-1)


def corrections(
    inputs: Tensor, errors: list[Tensor], checked: Tensor, weights: Tensor | None = None
) -> list[Tensor]:
    """What to add to linear maps of the same ``inputs [N, I]`` so that their ``errors [N, O]``
    become small.

    For each error the map Δ ``[O, I]`` minimises Σ ‖error − Δ · input‖² + ρ ‖Δ‖². Rows with
    ``checked [N]`` true are left out at first: ρ is the strength that predicts them best, and Δ is
    0 where none predicts them better than no correction at all. ``weights [N]``: how much each
    row's error counts, as a factor of its size.
    """
    if weights is not None:
        inputs, errors = inputs * weights[:, None], [error * weights[:, None] for error in errors]
    learnt, held = ~checked, checked
    gram, gram_held = moments(inputs[learnt], inputs[learnt]), moments(inputs[held], inputs[held])
    cross = [moments(inputs[learnt], error[learnt]) for error in errors]
    cross_held = [moments(inputs[held], error[held]) for error in errors]
    least, chosen = [0.0] * len(errors), [0.0] * len(errors)
    for strength in STRENGTHS if inputs.shape[1] < HARD else STRENGTHS_OF_MANY:
        for place, tried in enumerate(_solved(gram, cross, strength)):
            # The change of the squared error on the rows that were left out.
            change = float(
                (tried * (gram_held @ tried)).sum() - 2.0 * (tried * cross_held[place]).sum()
            )
            if change < least[place]:
                least[place], chosen[place] = change, strength
    gram += gram_held
    found = [torch.zeros(error.shape[1], inputs.shape[1]) for error in errors]
    for strength in sorted(set(chosen) - {0.0}):
        places = [place for place, own in enumerate(chosen) if own == strength]
        answers = _solved(gram, [cross[place] + cross_held[place] for place in places], strength)
        for place, answer in zip(places, answers, strict=True):
            found[place] = answer.T.float()
    return found


def moments(left: Tensor, right: Tensor) -> Tensor:
    """``leftᵀ · right`` of ``[N, I]`` and ``[N, O]``, summed in float64 over blocks of rows:
    ``[I, O]``."""
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
