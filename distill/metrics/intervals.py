"""A share with its 95 % confidence interval (Wilson)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A mean over the text with its 95 % interval over sequences (none for one sequence)."""

    value: float
    low: float | None = None
    high: float | None = None


Z95 = 1.959963984540054  # standard normal, two-sided 95 %


@dataclass(frozen=True)
class Ratio:
    """``right`` of ``cases``, with Wilson's 95 % interval; without a case nothing is known."""

    name: str
    right: int
    cases: int
    value: float | None
    low: float | None
    high: float | None


def wilson(right: int, cases: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927); ``cases`` ≥ 1."""
    share, square = right / cases, Z95**2
    middle = (share + square / (2 * cases)) / (1 + square / cases)
    half = (
        Z95
        * math.sqrt(share * (1 - share) / cases + square / (4 * cases**2))
        / (1 + square / cases)
    )
    return max(0.0, middle - half), min(1.0, middle + half)
