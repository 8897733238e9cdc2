"""A transformers folder generates: decoding over one cache is exact, streams are independent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from teachers.base import GenerationRequest, Sampling, Tokens, no_progress
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
        make_folder(tmp_path_factory.mktemp("generation") / "tiny", vocab_size=VOCAB)
    )


def start(*tokens: int) -> Tokens:
    """A forced segment."""
    return np.array(tokens, dtype=np.int32)


def test_generation_follows_the_logits_and_what_is_forced(
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


def test_greedy_generation_with_forced_segments_equals_argmax(teacher: HuggingFaceTeacher) -> None:
    """Every token that is not forced is the most probable one after all that stands before it.

    All tokens count as ends here: each turn is one token, and the next segment replaces it.
    """
    requests = [[start(BOS, 5), start(7, 8, 9), start(11)], [start(BOS, 5, 6, 7, 9), start(12)]]
    request = GenerationRequest(requests, Sampling(temperature=0, max_length=40))
    spoken = generation.generate(teacher.model.model, request, range(VOCAB), no_progress)
    for request, tokens in zip(requests, spoken, strict=True):
        forced = np.concatenate(request)
        assert np.array_equal(tokens[:-1], forced)
        assert tokens[-1] == teacher.logits([np.append(forced, 0).astype(np.int32)])[-1].argmax()


def test_a_sequence_does_not_depend_on_its_company(teacher: HuggingFaceTeacher) -> None:
    """Request i draws from stream i: alone or among others it is the same."""
    sampling = Sampling(max_length=24, seed=5, top_p=0.9)
    together = teacher.generate(GenerationRequest([[start(BOS)]] * 5, sampling))
    assert np.array_equal(
        together[3], teacher.generate(GenerationRequest([[start(BOS)]], sampling, 3))[0]
    )
    assert not np.array_equal(together[0], together[1])
    other = teacher.generate(
        GenerationRequest([[start(BOS)]], Sampling(max_length=24, seed=6, top_p=0.9))
    )[0]
    assert not np.array_equal(together[0], other)


def test_forced_tokens_alone(teacher: HuggingFaceTeacher) -> None:
    """They may fill the text; nothing to continue is refused."""
    sampling, long = Sampling(max_length=9, seed=2), start(*range(5, 25))
    assert np.array_equal(teacher.generate(GenerationRequest([[long]], sampling))[0], long[:9])
    with pytest.raises(ValueError, match="prompt 0 has no forced tokens"):
        teacher.generate(GenerationRequest([[start()]], sampling))


def test_generate_and_score_is_both(teacher: HuggingFaceTeacher) -> None:
    """The tokens of ``generate``, and what ``score`` says about them; progress counts sequences."""
    requests, sampling = [[start(BOS)]] * 6, Sampling(max_length=20, seed=4)
    reports: list[float] = []
    said, arrays = teacher.generate_and_score(
        GenerationRequest(requests, sampling, 2), Recipe("dense"), {}, reports.append
    )
    expected = teacher.generate(GenerationRequest(requests, sampling, 2))
    assert len(said) == len(expected) and all(map(np.array_equal, said, expected))
    assert np.array_equal(arrays["logits"], teacher.score(said, Recipe("dense"), {})["logits"])
    assert reports == sorted(reports) and reports[-1] == 6
    assert min(teacher.speed(16, 4)) > 0
