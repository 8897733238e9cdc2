"""A transformers folder speaks: decoding over one cache is exact, streams are independent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from teachers.base import Sampling, Tokens
from teachers.huggingface import generation
from teachers.huggingface.teacher import HuggingFaceTeacher
from teachers.targets.recipe import Recipe
from tests.support.teachers import (
    assert_forced_segments_stand,
    assert_greedy,
    assert_max_length_is_reached,
)
from tests.support.tiny_checkpoint import BOS, make_folder

VOCAB = 300


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTeacher:
    """A sound checkpoint, loaded."""
    return HuggingFaceTeacher(
        make_folder(tmp_path_factory.mktemp("speech") / "tiny", vocab_size=VOCAB)
    )


def start(*tokens: int) -> Tokens:
    """A forced segment."""
    return np.array(tokens, dtype=np.int32)


def test_speech_follows_the_logits_and_what_is_forced(
    teacher: HuggingFaceTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many together or two at a time; sliding windows see the same in the cache, padding or not."""
    assert_greedy(teacher, (1, 9, 4, 2, 6), 24)
    assert_forced_segments_stand(teacher, 3.0)
    assert_max_length_is_reached(teacher)
    windows = HuggingFaceTeacher(make_folder(tmp_path, kind="mistral", sliding_window=6))
    assert_greedy(windows, (1, 12, 4), 30)
    monkeypatch.setattr(generation, "PARALLEL_SEQUENCES", 2)
    assert_greedy(teacher, (1, 9, 4, 2, 6), 24)


def test_greedy_speech_with_forced_segments_equals_argmax(teacher: HuggingFaceTeacher) -> None:
    """Every token that is not forced is the most probable one after all that stands before it.

    All tokens count as ends here: each turn is one token, and the next segment replaces it.
    """
    requests = [[start(BOS, 5), start(7, 8, 9), start(11)], [start(BOS, 5, 6, 7, 9), start(12)]]
    spoken = generation.speak(
        teacher._model.model,
        requests,
        Sampling(temperature=0, max_length=40),
        first_index=0,
        end_tokens=range(VOCAB),
        progress=lambda done: None,
    )
    for request, tokens in zip(requests, spoken, strict=True):
        forced = np.concatenate(request)
        assert np.array_equal(tokens[:-1], forced)
        assert tokens[-1] == teacher.logits([np.append(forced, 0).astype(np.int32)])[-1].argmax()


def test_a_sequence_does_not_depend_on_its_company(teacher: HuggingFaceTeacher) -> None:
    """Request i draws from stream i: alone or among others it says the same."""
    sampling = Sampling(max_length=24, seed=5, top_p=0.9)
    together = teacher.speak([[start(BOS)]] * 5, sampling)
    assert np.array_equal(together[3], teacher.speak([[start(BOS)]], sampling, first_index=3)[0])
    assert not np.array_equal(together[0], together[1])
    other = teacher.speak([[start(BOS)]], Sampling(max_length=24, seed=6, top_p=0.9))[0]
    assert not np.array_equal(together[0], other)


def test_forced_tokens_alone(teacher: HuggingFaceTeacher) -> None:
    """They may fill the text; nothing to speak from is refused."""
    sampling, long = Sampling(max_length=9, seed=2), start(*range(5, 25))
    assert np.array_equal(teacher.speak([[long]], sampling)[0], long[:9])
    with pytest.raises(ValueError, match="request 0 to speak has no forced tokens"):
        teacher.speak([[start()]], sampling)


def test_speak_and_score_is_both(teacher: HuggingFaceTeacher) -> None:
    """The words of ``speak``, and what ``score`` says about them; progress counts sequences."""
    requests, sampling = [[start(BOS)]] * 6, Sampling(max_length=20, seed=4)
    reports: list[int] = []
    said, arrays = teacher.speak_and_score(
        requests, sampling, Recipe("dense"), {}, first_index=2, progress=reports.append
    )
    expected = teacher.speak(requests, sampling, first_index=2)
    assert len(said) == len(expected) and all(map(np.array_equal, said, expected))
    assert np.array_equal(arrays["logits"], teacher.score(said, Recipe("dense"), {})["logits"])
    assert reports == sorted(reports) and reports[-1] == 6
    assert min(teacher.speed(16, 4)) > 0
