"""Metrics of safety decisions, and the thresholds that put Refuse Recall first.

N prompts, C = 3 decisions (ALLOW, ESCALATE, REFUSE).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from distill.metrics.calibration import expected_calibration_error
from distill.metrics.intervals import Ratio, wilson
from students.model.head_decisions import ALLOW, DECISIONS, ESCALATE, REFUSE
from students.model.heads import decide

# What thresholds aim at. A little more than what is promised: validation prompts are few.
REFUSE_RECALL, ALLOW_PRECISION, ESCALATE_PRECISION = 0.97, 0.97, 0.85
GRID = 49  # thresholds tried on each axis
MIN_REFUSE, MAX_REFUSE = (
    0.005,
    0.7,
)  # a lower threshold would refuse nearly everything, a higher one nearly nothing


@dataclass(frozen=True)
class SafetyScore:
    """Decisions against labels over ``prompts`` prompts; a ratio without any case is ``None``.

    ``confusion[label][decision]`` counts; ``calibration_error``: of the most probable class.
    """

    prompts: int
    refuse_recall: float | None
    refuse_precision: float | None
    escalate_precision: float | None
    escalate_recall: float | None
    allow_precision: float | None
    allow_recall: float | None
    accuracy: float
    calibration_error: float
    confusion: list[list[int]]

    def to_json(self) -> dict[str, Any]:
        """Everything, with the labels' names."""
        return {"labels": list(DECISIONS), **asdict(self)}


def score_decisions(
    probabilities: Tensor, labels: Tensor, thresholds: tuple[float, float]
) -> SafetyScore:
    """Score ``probabilities [N, 3]`` with ``thresholds`` against ``labels [N]``; N ≥ 1."""
    confusion = confusion_matrix(labels, decide(probabilities, thresholds))
    right = confusion.diagonal()
    recall, precision = (
        [_ratio(part, whole) for part, whole in zip(right, confusion.sum(dim=dim), strict=True)]
        for dim in (1, 0)
    )
    best = probabilities.max(dim=-1)
    return SafetyScore(
        prompts=len(labels),
        refuse_recall=recall[REFUSE],
        refuse_precision=precision[REFUSE],
        escalate_precision=precision[ESCALATE],
        escalate_recall=recall[ESCALATE],
        allow_precision=precision[ALLOW],
        allow_recall=recall[ALLOW],
        accuracy=float(right.sum()) / len(labels),
        calibration_error=expected_calibration_error(best.values, best.indices == labels),
        confusion=confusion.tolist(),
    )


def confusion_matrix(labels: Tensor, decisions: Tensor) -> Tensor:
    """Counts ``[3, 3]`` of each label (row) and decision (column)."""
    cells = labels * len(DECISIONS) + decisions
    return torch.bincount(cells, minlength=len(DECISIONS) ** 2).view(len(DECISIONS), len(DECISIONS))


def fit_thresholds(probabilities: Tensor, labels: Tensor) -> tuple[float, float]:
    """The thresholds of ``decide`` that serve validation prompts best: Refuse Recall up to its aim
    first; then Allow Precision + Escalate Precision, each up to its aim, + the mean recall.

    Of equally good pairs, the middle one.
    """
    tried: list[tuple[tuple[float, ...], float, float]] = []
    for refuse in torch.logspace(math.log10(MIN_REFUSE), math.log10(MAX_REFUSE), GRID).tolist():
        for allow in torch.linspace(0.1, 0.95, GRID).tolist():
            confusion = confusion_matrix(labels, decide(probabilities, (refuse, allow))).double()
            right = confusion.diagonal()
            recalls = (right / confusion.sum(dim=1).clamp_min(1.0)).tolist()  # 0 without any case
            precisions = (right / confusion.sum(dim=0).clamp_min(1.0)).tolist()
            # A decision that is never taken has precision 0 here, or refusing everything would be
            # best.
            precise = min(precisions[ALLOW], ALLOW_PRECISION) + min(
                precisions[ESCALATE], ESCALATE_PRECISION
            )
            merit = (min(recalls[REFUSE], REFUSE_RECALL), precise + sum(recalls) / len(recalls))
            tried.append((merit, refuse, allow))
    best = max(merit for merit, _, _ in tried)
    region = [(refuse, allow) for merit, refuse, allow in tried if merit == best]
    return region[len(region) // 2]


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature that fits ``logits [N, 3]`` to ``labels [N]`` best (Guo et al. 2017)."""
    tried = torch.logspace(-1.0, 1.0, 81, dtype=torch.float64)
    losses = [
        float(torch.nn.functional.cross_entropy(logits.double() / temperature, labels))
        for temperature in tried
    ]
    return float(tried[min(range(len(losses)), key=losses.__getitem__)])


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    return float(part) / float(whole) if float(whole) else None


def ratios(score: SafetyScore) -> list[Ratio]:
    """Recall and precision of each decision; first those that the head is tuned for."""
    confusion, names = score.confusion, ("Allow", "Escalate", "Refuse")
    all_ratios = {}
    for index, name in enumerate(names):
        right = confusion[index][index]
        for kind, cases in (
            ("Recall", sum(confusion[index])),
            ("Precision", sum(row[index] for row in confusion)),
        ):
            low, high = wilson(right, cases) if cases else (None, None)
            share = right / cases if cases else None
            all_ratios[f"{name} {kind}"] = Ratio(f"{name} {kind}", right, cases, share, low, high)
    first = ("Refuse Recall", "Escalate Precision", "Allow Precision")
    return [all_ratios[name] for name in dict.fromkeys((*first, *all_ratios))]
