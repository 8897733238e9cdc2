"""What the verification head is worth: cascade and threshold of trust against their definitions."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from torch import Tensor

from distill.metrics.calibration import auroc, expected_calibration_error
from distill.metrics.verification import CASCADE_POINTS, cascade, fit_trust, score_verification
from tests.support.references import case


def drawn(count: int, values: int = 1 << 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Probabilities of at most ``values`` different sizes, and whether there was agreement."""
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.randint(1, values, (count,), generator=generator) / values
    return probabilities, torch.rand(count, generator=generator) < 0.2 + 0.7 * probabilities


def together(probabilities: list[float], agreed: list[bool], threshold: float) -> float:
    """Share of the teacher's tokens where it answers what is below ``threshold``."""
    right = [p < threshold or same for p, same in zip(probabilities, agreed, strict=True)]
    return sum(right) / len(right)


def test_the_cascade_by_definition() -> None:
    """The teacher answers the least certain share; of the rest those count that agree anyway."""
    for count in (1, 2, 39, 40, 41, 333):
        probabilities, agreed = drawn(count, seed=count)
        order = sorted(range(count), key=lambda place: float(probabilities[place]))
        points = cascade(probabilities, agreed)
        with case(count):
            assert len(points) == CASCADE_POINTS
            first, last = points[0], points[-1]
            assert first.escalated == 0.0 and last.escalated == last.agreement == 1.0
            assert first.agreement == pytest.approx(float(agreed.double().mean()))
            for number, point in enumerate(points):
                asked = round(point.escalated * count)
                share = number / (CASCADE_POINTS - 1)
                assert abs(point.escalated - share) <= 0.5 / count + 1e-12
                kept = sum(bool(agreed[place]) for place in order[asked:])
                assert point.agreement == pytest.approx((asked + kept) / count, abs=1e-12)
                expected = float(probabilities[order[asked]]) if asked < count else 1.0
                assert point.threshold == pytest.approx(expected, abs=1e-12)
            agreements = [point.agreement for point in points]
            assert agreements == sorted(agreements)


def test_trust_is_the_lowest_threshold_that_reaches_the_goal() -> None:
    """Of all thresholds that make a difference, however many probabilities are equal."""
    for values, seed in product((2, 3, 7, 1 << 20), range(8)):
        probabilities, agreed = drawn(60, values, seed)
        cases = (probabilities.double().tolist(), agreed.tolist())
        thresholds = [0.0, *sorted(set(cases[0])), 1.0]
        shares = [(together(*cases, threshold), threshold) for threshold in thresholds]
        for goal in (0.3, 0.8, 0.95, 0.999):
            wanted = min(threshold for share, threshold in shares if share >= goal - 1e-12)
            found = fit_trust(probabilities, agreed, goal)
            assert found == pytest.approx(wanted, abs=1e-12), (values, seed, goal)


def test_trust_of_known_cases() -> None:
    """Who always agrees need never ask; who knows nothing about itself asks always."""
    probabilities = torch.tensor([0.2, 0.4, 0.6, 0.8])
    assert fit_trust(probabilities, torch.ones(4, dtype=torch.bool)) == 0.0
    assert fit_trust(probabilities, torch.tensor([False, True, True, True])) == pytest.approx(0.4)
    assert fit_trust(probabilities, torch.tensor([True, True, True, False])) == 1.0
    same = torch.full((10,), 0.5)
    assert fit_trust(same, torch.arange(10) < 9) == 1.0  # no share of equal ones can be asked
    assert fit_trust(same, torch.arange(10) < 9, goal=0.9) == 0.0
    assert fit_trust(torch.tensor([0.3]), torch.tensor([False])) == 1.0


def test_the_score_holds_every_figure() -> None:
    """Agreement, AUROC, calibration error, bins and cascade, also as JSON."""
    probabilities, agreed = drawn(200)
    score = score_verification(probabilities, agreed, 0.4)
    assert score.positions == 200
    assert score.agreement == pytest.approx(float(agreed.double().mean()))
    assert score.auroc == auroc(probabilities, agreed)
    assert score.calibration_error == expected_calibration_error(probabilities, agreed)
    assert sum(bin.count for bin in score.reliability) == 200
    asked = [float(p) < 0.4 for p in probabilities]
    settled = [a or bool(right) for a, right in zip(asked, agreed, strict=True)]
    assert score.at_trust is not None and score.at_trust.threshold == 0.4
    assert score.at_trust.escalated == pytest.approx(sum(asked) / 200)
    assert score.at_trust.agreement == pytest.approx(sum(settled) / 200)
    said = json.loads(json.dumps(score.to_json()))
    assert said["cascade"][-1]["agreement"] == 1.0 and said["auroc"] == score.auroc
    alike = score_verification(probabilities, torch.ones(200, dtype=torch.bool), 0.0)
    assert alike.auroc is None and alike.agreement == 1.0
