"""The teacher's voice: sampling follows the distribution, streams are independent, segments are forced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teachers.base import Sampling
from teachers.capture import fit_companion
from teachers.gguf_teacher import GGUFTeacher
from teachers.recipe import Recipe
from teachers.sampling import sample_rows


def frequencies(logits: np.ndarray, sampling: Sampling, draws: int = 20_000) -> np.ndarray:
    """Empirical distribution of ``sample_rows`` over evenly spread draws."""
    points = (np.arange(draws) + 0.5) / draws
    rows = np.repeat(logits[None].astype(np.float32), draws, axis=0)
    return np.bincount(sample_rows(rows, points, sampling), minlength=len(logits)) / draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_sampling_follows_the_softmax(temperature: float) -> None:
    """Frequencies equal softmax(z / T), computed here from the definition."""
    logits = np.array([2.0, -1.0, 0.5, 0.0, 3.0])
    expected = np.array([np.e ** (z / temperature) for z in logits])
    found = frequencies(logits, Sampling(temperature=temperature))
    assert np.abs(found - expected / expected.sum()).max() < 1e-3


def test_nucleus_keeps_the_smallest_sufficient_set() -> None:
    """top_p 0.6 of (0.5, 0.3, 0.15, 0.05) keeps the first two, renormalised."""
    logits = np.log(np.array([0.15, 0.5, 0.05, 0.3]))
    found = frequencies(logits, Sampling(top_p=0.6))
    assert np.abs(found - np.array([0, 0.5 / 0.8, 0, 0.3 / 0.8])).max() < 1e-3
    assert frequencies(logits, Sampling(top_p=1e-9))[1] == 1.0


def test_temperature_zero_is_greedy() -> None:
    """The most probable token, whatever the draw."""
    assert sample_rows(np.array([[0, 5, 1]], np.float32), np.array([0.999]), Sampling(temperature=0)) == [1]


def test_a_sequence_does_not_depend_on_its_company(tiny_teacher: GGUFTeacher) -> None:
    """Request i draws from stream i: alone or among others it says the same."""
    start = [np.array([tiny_teacher.info.bos], dtype=np.int32)]
    sampling = Sampling(max_length=24, seed=5)
    together = tiny_teacher.speak([start] * 5, sampling)
    alone = tiny_teacher.speak([start], sampling, first_index=3)[0]
    assert np.array_equal(together[3], alone)
    assert not np.array_equal(together[0], together[1])
    other_seed = tiny_teacher.speak([start], Sampling(max_length=24, seed=6))[0]
    assert not np.array_equal(together[0], other_seed)


def test_streams_have_numbers_also_across_lanes(tiny_teacher: GGUFTeacher, tiny_teacher_path: Path) -> None:
    """Request i draws from stream first_index + i, whichever lane it falls to and however many there are."""
    start = [np.array([tiny_teacher.info.bos], dtype=np.int32)]
    sampling = Sampling(max_length=16, seed=5)
    whole = tiny_teacher.speak([start] * 7, sampling)
    later = tiny_teacher.speak([start] * 4, sampling, first_index=3)
    with GGUFTeacher(tiny_teacher_path, threads=2) as teacher:
        counts: list[int] = []
        lanes = teacher.speak([start] * 7, sampling, progress=counts.append)
        lanes_later = teacher.speak([start] * 4, sampling, first_index=3)
    assert counts == list(range(1, 8))
    for one, other in zip([*whole, *whole[3:], *whole[3:]], [*lanes, *later, *lanes_later], strict=True):
        assert np.array_equal(one, other)
    assert len({tokens.tobytes() for tokens in whole}) == 7


def test_greedy_speech_equals_step_by_step_argmax(tiny_teacher: GGUFTeacher) -> None:
    """Decoding many together gives what scoring each prefix anew gives; prompts of different lengths."""
    starts = [np.array([tiny_teacher.info.bos, *range(5, 5 + n)], dtype=np.int32) for n in range(1, 5)]
    spoken = tiny_teacher.speak([[start] for start in starts], Sampling(temperature=0, max_length=14))
    for start, tokens in zip(starts, spoken, strict=True):
        assert np.array_equal(tokens[: len(start)], start) and len(tokens) <= 14
        rows = tiny_teacher.logits([tokens])
        assert np.array_equal(rows[len(start) - 1 :].argmax(axis=-1), tokens[len(start) :])


def test_forced_segments_stand_in_the_text(tiny_teacher: GGUFTeacher) -> None:
    """A second segment replaces the end of the first turn; the whole never exceeds max_length."""
    first, second = np.array([tiny_teacher.info.bos, 9], np.int32), np.array([7, 8, 7, 8], np.int32)
    sequences = tiny_teacher.speak([[first, second]] * 40, Sampling(temperature=4.0, max_length=200, seed=1))
    ends = set(tiny_teacher.info.end_tokens)
    forced = 0
    for tokens in sequences:
        assert len(tokens) <= 200
        inner = tokens[:-1].tolist()
        assert not ends & set(inner[1:]), "an end token stands inside a sequence"
        forced += any(inner[at : at + 4] == [7, 8, 7, 8] for at in range(len(inner)))
    assert forced > 0


def test_max_length_is_reached_exactly(tiny_teacher: GGUFTeacher) -> None:
    """Without an end token a sequence has exactly max_length tokens."""
    start = [np.array([tiny_teacher.info.bos], dtype=np.int32)]
    lengths = {len(t) for t in tiny_teacher.speak([start] * 8, Sampling(max_length=9, seed=2))}
    assert max(lengths) == 9


RECIPES = {
    "dense": Recipe("dense"),
    "hidden": Recipe("hidden"),
    "buckets": Recipe(num_topk=5),
    "sketch": Recipe(num_topk=5, sketch_bytes=20),
    "layers": Recipe(num_topk=5, layers=(0, 1), layer_bytes=16),
}


@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_said_is_scored_on_the_way(
    tiny_teacher: GGUFTeacher, tiny_teacher_path: Path, threads: int
) -> None:
    """The same words as speaking alone, the same answer as scoring afterwards, position by position."""
    bos = tiny_teacher.info.bos
    then = np.array([7, 8, 7], np.int32)
    requests = [
        [np.array([bos, *range(5, 5 + n)], np.int32), *[then] * (place % 3)]
        for place, n in enumerate((0, 3, 170, 2, 40, 1, 158, 159, 157, *range(12)))
    ]
    sampling = Sampling(temperature=4.0, max_length=160, seed=9)
    said = tiny_teacher.speak(requests, sampling, first_index=2)
    lengths = {len(row) for row in said}
    assert 160 in lengths and len(lengths) > 1, "some end by themselves, some at max_length"
    with GGUFTeacher(tiny_teacher_path, threads=threads) as teacher:
        for kind, recipe in RECIPES.items():
            bases = fit_companion(tiny_teacher, said, recipe).bases
            expected = tiny_teacher.score(said, recipe, bases)
            counts: list[int] = []
            tokens, arrays = teacher.speak_and_score(
                requests, sampling, recipe, bases, first_index=2, progress=counts.append
            )
            assert len(tokens) == len(said) and counts == sorted(counts)
            assert all(np.array_equal(one, other) for one, other in zip(tokens, said, strict=True))
            assert list(arrays) == list(expected), kind
            for name, rows in arrays.items():
                assert rows.dtype == expected[name].dtype and rows.shape == expected[name].shape
                apart = np.abs(rows.astype(np.float64) - expected[name].astype(np.float64))
                if rows.dtype.kind in "iu":  # codes and ids: no more than a tie
                    assert (apart > 0).mean() < 1e-3, (kind, name)
                else:
                    assert apart.max() < (4e-3 if rows.dtype == np.float16 else 1e-4), (kind, name)


def test_scored_speech_does_not_depend_on_its_company(tiny_teacher: GGUFTeacher) -> None:
    """A long and a short request, alone or together with more than fit at once."""
    bos = tiny_teacher.info.bos
    requests = [[np.array([bos, *range(5, 5 + n)], np.int32)] for n in (100, 0, 600, *range(20, 160))]
    sampling = Sampling(max_length=120, seed=4)
    tokens, arrays = tiny_teacher.speak_and_score(requests, sampling, Recipe("dense"), {})
    starts = np.concatenate(([0], np.cumsum([len(row) - 1 for row in tokens])))
    assert len(tokens) == len(requests) > 128 and starts[-1] == len(arrays["logits"])
    for index in (0, 1, 2, 50, 142):
        alone, rows = tiny_teacher.speak_and_score(
            [requests[index]], sampling, Recipe("dense"), {}, first_index=index
        )
        assert np.array_equal(alone[0], tokens[index]) and len(alone[0]) <= 120
        among: Any = arrays["logits"][starts[index] : starts[index + 1]]
        assert np.abs(among - rows["logits"]).max() < 1e-4
