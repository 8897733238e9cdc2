"""Generation: sampling follows the distribution, sequences are independent; streams."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from teachers.base import GenerationRequest, Sampling
from teachers.errors import TeacherError
from teachers.llama_cpp.interrupts import uninterrupted
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.sampling import sample_rows
from teachers.store.capture import fit_shared_codec
from teachers.targets.recipe import Recipe
from tests.support.teachers import (
    assert_forced_segments_stand,
    assert_greedy,
    assert_max_length_is_reached,
    begun,
    rewrite,
)


@pytest.fixture(scope="module")
def two_contexts(tiny_teacher_path: Path) -> Iterator[GGUFTeacher]:
    """The tiny teacher on two threads: two contexts work side by side."""
    with GGUFTeacher(tiny_teacher_path, threads=2) as teacher:
        yield teacher


def frequencies(logits: np.ndarray, sampling: Sampling, draws: int = 20_000) -> np.ndarray:
    """Empirical distribution of ``sample_rows`` over evenly spread draws."""
    points = (np.arange(draws) + 0.5) / draws
    rows = np.repeat(logits[None].astype(np.float32), draws, axis=0)
    return np.bincount(sample_rows(rows, points, sampling), minlength=len(logits)) / draws


def test_sampling_follows_the_definition() -> None:
    """Frequencies equal softmax(z / T); T = 0 is greedy; top_p keeps the smallest sufficient set.

    top_p 0.6 of (0.5, 0.3, 0.15, 0.05) keeps the first two, renormalized.
    """
    logits = np.array([2.0, -1.0, 0.5, 0.0, 3.0])
    for temperature in (0.5, 1.0, 3.0):
        expected = np.exp(logits / temperature)
        found = frequencies(logits, Sampling(temperature=temperature))
        assert np.abs(found - expected / expected.sum()).max() < 1e-3, temperature
    logits = np.log(np.array([0.15, 0.5, 0.05, 0.3]))
    found = frequencies(logits, Sampling(top_p=0.6))
    assert np.abs(found - np.array([0, 0.5 / 0.8, 0, 0.3 / 0.8])).max() < 1e-3
    assert frequencies(logits, Sampling(top_p=1e-9))[1] == 1.0
    rows, points = np.array([[0, 5, 1]], np.float32), np.array([0.999])
    assert sample_rows(rows, points, Sampling(temperature=0)) == [1]


def test_a_sequence_depends_on_its_stream_alone(
    tiny_teacher: GGUFTeacher, two_contexts: GGUFTeacher
) -> None:
    """Request i draws from stream first_index + i, alone or in company, on any context."""
    start, sampling = [begun(tiny_teacher)], Sampling(max_length=24, seed=5)
    whole = tiny_teacher.generate(GenerationRequest([start] * 7, sampling))
    assert len({tokens.tobytes() for tokens in whole}) == 7
    assert np.array_equal(
        whole[3], tiny_teacher.generate(GenerationRequest([start], sampling, 3))[0]
    )
    for teacher in (tiny_teacher, two_contexts):
        counts: list[float] = []
        again = teacher.generate(GenerationRequest([start] * 7, sampling), counts.append)
        later = teacher.generate(GenerationRequest([start] * 4, sampling, 3))
        for one, other in zip([*whole, *whole[3:]], [*again, *later], strict=True):
            assert np.array_equal(one, other), teacher.threads
        assert counts == sorted(counts) and counts[0] < 1 and counts[-1] == 7, teacher.threads
    other_seed = tiny_teacher.generate(GenerationRequest([start], Sampling(max_length=24, seed=6)))[
        0
    ]
    assert not np.array_equal(whole[0], other_seed)


def test_generation_follows_the_logits_and_what_is_forced(tiny_teacher: GGUFTeacher) -> None:
    """Greedy generation is the argmax of the logits; forced segments and max_length are kept to."""
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


def test_generated_sequences_are_scored_on_the_way(
    tiny_teacher: GGUFTeacher, two_contexts: GGUFTeacher
) -> None:
    """The tokens of generating alone, the answer of scoring afterwards, on each context."""
    then = np.array([7, 8, 7], np.int32)
    requests = [
        [begun(tiny_teacher, *range(5, 5 + n)), *[then] * (place % 3)]
        for place, n in enumerate((0, 3, 110, 2, 40, 1, 98, 99, 97, *range(12)))
    ]
    sampling = Sampling(temperature=4.0, max_length=100, seed=9)
    said = tiny_teacher.generate(GenerationRequest(requests, sampling, 2))
    lengths = {len(row) for row in said}
    assert 100 in lengths and len(lengths) > 1, "some end by themselves, some at max_length"
    for kind, recipe in RECIPES.items():
        bases = fit_shared_codec(tiny_teacher, said, recipe).bases
        expected = tiny_teacher.score(said, recipe, bases)
        for teacher in (tiny_teacher, two_contexts):
            counts: list[float] = []
            tokens, arrays = teacher.generate_and_score(
                GenerationRequest(requests, sampling, 2), recipe, bases, counts.append
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


def test_scored_generation_does_not_depend_on_its_company(tiny_teacher: GGUFTeacher) -> None:
    """A long and a short request, alone or together with more than fit at once."""
    requests = [[begun(tiny_teacher, *range(5, 5 + n))] for n in (100, 0, 600, *range(20, 160))]
    sampling, dense = Sampling(max_length=120, seed=4), Recipe("dense")
    tokens, arrays = tiny_teacher.generate_and_score(
        GenerationRequest(requests, sampling), dense, {}
    )
    starts = np.concatenate(([0], np.cumsum([len(row) - 1 for row in tokens])))
    assert len(tokens) == len(requests) > 128 and starts[-1] == len(arrays["logits"])
    for index in (0, 1, 2, 50, 142):
        alone, rows = tiny_teacher.generate_and_score(
            GenerationRequest([requests[index]], sampling, index), dense, {}
        )
        assert np.array_equal(alone[0], tokens[index]) and len(alone[0]) <= 120
        among: Any = arrays["logits"][starts[index] : starts[index + 1]]
        assert np.abs(among - rows["logits"]).max() < 1e-4, index


# -- streams


def starts(teacher: GGUFTeacher) -> list[np.ndarray]:
    """Beginnings of 1, 5 and 300 tokens (more than one batch where those are small)."""
    return [np.array([teacher.info.bos, *range(5, 5 + n)], np.int32) for n in (0, 4, 299)]


def streamed_tokens(
    teacher: GGUFTeacher, start: np.ndarray, sampling: Sampling, *, number: int = 0
) -> list[int]:
    """The tokens of a whole stream."""
    return [token for token, _ in teacher.stream(start, sampling, number=number)]


@pytest.fixture
def plain_ctrl_c() -> Iterator[None]:
    """SIGINT as Python handles it by itself, not as the command line has made it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


