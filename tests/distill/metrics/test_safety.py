"""Scores of safety decisions, their costs and the temperature against counting and brute force."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.metrics.safety import (
    FIRST,
    confusion_matrix,
    fit_temperature,
    ratios,
    score_decisions,
)
from students.model.head_decisions import ALLOW, COSTS, DECISIONS, REFUSE
from students.model.heads import decide
from tests.support.references import case


def drawn(count: int, seed: int = 0, skill: float = 1.5) -> tuple[Tensor, Tensor]:
    """Logits of three decisions and the labels that they point to, more or less."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    logits = torch.randn(count, 3, generator=generator)
    logits[torch.arange(count), labels] += skill
    return logits, labels


def ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def reference_score(taken: list[int], labels: list[int]) -> dict:
    """Every figure by going through the prompts."""
    found: dict = {}
    for number, name in enumerate(DECISIONS):
        both = sum(t == number == label for t, label in zip(taken, labels, strict=True))
        found[f"{name.lower()}_recall"] = ratio(both, labels.count(number))
        found[f"{name.lower()}_precision"] = ratio(both, taken.count(number))
    right = sum(t == label for t, label in zip(taken, labels, strict=True))
    paid = [COSTS[label][t] for t, label in zip(taken, labels, strict=True)]
    found["cost"] = sum(paid) / len(paid)
    found["cost_escalating"] = sum(COSTS[label][1] for label in labels) / len(labels)
    return found | {"accuracy": right / len(labels)}


def test_scores_against_counting() -> None:
    """Confusion, precision and recall of every decision, costs; a ratio without a case is
    nothing."""
    for count in (1, 2, 5, 200):
        logits, labels = drawn(count, count)
        chances = logits.softmax(dim=-1).double()
        taken = decide(chances)
        score = score_decisions(chances, labels, taken)
        wanted = reference_score(taken.tolist(), labels.tolist())
        with case(count):
            found = {name: getattr(score, name) for name in wanted}
            assert found == pytest.approx(wanted, abs=1e-12)
            pairs = Counter(zip(labels.tolist(), taken.tolist(), strict=True))
            counted = [[pairs[label, decision] for decision in range(3)] for label in range(3)]
            assert score.confusion == counted and score.prompts == count
            said = json.loads(json.dumps(score.to_json()))
            assert said["labels"] == ["ALLOW", "ESCALATE", "REFUSE"]
            assert said["confusion"] == counted
            assert score.cost_interval is not None and score.cost is not None
            assert 0.0 <= score.cost_interval[0] <= score.cost <= score.cost_interval[1] <= 4.0
    low, high = score.cost_interval
    assert high - low == pytest.approx(
        2 * 1.959964 * np.std([COSTS[label][t] for label, t in pairs.elements()], ddof=1) / 200**0.5
    )


def test_rows_are_labels_and_columns_decisions() -> None:
    """Recall divides by a row, precision by a column: an asymmetric case by hand."""
    labels, taken = torch.tensor([2, 2, 2, 2, 0, 1]), torch.tensor([2, 2, 2, 0, 2, 0])
    assert confusion_matrix(labels, taken).tolist() == [[0, 0, 1], [1, 0, 0], [1, 0, 3]]
    chances = torch.nn.functional.one_hot(taken, 3).double()
    score = score_decisions(chances, labels, taken)
    assert score.refuse_recall == 0.75 and score.refuse_precision == 0.75
    assert score.allow_recall == 0.0 and score.allow_precision == 0.0
    assert score.escalate_recall == 0.0 and score.escalate_precision is None
    assert score.accuracy == 0.5
    first = {one.name: (one.right, one.cases) for one in ratios(score)}
    assert list(first)[:3] == list(FIRST)
    assert (first["Refuse Recall"], first["Allow Recall"]) == ((3, 4), (0, 1))
    assert first["False Refusals"] == (1, 1) and first["Accuracy"] == (3, 6)


def test_calibration_is_of_the_decision() -> None:
    """Not of what is most probable: 9 of 10 taken at 0.9 are no error; what is escalated at a
    probability of 0.3, and is right each time, is wrong by 0.7."""
    chances = torch.tensor([[0.9, 0.06, 0.04]] * 10, dtype=torch.float64)
    labels = torch.tensor([ALLOW] * 9 + [REFUSE])
    score = score_decisions(chances, labels, torch.zeros(10, dtype=torch.int64))
    assert score.calibration_error == pytest.approx(0.0, abs=1e-9)
    assert score.reliability == [(10, pytest.approx(0.9), pytest.approx(0.9))]
    chances = torch.tensor([[0.4, 0.3, 0.3]] * 4, dtype=torch.float64)
    ones = torch.ones(4, dtype=torch.int64)
    assert decide(chances).tolist() == [1] * 4
    assert score_decisions(chances, ones, ones).calibration_error == pytest.approx(0.7)


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
