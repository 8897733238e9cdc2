"""References written from the definitions, sharing no trick with the code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.losses.divergences import Divergence
from teachers.targets.distributions import CompactTargets
from teachers.targets.stored_arrays import Targets
from tests.support.stores import exact_targets

Array = NDArray[np.float64]

SHAPED = ("sketch", "hidden", "dense", "all kept")  # targets that know the shape of the tail


@contextmanager
def case(*row: object) -> Iterator[None]:
    """Name the row of a grid in which a check fails."""
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        raise AssertionError(f"{row}: {type(error).__name__}: {error}") from error


def probabilities(logits: Array, temperature: float) -> Array:
    """Softmax at temperature T over the last axis."""
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def kl(p: Array, q: Array) -> Array:
    """Σ p log(p / q) over the last axis."""
    ratios = np.ones(np.broadcast_shapes(p.shape, q.shape))
    np.divide(p, q, out=ratios, where=p > 0)
    return (p * np.log(ratios)).sum(axis=-1)


def _mixture(p: Array, q: Array, share: float) -> Array:
    return share * p + (1 - share) * q


# What each divergence of teacher p and student q is.
DEFINITIONS: dict[str, Callable[[Array, Array, Divergence], Array]] = {
    "forward_kl": lambda p, q, kind: kl(p, q),
    "reverse_kl": lambda p, q, kind: kl(q, p),
    "jensen_shannon": lambda p, q, kind: (
        kind.js_mixing * kl(p, _mixture(p, q, kind.js_mixing))
        + (1 - kind.js_mixing) * kl(q, _mixture(p, q, kind.js_mixing))
    ),
    "skewed_forward_kl": lambda p, q, kind: kl(p, _mixture(p, q, kind.skew)),
    "skewed_reverse_kl": lambda p, q, kind: kl(q, _mixture(q, p, kind.skew)),
}
# Every divergence, and some with other parameters.
FAMILY = (
    *(Divergence(name) for name in DEFINITIONS),  # type: ignore[arg-type]
    *(Divergence("jensen_shannon", js_mixing=b) for b in (0.1, 0.8)),
    *(Divergence("skewed_forward_kl", skew=s) for s in (0.0, 0.6)),
    Divergence("skewed_reverse_kl", skew=0.7),
)


def in_buckets(p: Array, teacher: Array, count: int) -> Array:
    """``p`` with all but the teacher's ``count`` best tokens in one bucket."""
    order = np.broadcast_to(np.argsort(-teacher, axis=-1, kind="stable"), p.shape)
    ranked = np.take_along_axis(p, order, axis=-1)
    rest = ranked[..., count:].sum(axis=-1, keepdims=True)
    return np.concatenate((ranked[..., :count], rest), axis=-1)


def reference_bucket_kl(teacher: Array, student: Array, count: int, temperature: float) -> Array:
    """The KL after all but the teacher's ``count`` best tokens are thrown into one bucket."""
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    return kl(in_buckets(p, teacher, count), in_buckets(q, teacher, count))


def slopes(value: Callable[[Array], Array], at: Array, step: float = 1e-5) -> Array:
    """Derivatives of ``value [..., N, V] → [..., N]`` in every logit ``[N, V]``, by differences."""
    moves = step * np.eye(at.shape[1])[:, None]
    return (value(at + moves) - value(at - moves)).T / (2 * step)


def drawn(positions: int, vocab_size: int = 20, scale: float = 2.0, seed: int = 0) -> Tensor:
    """Seeded float32 logits ``[N, V]``."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(positions, vocab_size, generator=generator)


def rows(logits: Tensor) -> Array:
    """Logits as float64 numpy."""
    return logits.detach().double().numpy()


def gradient(value: Tensor, logits: Tensor) -> Tensor:
    """The gradient of the sum of ``value`` in ``logits``."""
    return torch.autograd.grad(value.sum(), logits)[0]


def shaped(kind: str, logits: Tensor, count: int = 4) -> Targets:
    """Targets of one of ``SHAPED``, or ``buckets``."""
    if kind == "all kept":
        return CompactTargets.from_logits(logits, 500)
    return exact_targets(kind, logits, count)


def reference_bend(hidden: Tensor, lengths: list[int]) -> float:
    """Σ over sequences and inner tokens of the mean over D of (h[t+1] − 2 h[t] + h[t−1])²."""
    values, total = hidden.detach().double().numpy(), 0.0
    for row, length in enumerate(lengths):
        for t in range(1, length - 1):
            bend = values[row, t + 1] - 2 * values[row, t] + values[row, t - 1]
            total += sum(float(b) ** 2 for b in bend) / len(bend)
    return total


def reference_inertia(rotations: Tensor, average: Tensor) -> float:
    """Mean over layers, both rotations and blocks of Σ_ij (R_ij − M_ij)²."""
    pairs = zip(rotations.double().reshape(-1, 64), average.double().reshape(-1, 64), strict=True)
    return float(np.mean([((r - m).numpy() ** 2).sum() for r, m in pairs]))


def reference_shortfall(rotations: Tensor, margin: float) -> float:
    """Mean over layers and blocks of max(0, margin − ‖R_cmd R_safe − R_safe R_cmd‖)²."""
    values, shortfalls = rotations.detach().double().numpy(), []
    for layer in values:
        for safe, command in zip(layer[0], layer[1], strict=True):
            norm = np.sqrt(((command @ safe - safe @ command) ** 2).sum())
            shortfalls.append(max(0.0, margin - norm) ** 2)
    return float(np.mean(shortfalls))


Matrix = NDArray[np.float64]


def reference_skew(parameters: NDArray[np.float64]) -> Matrix:
    """Lay 28 numbers out row by row above the diagonal, with opposite sign below it."""
    matrix = np.zeros((8, 8))
    index = 0
    for row in range(8):
        for column in range(row + 1, 8):
            matrix[row, column] = parameters[index]
            matrix[column, row] = -parameters[index]
            index += 1
    return matrix


def spectral_exponential(matrix: Matrix) -> Matrix:
    """exp(A) from the eigenvalues of the Hermitian matrix iA; for matrices of any norm."""
    values, vectors = np.linalg.eigh(1j * matrix)
    return (vectors @ np.diag(np.exp(-1j * values)) @ vectors.conj().T).real