SAMPLINGS = [
    Sampling(temperature=0.0),
    Sampling(temperature=0.7, seed=3),
    Sampling(temperature=3.0, top_p=0.8, seed=4),
]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_stream_is_what_generate_gives(
    tiny_teacher: GGUFTeacher, tiny_teacher_path: Path, threads: int
) -> None:
    """Every token, whatever the sampling, beginning and number of contexts; pieces are its text."""
    with ExitStack() as opened:
        teacher = tiny_teacher
        if threads > 1:
            teacher = opened.enter_context(GGUFTeacher(tiny_teacher_path, threads=threads))
        lengths = set()
        for (number, start), sampling in product(enumerate(starts(teacher)), SAMPLINGS):
            sampling = replace(sampling, max_length=len(start) + 25)
            said = teacher.generate(GenerationRequest([[start]], sampling, number))[0][len(start) :]
            pairs = list(teacher.stream(start, sampling, number=number))
            assert [token for token, _ in pairs] == said.tolist() and pairs, sampling
            text = b"".join(piece for _, piece in pairs).decode("utf-8", "replace")
            assert text == teacher.detokenize([said])[0], sampling
            lengths.add(len(pairs))
    assert 25 in lengths and len(lengths) > 1, "some end by themselves, some at max_length"


def test_streams_have_numbers_and_seeds(tiny_teacher: GGUFTeacher) -> None:
    """Another number or another seed draws something else."""
    start = starts(tiny_teacher)[0]
    found = set()
    for seed, number in ((0, 0), (0, 1), (1, 0)):
        sampling = Sampling(max_length=20, seed=seed)
        found.add(tuple(streamed_tokens(tiny_teacher, start, sampling, number=number)))
    assert len(found) == 3


def test_a_full_context_has_no_answer(tiny_teacher: GGUFTeacher) -> None:
    """No room for a token: none comes, and the next stream does."""
    start = starts(tiny_teacher)[1]
    assert list(tiny_teacher.stream(start, Sampling(max_length=len(start)))) == []
    assert len(list(tiny_teacher.stream(start, Sampling(0.0, max_length=len(start) + 1)))) == 1


