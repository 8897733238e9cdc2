"""Streaming: token for token what ``speak`` says, left at any time, in step with the worker."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

import gguf
import numpy as np
import pytest

from teachers.base import Sampling
from teachers.errors import TeacherError
from teachers.llama_cpp.interrupts import uninterrupted
from teachers.llama_cpp.teacher import GGUFTeacher
from tests.support.teachers import rewrite


def starts(teacher: GGUFTeacher) -> list[np.ndarray]:
    """Beginnings of 1, 5 and 300 tokens (more than one batch where those are small)."""
    return [np.array([teacher.info.bos, *range(5, 5 + n)], np.int32) for n in (0, 4, 299)]


def spoken(
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
def test_a_stream_is_what_speak_says(
    tiny_teacher: GGUFTeacher, tiny_teacher_path: Path, threads: int
) -> None:
    """Every token, whatever the sampling, beginning and number of lanes; pieces are its text."""
    with ExitStack() as opened:
        teacher = tiny_teacher
        if threads > 1:
            teacher = opened.enter_context(GGUFTeacher(tiny_teacher_path, threads=threads))
        lengths = set()
        for (number, start), sampling in product(enumerate(starts(teacher)), SAMPLINGS):
            sampling = replace(sampling, max_length=len(start) + 25)
            said = teacher.speak([[start]], sampling, first_index=number)[0][len(start) :]
            streamed = list(teacher.stream(start, sampling, number=number))
            assert [token for token, _ in streamed] == said.tolist() and streamed, sampling
            text = b"".join(piece for _, piece in streamed).decode("utf-8", "replace")
            assert text == teacher.detokenize([said])[0], sampling
            lengths.add(len(streamed))
    assert 25 in lengths and len(lengths) > 1, "some end by themselves, some at max_length"


def test_streams_have_numbers_and_seeds(tiny_teacher: GGUFTeacher) -> None:
    """Another number or another seed draws something else."""
    start = starts(tiny_teacher)[0]
    found = set()
    for seed, number in ((0, 0), (0, 1), (1, 0)):
        sampling = Sampling(max_length=20, seed=seed)
        found.add(tuple(spoken(tiny_teacher, start, sampling, number=number)))
    assert len(found) == 3


def test_a_full_context_has_no_answer(tiny_teacher: GGUFTeacher) -> None:
    """No room for a token: none comes, and the next stream does."""
    start = starts(tiny_teacher)[1]
    assert list(tiny_teacher.stream(start, Sampling(max_length=len(start)))) == []
    assert len(list(tiny_teacher.stream(start, Sampling(0.0, max_length=len(start) + 1)))) == 1


def test_a_stream_may_be_left_early(tiny_teacher: GGUFTeacher) -> None:
    """After any number of tokens, closed or forgotten, what is asked next gets its own answer."""
    start, sampling = starts(tiny_teacher)[1], Sampling(temperature=2.0, max_length=60, seed=1)
    whole = spoken(tiny_teacher, start, sampling)
    for count in (0, 1, 7):
        stream = tiny_teacher.stream(start, sampling)
        assert [token for token, _ in islice(stream, count)] == whole[:count]
        assert tiny_teacher.detokenize([start]) == tiny_teacher.detokenize([start])
        if count == 1:
            stream.close()  # type: ignore[attr-defined]
        assert tiny_teacher.speak([[start]], sampling)[0][len(start) :].tolist() == whole, count
    assert spoken(tiny_teacher, start, sampling) == whole


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
    whole = spoken(tiny_teacher, start, sampling)
    interrupted = 0
    for place in range(12):
        signal.setitimer(signal.ITIMER_REAL, 0.0005 * (place + 1))
        before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        try:
            assert spoken(tiny_teacher, start, sampling) == whole
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert tiny_teacher.detokenize([start[:3]]) == tiny_teacher.detokenize([start[:3]])
        assert tiny_teacher.speak([[start]], sampling)[0][len(start) :].tolist() == whole
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
