"""The example teacher's domain: right sums and decisions, one answer per request."""

from __future__ import annotations

import operator
import random
import re
from collections import defaultdict

from tools.example_teacher.domain import (
    FAMILIES,
    HELD_OUT_SHARE,
    Example,
    check_answer,
    examples,
    is_held_out,
    make_example,
)

DRAWN = examples(seed=3, n=6000, held_out=None)
COMPARISONS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}


def numbers(pattern: str, text: str) -> list[list[int]]:
    """All matches of ``pattern``, its groups as integers."""
    return [[int(group) for group in match.groups()] for match in re.finditer(pattern, text)]


def drawn(pattern: str) -> list[list[int]]:
    """The same over all drawn answers."""
    return [found for example in DRAWN for found in numbers(pattern, example.answer)]


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


def test_sums_are_right() -> None:
    """Every product, difference and comparison in an answer, worked out again."""
    products = drawn(r"(\d+) x (\d+) = (\d+) \+ (\d+) = (\d+)")
    for n, factor, tens, ones, total in products:
        assert n * factor == tens + ones == total, (n, factor)
    differences = drawn(r"(?<!= )\b(\d+) - (\d+) = (?:\d+ - \d+ = )?(\d+)")
    for left, right, rest in differences:
        assert left - right == rest, (left, right)
    assert len(products) > 1000 and len(differences) > 500
    for sign, holds in COMPARISONS.items():
        pairs = drawn(rf"(?=(?<!\d)(\d+)(?: h)? {sign} (\d+))")
        assert len(pairs) > 100, sign
        assert all(holds(left, right) for left, right in pairs), sign


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


def test_the_held_out_split_shares_nothing_with_training() -> None:
    """Neither requests nor products."""
    training, held_out = examples(1, 8000), examples(2, 2000, held_out=True)
    assert not {one.prompt for one in training} & {one.prompt for one in held_out}

    def products(drawn: list[Example]) -> set[tuple[int, ...]]:
        pattern = r"(\d+) x (\d+) ="
        return {tuple(pair) for one in drawn for pair in numbers(pattern, one.answer)}

    assert products(held_out)
    assert not products(training) & products(held_out)


def test_held_out_share() -> None:
    share = sum(is_held_out(f"key:{number}") for number in range(20000)) / 20000
    assert abs(share - 1 / HELD_OUT_SHARE) < 0.01

    one, other = (make_example(random.Random(0), held_out=held) for held in (True, False))
    assert one != other
