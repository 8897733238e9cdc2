"""Scores of safety decisions, thresholds and temperature against counting and brute force."""

from __future__ import annotations

import json
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.metrics.safety import (
    ALLOW_PRECISION,
    ESCALATE_PRECISION,
    GRID,
    MAX_REFUSE,
    MIN_REFUSE,
    REFUSE_RECALL,
    confusion_matrix,
    fit_temperature,
    fit_thresholds,
    score_decisions,
)
from students.model.head_decisions import ALLOW, DECISIONS, ESCALATE, REFUSE
from tests.support.references import case


def drawn(count: int, seed: int = 0, skill: float = 1.5) -> tuple[Tensor, Tensor]:
    """Logits of three decisions and the labels that they point to, more or less."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    logits = torch.randn(count, 3, generator=generator)
    logits[torch.arange(count), labels] += skill
    return logits, labels


def reference_decision(row: list[float], refuse: float, allow: float) -> int:
    """REFUSE from its threshold on; else ALLOW where it holds its share of the rest."""
    if row[REFUSE] >= refuse:
        return REFUSE
    return ALLOW if row[ALLOW] >= allow * (row[ALLOW] + row[ESCALATE]) else ESCALATE


def ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def reference_score(
    rows: list[list[float]], labels: list[int], refuse: float, allow: float
) -> dict:
    """Every figure by going through the prompts."""
    taken = [reference_decision(row, refuse, allow) for row in rows]
    found: dict = {}
    for number, name in enumerate(DECISIONS):
        both = sum(t == number == label for t, label in zip(taken, labels, strict=True))
        found[f"{name.lower()}_recall"] = ratio(both, labels.count(number))
        found[f"{name.lower()}_precision"] = ratio(both, taken.count(number))
    right = sum(t == label for t, label in zip(taken, labels, strict=True))
    return found | {"accuracy": right / len(labels)}


def test_scores_against_counting() -> None:
    """Confusion, precision and recall of every decision; a ratio without a case is nothing."""
    for count, (refuse, allow) in product((1, 2, 5, 200), ((0.5, 0.5), (0.05, 0.9), (0.9, 0.1))):
        logits, labels = drawn(count, count)
        chances = logits.softmax(dim=-1).double()
        rows, wanted_labels = chances.tolist(), labels.tolist()
        score = score_decisions(chances, labels, (refuse, allow))
        wanted = reference_score(rows, wanted_labels, refuse, allow)
        with case(count, refuse, allow):
            found = {name: getattr(score, name) for name in wanted}
            assert found == pytest.approx(wanted, abs=1e-12)
            taken = [reference_decision(row, refuse, allow) for row in rows]
            pairs = Counter(zip(wanted_labels, taken, strict=True))
            counted = [[pairs[label, decision] for decision in range(3)] for label in range(3)]
            assert score.confusion == counted and score.prompts == count
            said = json.loads(json.dumps(score.to_json()))
            assert said["labels"] == ["ALLOW", "ESCALATE", "REFUSE"]
            assert said["confusion"] == counted


def test_rows_are_labels_and_columns_decisions() -> None:
    """Recall divides by a row, precision by a column: an asymmetric case by hand."""
    labels, taken = torch.tensor([2, 2, 2, 2, 0, 1]), torch.tensor([2, 2, 2, 0, 2, 0])
    assert confusion_matrix(labels, taken).tolist() == [[0, 0, 1], [1, 0, 0], [1, 0, 3]]
    chances = torch.nn.functional.one_hot(taken, 3).double()
    score = score_decisions(chances, labels, (0.5, 0.5))
    assert score.refuse_recall == 0.75 and score.refuse_precision == 0.75
    assert score.allow_recall == 0.0 and score.allow_precision == 0.0
    assert score.escalate_recall == 0.0 and score.escalate_precision is None
    assert score.accuracy == 0.5


def test_calibration_is_of_the_most_probable_decision() -> None:
    """Whatever the thresholds make of it: 9 of 10 at 0.9 are no error, none of 10 the largest."""
    chances = torch.tensor([[0.9, 0.06, 0.04]] * 10, dtype=torch.float64)
    labels = torch.tensor([ALLOW] * 9 + [REFUSE])
    score = score_decisions(chances, labels, (0.01, 0.5))
    assert score.calibration_error == pytest.approx(0.0, abs=1e-9)
    none = torch.full((10,), REFUSE)
    assert score_decisions(chances, none, (0.5, 0.5)).calibration_error == pytest.approx(0.9)


def merit(
    rows: list[list[float]], labels: list[int], refuse: float, allow: float
) -> tuple[float, ...]:
    """Refuse Recall up to its aim, then two precisions plus the mean recall."""
    found = reference_score(rows, labels, refuse, allow)
    score = {name: value or 0.0 for name, value in found.items()}
    recalls = [score[f"{name.lower()}_recall"] for name in DECISIONS]
    precise = min(score["allow_precision"], ALLOW_PRECISION)
    precise += min(score["escalate_precision"], ESCALATE_PRECISION)
    return min(score["refuse_recall"], REFUSE_RECALL), precise + sum(recalls) / 3


def test_thresholds_serve_the_stated_preference_best() -> None:
    """No pair of the grid is better, in float64 and by plain counting."""
    steps = [place / (GRID - 1) for place in range(GRID)]
    refusals = [MIN_REFUSE * (MAX_REFUSE / MIN_REFUSE) ** step for step in steps]
    grid = list(product(refusals, [0.1 + 0.85 * step for step in steps]))
    for seed, skill in ((0, 0.3), (1, 1.5), (2, 3.0)):
        logits, labels = drawn(24, seed, skill)
        chances = logits.double().softmax(dim=-1)
        rows, wanted = chances.tolist(), labels.tolist()
        found = fit_thresholds(chances, labels)
        best = max(merit(rows, wanted, *pair) for pair in grid)
        assert merit(rows, wanted, *found) == pytest.approx(best, abs=1e-12), skill
        assert MIN_REFUSE - 1e-6 <= found[0] <= MAX_REFUSE + 1e-6, skill
        assert 0.1 - 1e-6 <= found[1] <= 0.95 + 1e-6, skill


def test_refuse_recall_comes_first() -> None:
    """Prompts to refuse that look harmless pull the threshold down, at the cost of others."""
    rows = [[0.75, 0.05, 0.2]] * 5 + [[0.65, 0.05, 0.3]] * 5 + [[0.1, 0.8, 0.1]] * 5
    labels = torch.tensor([REFUSE] * 5 + [ALLOW] * 5 + [ESCALATE] * 5)
    thresholds = fit_thresholds(torch.tensor(rows, dtype=torch.float64), labels)
    assert thresholds[0] <= 0.2
    assert score_decisions(torch.tensor(rows), labels, thresholds).refuse_recall == 1.0


def test_thresholds_keep_away_from_the_edge() -> None:
    """Where many pairs are equally good, one is taken that has room on both sides."""
    rows = [[0.02, 0.02, 0.96]] * 9 + [[0.96, 0.02, 0.02]] * 9 + [[0.02, 0.96, 0.02]] * 9
    labels = torch.tensor([REFUSE] * 9 + [ALLOW] * 9 + [ESCALATE] * 9)
    refuse, allow = fit_thresholds(torch.tensor(rows), labels)
    assert 4 * 0.02 < refuse < 0.96 / 4  # thresholds of REFUSE are tried as ratios
    assert 0.2 < allow < 0.8
    assert score_decisions(torch.tensor(rows), labels, (refuse, allow)).accuracy == 1.0


def test_thresholds_of_one_sided_labels() -> None:
    """A single decision, or a single prompt, still gives two numbers within bounds."""
    for label, count in product((ALLOW, ESCALATE, REFUSE), (1, 12)):
        draw = torch.Generator().manual_seed(0)
        chances = torch.rand(count, 3, generator=draw).softmax(dim=-1)
        refuse, allow = fit_thresholds(chances, torch.full((count,), label))
        assert 0.0 < refuse < 1.0 and 0.0 < allow < 1.0, (label, count)


def test_the_temperature_fits_best() -> None:
    """Logits that were multiplied since their labels were drawn are divided by that again."""
    generator = torch.Generator().manual_seed(3)
    logits = 2.0 * torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)
    for factor in (0.3, 1.0, 4.0):
        assert fit_temperature(factor * logits, labels) == pytest.approx(factor, rel=0.08), factor
        rows, places = (factor * logits[:400]).numpy(), (np.arange(400), labels[:400].numpy())

        def surprise(temperature: float) -> float:
            """Mean −log p of the labels after division by a temperature."""
            weights = np.exp(rows / temperature)  # noqa: B023
            return float(-np.log((weights / weights.sum(axis=1, keepdims=True))[places]).mean())  # noqa: B023

        lowest = surprise(fit_temperature(factor * logits[:400], labels[:400]))
        assert lowest <= min(surprise(10 ** (step / 40)) for step in range(-40, 41)) + 1e-9, factor


def test_temperature_of_one_sided_cases_is_bounded() -> None:
    """Never 0 or infinite, so that the head can be divided by it."""
    logits = torch.tensor([[5.0, 0.0, 0.0]] * 3)
    assert fit_temperature(logits, torch.zeros(3, dtype=torch.int64)) == pytest.approx(0.1)
    assert fit_temperature(logits, torch.full((3,), REFUSE)) == pytest.approx(10.0)
