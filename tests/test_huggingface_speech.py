"""A transformers folder speaks: decoding over one cache is exact, streams are independent, segments forced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from teachers import huggingface_speech
from teachers.base import Sampling, Tokens
from teachers.huggingface import HuggingFaceTeacher
from teachers.recipe import Recipe
from tests.tiny_checkpoint import BOS, END, EOS, make_folder

VOCAB = 300


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTeacher:
    """A sound checkpoint, loaded."""
    return HuggingFaceTeacher(make_folder(tmp_path_factory.mktemp("speech") / "tiny", vocab_size=VOCAB))


def start(*tokens: int) -> Tokens:
    """A forced segment."""
    return np.array(tokens, dtype=np.int32)


def test_greedy_speech_equals_step_by_step_argmax(
    teacher: HuggingFaceTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding many together over one cache gives what scoring each whole text anew gives."""
    starts = [start(BOS, *range(5, 5 + n)) for n in (1, 9, 4, 2, 6)]
    for together in (128, 2):
        monkeypatch.setattr(huggingface_speech, "PARALLEL_SEQUENCES", together)
        spoken = teacher.speak([[one] for one in starts], Sampling(temperature=0, max_length=24))
        for begun, tokens in zip(starts, spoken, strict=True):
            assert np.array_equal(tokens[: len(begun)], begun) and len(tokens) <= 24
            rows = teacher.logits([tokens])
            assert np.array_equal(rows[len(begun) - 1 :].argmax(axis=-1), tokens[len(begun) :])


def test_sliding_windows_see_the_same_in_the_cache(tmp_path: Path) -> None:
    """Left padding and ended neighbours do not shift what a window of 6 tokens covers."""
    teacher = HuggingFaceTeacher(make_folder(tmp_path, kind="mistral", sliding_window=6))
    starts = [start(BOS, *range(5, 5 + n)) for n in (1, 12, 4)]
    spoken = teacher.speak([[one] for one in starts], Sampling(temperature=0, max_length=30))
    for begun, tokens in zip(starts, spoken, strict=True):
        rows = teacher.logits([tokens])
        assert np.array_equal(rows[len(begun) - 1 :].argmax(axis=-1), tokens[len(begun) :])


def test_greedy_speech_with_forced_segments_equals_argmax(teacher: HuggingFaceTeacher) -> None:
    """Every token that is not forced is the most probable one after all that stands before it.

    All tokens count as ends here, so that each turn is one token long and is replaced by the next segment.
    """
    requests = [[start(BOS, 5), start(7, 8, 9), start(11)], [start(BOS, 5, 6, 7, 9), start(12)]]
    spoken = huggingface_speech.speak(
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


def test_forced_segments_stand_in_place_of_ends(teacher: HuggingFaceTeacher) -> None:
    """Random speech: no end inside a text, the second segment where the first turn ended, lengths kept."""
    requests = [[start(BOS, 9), start(7, 8, 7, 8)]] * 40
    reports: list[int] = []
    sampling = Sampling(temperature=3.0, max_length=200, seed=1)
    sequences = teacher.speak(requests, sampling, progress=reports.append)
    forced = 0
    for tokens in sequences:
        assert len(tokens) <= 200
        inner = tokens[:-1].tolist()
        assert not {EOS, END} & set(inner), "an end token stands inside a sequence"
        forced += any(inner[at : at + 4] == [7, 8, 7, 8] for at in range(len(inner)))
    assert forced > 0
    assert reports == sorted(set(reports)) and reports[-1] == 40


def test_a_sequence_does_not_depend_on_its_company(teacher: HuggingFaceTeacher) -> None:
    """Request i draws from stream i: alone or among others it says the same."""
    sampling = Sampling(max_length=24, seed=5, top_p=0.9)
    together = teacher.speak([[start(BOS)]] * 5, sampling)
    assert np.array_equal(together[3], teacher.speak([[start(BOS)]], sampling, first_index=3)[0])
    assert not np.array_equal(together[0], together[1])
    other = teacher.speak([[start(BOS)]], Sampling(max_length=24, seed=6, top_p=0.9))[0]
    assert not np.array_equal(together[0], other)


def test_speech_lengths(teacher: HuggingFaceTeacher) -> None:
    """max_length is reached exactly, also by forced tokens alone; nothing to speak from is refused."""
    sampling = Sampling(max_length=9, seed=2)
    assert max(len(tokens) for tokens in teacher.speak([[start(BOS)]] * 8, sampling)) == 9
    long = start(*range(5, 25))
    assert np.array_equal(teacher.speak([[long]], sampling)[0], long[:9])
    with pytest.raises(ValueError, match="request 0 to speak has no forced tokens"):
        teacher.speak([[start()]], sampling)


def test_speed(teacher: HuggingFaceTeacher) -> None:
    """Both rates are positive."""
    assert min(teacher.speed(16, 4)) > 0


def test_speak_and_score_is_both(teacher: HuggingFaceTeacher) -> None:
    """The same words as ``speak``, and what ``score`` says about them; progress counts sequences."""
    requests, sampling, recipe = [[start(BOS)]] * 6, Sampling(max_length=20, seed=4), Recipe("dense")
    reports: list[int] = []
    said, arrays = teacher.speak_and_score(
        requests, sampling, recipe, {}, first_index=2, progress=reports.append
    )
    expected = teacher.speak(requests, sampling, first_index=2)
    assert all(np.array_equal(one, two) for one, two in zip(said, expected, strict=True))
    assert np.array_equal(arrays["logits"], teacher.score(said, recipe, {})["logits"])
    assert reports == sorted(reports) and reports[-1] == 6
