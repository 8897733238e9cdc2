"""The mass of a tail of which the top-k alone is known, at temperatures other than 1.

Letters: N positions, K tokens known, V vocabulary, M nodes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from teachers.targets.distributions import EMPTY_TAIL
from teachers.targets.recipe import NODES

STEEPEST = 64.0  # exponent of a tail that is next to nothing
HALVINGS = 60
SURE = 1e-6  # a tail of less mass is the rounding of float32 log-probabilities

Floats64 = NDArray[np.float64]


def estimated_tail(logprobs: Floats64, vocab_size: int) -> NDArray[np.float32]:
    """log Σ exp((z_v − z_first) / T) over the tail at every node, ``[N, M]``, from the top-k's
    ``logprobs [N, K]``, falling.

    At T = 1 it is what the top-k leaves of 1, to float32. At others the tail is taken to fall as a
    power of the rank, from the last known token on, with just that mass (docs/several-machines.md
    says how right that is).
    """
    count, size = logprobs.shape
    if size >= vocab_size:
        return np.full((count, len(NODES)), -np.inf, dtype=np.float32)
    mass = 1.0 - np.exp(logprobs).sum(axis=1)
    first, last = logprobs[:, 0], logprobs[:, -1]
    sure = mass > SURE
    log_mass = np.log(np.where(sure, mass, 1.0))
    # In units of the last known token's probability, which no token of the tail exceeds.
    wanted = log_mass - last
    low, high = np.zeros(count), np.full(count, STEEPEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        flatter = _log_sum(middle, size, vocab_size) > wanted
        low, high = np.where(flatter, middle, low), np.where(flatter, high, middle)
    missing = wanted - _log_sum(low, size, vocab_size)  # where no exponent gives just that mass
    tail = [
        node * (last - first + missing) + _log_sum(node * low, size, vocab_size) for node in NODES
    ]
    result = np.where(sure[:, None], np.stack(tail, axis=1), EMPTY_TAIL)
    return result.clip(min=EMPTY_TAIL).astype(np.float32)


def _log_sum(exponents: Floats64, size: int, vocab_size: int) -> Floats64:
    """log Σ (r / K)^−a over the ranks K < r ≤ V, for each exponent a ≥ 0, by the integral."""
    low, high = np.log1p(0.5 / size), np.log((vocab_size + 0.5) / size)
    slope = (1.0 - exponents) * (high - low)
    near = np.abs(slope) < 1e-6
    safe = np.where(near, 1.0, slope)
    # ∫ e^{(1 − a) t} dt from low to high; the greater end is taken out, so that nothing overflows.
    part = np.where(near, 1.0, -np.expm1(-np.abs(safe)) / np.abs(safe))
    end = np.where(slope > 0, high, low)
    return np.log(size * (high - low) * part) + (1.0 - exponents) * end
