"""The SO8T terms of the loss: PET, inertia, non-commutation. Pure functions returning means.

Letters: B batch, T tokens, D width, L layers, N blocks.
"""

from __future__ import annotations

from torch import Tensor

from students.model import so8

PHASE_ENDS = (0.3, 0.7)  # PET's three phases end at 30 %, 70 % and 100 % of training


def second_difference(hidden: Tensor, inside: Tensor) -> Tensor:
    """Sum over a batch of the squared second difference in time, per dimension: ``[B, T, D]`` →
    scalar.

    h[t] − 2 h[t−1] + h[t−2] for every t that is ``inside [B, T]``: whose three tokens lie within
    one sequence; squared, averaged over D, summed over all such t. 0 for hidden states that move on
    a straight line.
    """
    hidden = hidden.float()
    bend = hidden[:, 2:] - 2 * hidden[:, 1:-1] + hidden[:, :-2]
    return (bend.square().mean(dim=-1) * inside[:, 2:]).sum()


def pet_weight(weights: tuple[float, float, float], fraction: float) -> float:
    """PET's weight at ``fraction`` ∈ [0, 1] of training: one of three, rising phase by phase."""
    phase = sum(fraction >= end for end in PHASE_ENDS)
    return weights[phase]


def inertia(rotations: Tensor, average: Tensor) -> Tensor:
    """Mean squared Frobenius distance of rotations from their moving average, ``[L, 2, N, 8,
    8]`` → scalar."""
    return (rotations - average).square().sum(dim=(-1, -2)).mean()


def non_commutation(rotations: Tensor, margin: float) -> Tensor:
    """Mean squared shortfall of ‖R_cmd R_safe − R_safe R_cmd‖ below ``margin``, ``[L, 2, N, 8, 8]``
    → scalar.

    0 where every block's two rotations are far enough from commuting.
    """
    norms = so8.commutator_norm(rotations[:, 1], rotations[:, 0])
    return (margin - norms).clamp(min=0.0).square().mean()
