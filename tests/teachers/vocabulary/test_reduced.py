"""Where the mass of dropped tokens goes, by the definition."""

from __future__ import annotations

import numpy as np
import pytest

from teachers.vocabulary.reduced import ReducedVocabulary, VocabularyError, check_reduced


def drawn(draw: np.random.Generator, old: int, new: int) -> ReducedVocabulary:
    """A reduced vocabulary whose dropped tokens go anywhere."""
    kept = np.sort(draw.permutation(old)[:new]).astype(np.int64)
    first = draw.integers(0, new, old)
    first[kept] = np.arange(new)
    return ReducedVocabulary(kept, first)


def test_mass_goes_to_the_first_piece() -> None:
    """Token by token; nothing is lost, nothing else moves, and logarithms say the same."""
    draw = np.random.default_rng(0)
    for old, new in ((1, 1), (9, 1), (9, 9), (50, 20), (500, 499)):
        vocabulary = drawn(draw, old, new)
        logits = draw.normal(0, 4, (2, 3, old))
        whole = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        whole[0, 0, :] = np.eye(old)[old - 1]  # all of it in one token
        expected = np.zeros((2, 3, new))
        for token in range(old):
            kept = np.flatnonzero(vocabulary.kept == token)
            goes = int(kept[0]) if len(kept) else int(vocabulary.first_piece[token])
            assert vocabulary.new_ids[token] == (goes if len(kept) else -1)
            expected[..., goes] += whole[..., token]
        folded = vocabulary.fold(whole)
        assert np.allclose(folded, expected, rtol=1e-13, atol=0), (old, new)
        assert np.allclose(folded.sum(axis=-1), 1, rtol=1e-14), (old, new)
        with np.errstate(divide="ignore"):
            logs = vocabulary.fold_logs(np.log(whole) - 1000)
            assert np.allclose(logs, np.log(expected) - 1000, rtol=1e-12), (old, new)


def test_damaged_lists_are_refused() -> None:
    """Arrays of a file that anybody may have written."""
    good = np.array([0, 2, 3]), np.array([0, 2, 1, 2])
    assert check_reduced(*good).fold(np.array([1, 2, 3, 4])).tolist() == [1, 3, 6]
    bad = {
        "empty": (np.array([], int), np.array([], int)),
        "not rising": (np.array([0, 3, 2]), good[1]),
        "twice": (np.array([0, 2, 2]), good[1]),
        "negative": (np.array([-1, 2, 3]), good[1]),
        "beyond": (np.array([0, 2, 4]), good[1]),
        "piece beyond": (good[0], np.array([0, 3, 1, 2])),
        "piece negative": (good[0], np.array([0, -1, 1, 2])),
        "not its own": (good[0], np.array([0, 2, 2, 2])),
        "floats": (good[0].astype(float), good[1]),
        "two dimensions": (good[0][None], good[1]),
    }
    for name, arrays in bad.items():
        with pytest.raises(VocabularyError, match="damaged"):
            check_reduced(*arrays)
            pytest.fail(name)
