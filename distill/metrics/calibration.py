"""Calibration error, AUROC and Platt scaling of N cases, each with a score and an outcome."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

BINS = 15


@dataclass(frozen=True)
class Bin:
    """Cases whose probability falls into one of ``BINS`` equal parts of [0, 1]."""

    count: int
    mean_probability: float
    share_true: float


def reliability(probabilities: Tensor, came_true: Tensor) -> list[Bin]:
    """The bins that are not empty, lowest first, of probabilities ``[N]`` and outcomes ``[N]``."""
    groups = (probabilities.double() * BINS).long().clamp(0, BINS - 1)
    bins = []
    for number in range(BINS):
        inside = groups == number
        if count := int(inside.sum()):
            mean = float(probabilities[inside].double().mean())
            bins.append(Bin(count, mean, float(came_true[inside].double().mean())))
    return bins


def expected_calibration_error(probabilities: Tensor, came_true: Tensor) -> float:
    """Σ over bins of share · |mean probability − share true| (Naeini et al. 2015); N ≥ 1."""
    gaps = [
        bin.count * abs(bin.mean_probability - bin.share_true)
        for bin in reliability(probabilities, came_true)
    ]
    return sum(gaps) / len(probabilities)


def auroc(scores: Tensor, came_true: Tensor) -> float | None:
    """The chance that a true case scores above a false one, ties counting half (Hanley & McNeil
    1982); ``None`` if all cases are alike."""
    count = len(scores)
    true = came_true.double()
    positives = float(true.sum())
    if positives in (0.0, float(count)):
        return None
    _, groups, sizes = scores.double().unique(return_inverse=True, return_counts=True)
    last = sizes.cumsum(0).double()
    ranks = last - (sizes.double() - 1) / 2  # mean rank (from 1) of each group of equal scores
    rank_sum = float((ranks[groups] * true).sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * (count - positives))


def fit_platt(log_odds: Tensor, came_true: Tensor, steps: int = 50) -> tuple[float, float]:
    """Scale a ≥ 0 and offset b so that a · log_odds + b is calibrated (Platt 1999): Newton's method
    in float64, regularized towards (1, 0) so that few or one-sided cases give finite values."""
    values, labels = log_odds.double(), came_true.double()
    pull = 1.0
    start = torch.tensor([1.0, 0.0], dtype=torch.float64)
    point = start.clone()
    features = torch.stack((values, torch.ones_like(values)), dim=-1)
    for _ in range(steps):
        logits = features @ point
        chance = logits.sigmoid()
        slope = features.T @ (chance - labels) + pull * (point - start)
        curve = features.T @ (features * (chance * (1 - chance))[:, None])
        curve += pull * torch.eye(2, dtype=torch.float64)
        step = torch.linalg.solve(curve, slope)
        point = point - _damped(step, point, features, labels, start, pull)
        if float(step.abs().max()) < 1e-10:
            break
    if point[0] < 0:
        return 0.0, fit_platt(torch.zeros_like(values), came_true, steps)[1]
    return float(point[0]), float(point[1])


def _damped(
    step: Tensor, point: Tensor, features: Tensor, labels: Tensor, start: Tensor, pull: float
) -> Tensor:
    """The step, halved until it does not make the fit worse."""

    def loss(at: Tensor) -> float:
        fit = F.binary_cross_entropy_with_logits(features @ at, labels, reduction="sum")
        return float(fit + 0.5 * pull * (at - start).square().sum())

    before = loss(point)
    for _ in range(30):
        if loss(point - step) <= before:
            return step
        step = step / 2
    return torch.zeros_like(step)
