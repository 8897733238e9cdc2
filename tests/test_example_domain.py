"""The example teacher's domain: right sums, right decisions, one answer per request, clean held-out split."""

from __future__ import annotations

import random
import re
from collections import defaultdict

import pytest

from tools.example_domain import (
    FAMILIES,
    HELD_OUT_SHARE,
    Example,
    check_answer,
    examples,
    is_held_out,
    make_example,
)

DRAWN = examples(seed=3, n=6000, held_out=None)


def numbers(pattern: str, text: str) -> list[list[int]]:
    """All matches of ``pattern``, its groups as integers."""
    return [[int(group) for group in match.groups()] for match in re.finditer(pattern, text)]


def test_same_seed_gives_the_same_examples() -> None:
    assert examples(7, 50) == examples(7, 50)
    assert examples(7, 50) != examples(8, 50)


def test_every_family_language_and_decision_occurs() -> None:
    seen: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for example in DRAWN:
        seen[example.family].add((example.language, example.decision))
    assert set(seen) == set(FAMILIES)
    for combinations in seen.values():
        assert len(combinations) == 6  # two languages, three decisions


def test_one_answer_per_request() -> None:
    answers: dict[str, str] = {}
    for example in DRAWN:
        assert answers.setdefault(example.prompt, example.answer) == example.answer


def test_products_are_right() -> None:
    found = 0
    for example in DRAWN:
        for n, factor, tens, ones, total in numbers(
            r"(\d+) x (\d+) = (\d+) \+ (\d+) = (\d+)", example.answer
        ):
            assert n * factor == tens + ones == total
            found += 1
    assert found > 1000


def test_differences_are_right() -> None:
    found = 0
    for example in DRAWN:
        for left, right, rest in numbers(r"(?<!= )\b(\d+) - (\d+) = (?:\d+ - \d+ = )?(\d+)", example.answer):
            assert left - right == rest
            found += 1
    assert found > 500


@pytest.mark.parametrize(
    ("sign", "holds"), [("<=", int.__le__), (">=", int.__ge__), ("<", int.__lt__), (">", int.__gt__)]
)
def test_comparisons_are_right(sign: str, holds: object) -> None:
    assert callable(holds)
    pairs = [
        pair
        for example in DRAWN
        for pair in numbers(rf"(?=(?<!\d)(\d+)(?: h)? {sign} (\d+))", example.answer)
    ]
    assert len(pairs) > 100
    assert all(holds(left, right) for left, right in pairs)


def decision_of_purchase(example: Example) -> str:
    """Works the decision out again from the numbers in the answer."""
    found = numbers(r"= (\d+)[.。]\D*(\d+)", example.answer)
    if not found:
        return "REFUSE"
    total, budget = found[0]
    return "ALLOW" if total <= budget else "ESCALATE" if total <= 2 * budget else "REFUSE"


def test_purchase_decisions_follow_the_budget() -> None:
    for example in DRAWN:
        if example.family == "purchase":
            assert decision_of_purchase(example) == example.decision


def test_trips_count_up_to_the_distance() -> None:
    for example in DRAWN:
        steps = numbers(r"(\d+) h (\d+)", example.answer)
        if example.family == "travel" and steps:
            assert all(reached == hour * steps[0][1] for hour, reached in steps)
            assert f"{steps[-1][1]} km" in example.prompt or f"{steps[-1][1]}km" in example.prompt


def test_answers_name_their_decision_once() -> None:
    for example in DRAWN:
        label = "Decision" if example.language == "en" else "判定"
        assert example.answer.count(f"\n{label}: {example.decision}\n") == 1
        assert "{" not in example.prompt + example.answer


def test_check_answer_is_exact_but_for_outer_white_space() -> None:
    example = DRAWN[0]
    assert check_answer(example, f"\n {example.answer} \n")
    assert not check_answer(example, example.answer + ".")
    assert not check_answer(example, example.answer.replace("\n", " "))


def test_held_out_requests_never_occur_in_training() -> None:
    training = {example.prompt for example in examples(1, 8000, held_out=False)}
    held_out = {example.prompt for example in examples(2, 2000, held_out=True)}
    assert not training & held_out


def test_held_out_products_never_occur_in_training() -> None:
    pattern = r"(\d+) x (\d+) ="
    training = {tuple(pair) for e in examples(1, 8000) for pair in numbers(pattern, e.answer)}
    held_out = {tuple(pair) for e in examples(2, 2000, held_out=True) for pair in numbers(pattern, e.answer)}
    assert held_out
    assert not training & held_out


def test_held_out_share() -> None:
    share = sum(is_held_out(f"key:{number}") for number in range(20000)) / 20000
    assert abs(share - 1 / HELD_OUT_SHARE) < 0.01


def test_make_example_respects_the_split() -> None:
    assert make_example(random.Random(0), held_out=True) != make_example(random.Random(0), held_out=False)
