"""The teacher's voice: sampling follows the distribution, streams are independent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teachers.base import Sampling
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.sampling import sample_rows
from teachers.store.capture import fit_companion
from teachers.targets.recipe import Recipe
from tests.support.teachers import (
    assert_forced_segments_stand,
    assert_greedy,
    assert_max_length_is_reached,
    begun,
)


@pytest.fixture(scope="module")
def two_lanes(tiny_teacher_path: Path) -> Iterator[GGUFTeacher]:
    """The tiny teacher on two threads: two contexts work side by side."""
    with GGUFTeacher(tiny_teacher_path, threads=2) as teacher:
        yield teacher


def frequencies(logits: np.ndarray, sampling: Sampling, draws: int = 20_000) -> np.ndarray:
    """Empirical distribution of ``sample_rows`` over evenly spread draws."""
    points = (np.arange(draws) + 0.5) / draws
    rows = np.repeat(logits[None].astype(np.float32), draws, axis=0)
    return np.bincount(sample_rows(rows, points, sampling), minlength=len(logits)) / draws


def test_sampling_follows_the_softmax() -> None:
    """Frequencies equal softmax(z / T), computed here from the definition."""
    logits = np.array([2.0, -1.0, 0.5, 0.0, 3.0])
    for temperature in (0.5, 1.0, 3.0):
        expected = np.exp(logits / temperature)
        found = frequencies(logits, Sampling(temperature=temperature))
        assert np.abs(found - expected / expected.sum()).max() < 1e-3, temperature


def test_nucleus_keeps_the_smallest_sufficient_set() -> None:
    """top_p 0.6 of (0.5, 0.3, 0.15, 0.05) keeps the first two, renormalised."""
    logits = np.log(np.array([0.15, 0.5, 0.05, 0.3]))
    found = frequencies(logits, Sampling(top_p=0.6))
    assert np.abs(found - np.array([0, 0.5 / 0.8, 0, 0.3 / 0.8])).max() < 1e-3
    assert frequencies(logits, Sampling(top_p=1e-9))[1] == 1.0


def test_temperature_zero_is_greedy() -> None:
    """The most probable token, whatever the draw."""
    rows, points = np.array([[0, 5, 1]], np.float32), np.array([0.999])
    assert sample_rows(rows, points, Sampling(temperature=0)) == [1]


def test_a_sequence_depends_on_its_stream_alone(
    tiny_teacher: GGUFTeacher, two_lanes: GGUFTeacher
) -> None:
    """Request i draws from stream first_index + i, alone or in company, on any lane."""
    start, sampling = [begun(tiny_teacher)], Sampling(max_length=24, seed=5)
    whole = tiny_teacher.speak([start] * 7, sampling)
    assert len({tokens.tobytes() for tokens in whole}) == 7
    assert np.array_equal(whole[3], tiny_teacher.speak([start], sampling, first_index=3)[0])
    counts: list[int] = []
    for teacher in (tiny_teacher, two_lanes):
        again = teacher.speak([start] * 7, sampling, progress=counts.append)
        later = teacher.speak([start] * 4, sampling, first_index=3)
        for one, other in zip([*whole, *whole[3:]], [*again, *later], strict=True):
            assert np.array_equal(one, other), teacher.threads
    assert counts == [*range(1, 8)] * 2
    other_seed = tiny_teacher.speak([start], Sampling(max_length=24, seed=6))[0]
    assert not np.array_equal(whole[0], other_seed)


def test_speech_follows_the_logits_and_what_is_forced(tiny_teacher: GGUFTeacher) -> None:
    """Greedy speech is the argmax of the logits; forced segments and max_length are kept to."""
    assert_greedy(tiny_teacher, range(1, 5), 14)
    assert_forced_segments_stand(tiny_teacher, 4.0)
    assert_max_length_is_reached(tiny_teacher)


RECIPES = {
    "dense": Recipe("dense"),
    "hidden": Recipe("hidden"),
    "buckets": Recipe(num_topk=5),
    "sketch": Recipe(num_topk=5, sketch_bytes=20),
    "layers": Recipe(num_topk=5, layers=(0, 1), layer_bytes=16),
}


def test_what_is_said_is_scored_on_the_way(
    tiny_teacher: GGUFTeacher, two_lanes: GGUFTeacher
) -> None:
    """The same words as speaking alone, the same answer as scoring afterwards, on each lane."""
    then = np.array([7, 8, 7], np.int32)
    requests = [
        [begun(tiny_teacher, *range(5, 5 + n)), *[then] * (place % 3)]
        for place, n in enumerate((0, 3, 110, 2, 40, 1, 98, 99, 97, *range(12)))
    ]
    sampling = Sampling(temperature=4.0, max_length=100, seed=9)
    said = tiny_teacher.speak(requests, sampling, first_index=2)
    lengths = {len(row) for row in said}
    assert 100 in lengths and len(lengths) > 1, "some end by themselves, some at max_length"
    for kind, recipe in RECIPES.items():
        bases = fit_companion(tiny_teacher, said, recipe).bases
        expected = tiny_teacher.score(said, recipe, bases)
        for teacher in (tiny_teacher, two_lanes):
            counts: list[int] = []
            tokens, arrays = teacher.speak_and_score(
                requests, sampling, recipe, bases, first_index=2, progress=counts.append
            )
            assert len(tokens) == len(said) and counts == sorted(counts)
            assert all(map(np.array_equal, tokens, said))
            assert list(arrays) == list(expected), kind
            for name, rows in arrays.items():
                case = (kind, name, teacher.threads)
                assert rows.dtype == expected[name].dtype, case
                assert rows.shape == expected[name].shape, case
                apart = np.abs(rows.astype(np.float64) - expected[name].astype(np.float64))
                if rows.dtype.kind in "iu":  # codes and ids: no more than a tie
                    assert (apart > 0).mean() < 1e-3, case
                else:
                    assert apart.max() < (4e-3 if rows.dtype == np.float16 else 1e-4), case


def test_scored_speech_does_not_depend_on_its_company(tiny_teacher: GGUFTeacher) -> None:
    """A long and a short request, alone or together with more than fit at once."""
    requests = [[begun(tiny_teacher, *range(5, 5 + n))] for n in (100, 0, 600, *range(20, 160))]
    sampling, dense = Sampling(max_length=120, seed=4), Recipe("dense")
    tokens, arrays = tiny_teacher.speak_and_score(requests, sampling, dense, {})
    starts = np.concatenate(([0], np.cumsum([len(row) - 1 for row in tokens])))
    assert len(tokens) == len(requests) > 128 and starts[-1] == len(arrays["logits"])
    for index in (0, 1, 2, 50, 142):
        alone, rows = tiny_teacher.speak_and_score(
            [requests[index]], sampling, dense, {}, first_index=index
        )
        assert np.array_equal(alone[0], tokens[index]) and len(alone[0]) <= 120
        among: Any = arrays["logits"][starts[index] : starts[index + 1]]
        assert np.abs(among - rows["logits"]).max() < 1e-4, index
