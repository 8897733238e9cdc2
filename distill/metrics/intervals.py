"""A share with its 95 % confidence interval (Wilson)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from distill.metrics.safety import SafetyScore


@dataclass(frozen=True)
class Figure:
    """A mean over the evaluated text with its 95 % interval over sequences (none where one
    sequence is all)."""

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


def ratios(score: SafetyScore) -> list[Ratio]:
    """Recall and precision of each decision with their counts, those first that the head is
    tuned for."""
    confusion, names = score.confusion, ("Allow", "Escalate", "Refuse")
    found = {}
    for place, name in enumerate(names):
        right = confusion[place][place]
        for kind, cases in (
            ("Recall", sum(confusion[place])),
            ("Precision", sum(row[place] for row in confusion)),
        ):
            low, high = wilson(right, cases) if cases else (None, None)
            share = right / cases if cases else None
            found[f"{name} {kind}"] = Ratio(f"{name} {kind}", right, cases, share, low, high)
    first = ("Refuse Recall", "Escalate Precision", "Allow Precision")
    return [found[name] for name in (*first, *(name for name in found if name not in first))]