def test_a_stream_may_be_left_early(tiny_teacher: GGUFTeacher) -> None:
    """After any number of tokens, closed or forgotten, what is asked next gets its own answer."""
    start, sampling = starts(tiny_teacher)[1], Sampling(temperature=2.0, max_length=60, seed=1)
    whole = streamed_tokens(tiny_teacher, start, sampling)
    for count in (0, 1, 7):
        stream = tiny_teacher.stream(start, sampling)
        assert [token for token, _ in islice(stream, count)] == whole[:count]
        assert tiny_teacher.detokenize([start]) == tiny_teacher.detokenize([start])
        if count == 1:
            stream.close()  # type: ignore[attr-defined]
        assert (
            tiny_teacher.generate(GenerationRequest([[start]], sampling))[0][len(start) :].tolist()
            == whole
        ), count
    assert streamed_tokens(tiny_teacher, start, sampling) == whole


def test_questions_about_text_do_not_disturb_a_stream(tiny_teacher: GGUFTeacher) -> None:
    """The tokenizer may be asked between two tokens; what computes, or another stream, ends it."""
    start, sampling = starts(tiny_teacher)[1], Sampling(temperature=2.0, max_length=40, seed=1)
    whole = list(tiny_teacher.stream(start, sampling))
    found = []
    for token in tiny_teacher.stream(start, sampling):
        tiny_teacher.tokenize(["between"], add_special=False, parse_special=False)
        found.append(token)
    assert found == whole
    second = tiny_teacher.stream(start, sampling)
    for disturb in (lambda: tiny_teacher.logits([start]), lambda: next(second)):
        first = tiny_teacher.stream(start, sampling)
        assert next(first) == whole[0]
        disturbance = disturb()
        with pytest.raises(TeacherError, match="another request has ended the stream"):
            next(first)
    assert disturbance == whole[0] and list(second) == whole[1:]


def test_pieces_are_bytes(tiny_teacher: GGUFTeacher) -> None:
    """A character spread over tokens comes as parts of it, which together are the character."""
    sampling = Sampling(temperature=5.0, max_length=200, seed=2)
    pieces = [piece for _, piece in tiny_teacher.stream(starts(tiny_teacher)[0], sampling)]
    halves = [piece for piece in pieces if "\ufffd" in piece.decode("utf-8", "replace")]
    assert halves and all(isinstance(piece, bytes) for piece in pieces)
    text = "会議室😀é"
    tokens = tiny_teacher.tokenize([text], add_special=False, parse_special=False)[0]
    parts = tiny_teacher.detokenize([tokens[:n] for n in range(len(tokens))])
    assert any("\ufffd" in part for part in parts)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer that interrupts")
def test_ctrl_c_waits_for_the_answer(tiny_teacher: GGUFTeacher, plain_ctrl_c: None) -> None:
    """Pressed at any moment of a stream: the worker answers the next request as ever."""
    start, sampling = starts(tiny_teacher)[2], Sampling(temperature=2.0, max_length=312, seed=1)
    whole = streamed_tokens(tiny_teacher, start, sampling)
    interrupted = 0
    for place in range(12):
        signal.setitimer(signal.ITIMER_REAL, 0.0005 * (place + 1))
        before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        try:
            assert streamed_tokens(tiny_teacher, start, sampling) == whole
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert tiny_teacher.detokenize([start[:3]]) == tiny_teacher.detokenize([start[:3]])
        assert (
            tiny_teacher.generate(GenerationRequest([[start]], sampling))[0][len(start) :].tolist()
            == whole
        )
    assert interrupted > 3


def test_an_uninterrupted_block_is_completed_first(plain_ctrl_c: None) -> None:
    """SIGINT within it is raised at its end, by whatever handled it before."""
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append("rest")
    assert done == ["rest"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with uninterrupted():
        done.append("again")
    assert done == ["rest", "again"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_control_tokens_are_written_out(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """Tokens of any kind, reasoning tags among them, have a text that a filter can see."""
    tokens = list(gguf.GGUFReader(tiny_teacher_path).fields["tokenizer.ggml.tokens"].contents())
    kinds = [1] * len(tokens)
    kinds[0:5] = [3] * 5
    for place, (text, kind) in enumerate(
        [("<think>", 3), ("</think>", 4), ("<final>", 3)], start=600
    ):
        tokens[place], kinds[place] = text, kind
    path = rewrite(
        tiny_teacher_path,
        tmp_path / "tags.gguf",
        **{"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds},
    )
    with GGUFTeacher(path, threads=1) as teacher:
        tags = np.array([600, 601, 602], np.int32)
        assert teacher.detokenize([tags]) == ["<think></think><final>"]
        parsed = teacher.tokenize(["a<think>b"], add_special=False, parse_special=True)[0]
        assert 600 in parsed
