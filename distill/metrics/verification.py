"""How well the verification head knows where the student agrees with the teacher.

N positions, each with the head's probability of agreement and whether the two did agree.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from distill.metrics.calibration import Bin, auroc, expected_calibration_error, reliability

CASCADE_POINTS = 41
CASCADE_GOAL = 0.95  # agreement of student and teacher together that ``trust`` aims at


@dataclass(frozen=True)
class CascadePoint:
    """Where the teacher answers the share ``escalated`` of the tokens, those below ``threshold``,
    and the student the others, ``agreement`` of all tokens are the teacher's."""

    escalated: float
    agreement: float
    threshold: float


def cascade(probabilities: Tensor, agreed: Tensor) -> list[CascadePoint]:
    """The cascade: its agreement against the share of tokens that the teacher answers."""
    order = probabilities.double().argsort(stable=True)
    certain = probabilities.double()[order]
    count = len(order)
    kept = agreed[order].double().flip(0).cumsum(0).flip(0)  # agreements from each position on
    kept = torch.cat((kept, kept.new_zeros(1)))
    points = []
    for share in torch.linspace(0.0, 1.0, CASCADE_POINTS, dtype=torch.float64).tolist():
        asked = round(share * count)
        threshold = float(certain[asked]) if asked < count else 1.0
        points.append(CascadePoint(asked / count, (asked + float(kept[asked])) / count, threshold))
    return points


@dataclass(frozen=True)
class VerificationScore:
    """The verification head over ``positions`` tokens, of which a share ``agreement`` agreed.

    ``auroc``: ``None`` if all tokens are alike; ``calibration_error``: over 15 bins; ``at_trust``:
    the cascade at the threshold fitted on other data.
    """

    positions: int
    agreement: float
    auroc: float | None
    calibration_error: float
    reliability: list[Bin]
    cascade: list[CascadePoint]
    at_trust: CascadePoint | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        return asdict(self)


def score_verification(probabilities: Tensor, agreed: Tensor, trust: float) -> VerificationScore:
    """Score ``probabilities [N]`` and threshold ``trust`` against ``agreed [N]``; N ≥ 1."""
    asked = probabilities.double() < trust
    return VerificationScore(
        positions=len(agreed),
        agreement=float(agreed.double().mean()),
        auroc=auroc(probabilities, agreed),
        calibration_error=expected_calibration_error(probabilities, agreed),
        reliability=reliability(probabilities, agreed),
        cascade=cascade(probabilities, agreed),
        at_trust=CascadePoint(
            float(asked.double().mean()), float((asked | agreed).double().mean()), trust
        ),
    )


def fit_trust(probabilities: Tensor, agreed: Tensor, goal: float = CASCADE_GOAL) -> float:
    """The lowest threshold at which student and teacher together reach ``goal``, the teacher
    answering what is below it (0 where the student alone reaches it, 1 where no less will do)."""
    certain, group = probabilities.double().unique(return_inverse=True)
    cases = torch.bincount(group, minlength=len(certain))
    right = torch.bincount(group[agreed], minlength=len(certain))
    # Where everything below the probability of each group is asked, these are answered otherwise
    # than by the teacher.
    wrong = (cases - right).flip(0).cumsum(0).flip(0)
    reached = 1.0 - wrong.double() / len(agreed) >= goal - 1e-12
    if bool(reached[0]):
        return 0.0
    return float(certain[reached][0]) if bool(reached.any()) else 1.0


@dataclass(frozen=True)
class VerificationPart(VerificationScore):
    """The verification head, and the probability below which the teacher is asked."""

    trust: float = 0.5


def cascade_goal(part: VerificationPart) -> CascadePoint | None:
    """The point with the fewest teacher answers at which the cascade reaches the goal."""
    return next((point for point in part.cascade if point.agreement >= CASCADE_GOAL), None)
