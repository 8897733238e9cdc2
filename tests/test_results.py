"""The table at the end of a run, in words."""

from __future__ import annotations

import pytest

from distill.results import _times


@pytest.mark.parametrize(
    ("ratio", "words"),
    [(6.14, "6.1× smaller"), (1.0, "1.0× smaller"), (0.4, "2.5× larger")],
)
def test_a_student_may_be_larger_than_its_teacher(ratio: float, words: str) -> None:
    """Not 0.4 times smaller."""
    assert _times(ratio, "smaller", "larger") == words
