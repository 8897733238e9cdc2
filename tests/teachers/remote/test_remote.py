"""Clients of servers that are broken or hostile: one line that names the server, nothing worse."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teachers.gguf.file import TeacherFileError
from teachers.llama_cpp.wire import pack_ragged
from teachers.remote import connection as remote
from teachers.remote.connection import Address, Connection, ServerError
from teachers.remote.protocol import Facts, Model, Vocabulary, pack
from teachers.remote.teacher import RemoteWorker, ServedTeacher
from teachers.targets.recipe import Recipe
from tests.support.servers.running import always, answering, as_json

MODEL = {
    "vocab_size": 10, "width": 4, "layers": 2, "context_length": 64, "bos": 0, "eos": 1,
    "end_tokens": [1], "add_bos": True,
}  # fmt: skip
FACTS: dict[str, Any] = {
    "version": 1, "runtime": "some", "sha256": "a" * 64, "parameters": 9, "file_bytes": 99,
    "model": MODEL, "vocabulary": {"bytes": 24, "sha256": "b" * 64},
}  # fmt: skip


@pytest.fixture(autouse=True)
def impatient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers are tried again at once; nothing is in the cache."""
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_addresses() -> None:
    """What is no plain address is refused, and a password in it is not shown."""
    address = Address.parse("HTTP://[::1]:80/v1/")
    assert str(address) == "http://[::1]:80" and str(Address.parse("https://a")) == "https://a:443"
    for text in ("http://", "http://a:port", "http://u:secret@a", "http://a?x", "http://a\x1b[2J"):
        with pytest.raises(ServerError, match="address") as error:
            Address.parse(text)
        assert "secret" not in str(error.value) and "\x1b" not in str(error.value)
    with pytest.raises(ServerError, match="printable ASCII") as error:
        Connection(address, "se\ncret")
    assert "cret" not in str(error.value)


FIRST_ANSWERS: list[tuple[int, bytes, str]] = [
    (200, b"{", "is it `distill serve`"),
    (200, b"[" * 200_000, "nested too deeply"),
    (200, as_json(FACTS).replace(b'"parameters": 9', b'"parameters": NaN'), "number NaN"),
    (200, b" " * (2 << 20), "more than 1048576 bytes"),
    (200, as_json([]), "says nothing that a teacher is"),
    (200, as_json(FACTS | {"parameters": True}), "parameters"),
    (200, as_json(FACTS | {"sha256": "../" * 20}), "sha256"),
    (200, as_json(FACTS | {"model": MODEL | {"vocab_size": -3}}), "model.vocab_size"),
    (200, as_json(FACTS | {"version": 2}), "version 2"),
    (302, b"", "status 302"),
    (401, b"", "refuses the token"),
    (400, as_json({"error": {"message": "a\x1b[31m\nb"}}), "status 400: a\u241b[31m b"),
    (503, b"", "does not answer .status 503."),
]


def test_first_answers() -> None:
    """Types, sizes, other versions, refusals, redirections."""
    for status, body, said in FIRST_ANSWERS:
        with answering(always(status, body)) as server:
            with pytest.raises(ServerError, match=said.replace("[", r"\[")) as error:
                ServedTeacher(server)
            assert str(server.address) in str(error.value) and "\n" not in str(error.value), said
            assert len(str(error.value)) < 600


def test_files_of_vocabularies(tiny_teacher_path: Path) -> None:
    """Another file than the server said, a file that is none, one that is not of its teacher."""

    def refused(file: bytes, said: str, **stated: Any) -> None:
        about = {"bytes": len(file), "sha256": hashlib.sha256(file).hexdigest()}
        facts = as_json(FACTS | {"vocabulary": about | stated})
        answer = lambda path, _: (200, facts if path.endswith("teacher") else file)  # noqa: E731
        expected = pytest.raises((ServerError, TeacherFileError), match=said)
        with answering(answer) as server, expected:
            ServedTeacher(server)

    model = tiny_teacher_path.read_bytes()
    refused(model, "another digest", sha256="c" * 64)
    refused(model, "does not answer .the file ends in the middle", bytes=len(model) + 1)
    refused(b"GGUF" + bytes(60), "version 0")
    refused(model, "10 tokens and width 4; its file has 1024 and 64")


class Saying:
    """A connection that has one answer."""

    address = Address("http", "there", 1, "")

    def __init__(self, answer: tuple[dict[str, Any], Any]) -> None:
        self.answer = answer

    def ask(self, *_: Any) -> tuple[dict[str, Any], Any]:
        return self.answer


def test_answers_to_requests() -> None:
    """Arrays of other names, types, shapes; numbers that are none; ids of no token."""
    facts = Facts(
        **FACTS | {"model": Model(**MODEL), "vocabulary": Vocabulary(**FACTS["vocabulary"])}
    )
    tokens = pack_ragged([np.array([3, 4, 5], np.int32)], "tokens")
    right = {
        "topk_ids": np.array([[1, 2], [9, 3]], np.uint16),
        "topk_logits": np.array([[0, -1], [0, -2]], np.float16),
        "tail": np.zeros((2, 6), np.float32),
    }
    nan = np.full((2, 2), np.nan, np.float16)
    endless = np.full((2, 2), -np.inf, np.float16)
    compact: dict[str, Any] = {"recipe": Recipe(num_topk=2).to_json()}
    texts = {"texts": ["a"], "add_special": True, "parse_special": True}
    ragged = {"tokens": np.array([3, 4], np.int32), "tokens_lengths": np.array([2], np.int64)}
    segments = pack_ragged([np.array([3], np.int32)], "segments") | {
        "segment_counts": np.ones(1, np.int64)
    }
    written: dict[str, Any] = {"sampling": {"max_length": 3}}

    def asked(operation: str, message: Any, arrays: Any, said: Any, given: Any) -> None:
        RemoteWorker(Saying((said, given)), facts).ask(operation, message, arrays)  # type: ignore[arg-type]

    asked("score", compact, tokens, {}, right)
    asked("tokenize", texts, {}, {}, ragged)
    asked("generate", written, segments, {}, ragged)
    asked("speed", {}, {}, {"prompt": 1, "generation": 2.0}, {})
    asked("detokenize", {}, tokens, {"texts": ["x"]}, {})
    wrong: list[tuple[str, Any, Any, Any, Any]] = [
        *(
            ("score", compact, tokens, {}, right | change)
            for change in (
                {"other": np.zeros(2)},
                {"topk_ids": right["topk_ids"].astype(np.int32)},
                {"topk_ids": np.array([[1, 2], [10, 3]], np.uint16)},
                {"topk_ids": right["topk_ids"][:1]},
                {"topk_logits": nan},
                {"topk_logits": endless},
                {"tail": np.full((2, 6), np.inf, np.float32)},
            )
        ),
        ("score", compact, tokens, {}, {}),
        ("tokenize", texts, {}, {}, {}),
        ("tokenize", texts, {}, {}, ragged | {"tokens": np.array([3, 10], np.int32)}),
        ("tokenize", texts, {}, {}, ragged | {"tokens": np.array([3, -1], np.int32)}),
        ("tokenize", texts, {}, {}, ragged | {"tokens_lengths": np.array([1 << 62], np.int64)}),
        ("tokenize", texts, {}, {}, ragged | {"tokens_lengths": np.array([1, 1], np.int64)}),
        ("generate", {"sampling": {"max_length": 1}}, segments, {}, ragged),
        ("speed", {}, {}, {"prompt": 1, "generation": -2.0}, {}),
        ("detokenize", {}, tokens, {"texts": ["x", "y"]}, {}),
        ("detokenize", {}, tokens, {"texts": [3]}, {}),
    ]
    for case in wrong:
        with pytest.raises(ServerError, match="http://there:1 answers"):
            asked(*case)


STREAMS: list[tuple[bytes, str]] = [
    (b"x" * 9999 + b"\n", "ends in the middle"),
    (b'{"progress": 1}\n', "ends in the middle"),
    (b'{"progress": -1}\n', "progress -1"),
    (b'{"progress": 1, "bytes": 1}\n', "none of its protocol"),
    (b'{"bytes": 99999999999}\nx', "instead of at most"),
    (b'{"bytes": 99}\nx', "ends in the middle"),
    (b'{"bytes": 9}\n' + bytes(9), "no safetensors"),
    (b'{"error": "a\\u001b[2J\\nb"}\n', "a\u241b\\[2J b"),
]


def test_streams() -> None:
    """Lines that are endless, none, or promise too much."""
    for body, said in STREAMS:
        expected = pytest.raises(ServerError, match=said)
        with answering(always(200, body)) as server, expected:
            server.ask("tokenize", {}, {}, limit=1000)
    answer = pack({"a": 1}, {"b": np.arange(3)})
    body = b'{"progress": 2}\n{"bytes": %d}\n' % len(answer) + answer
    tries: list[float] = []

    def second_time(path: str, _: bytes) -> tuple[int, bytes]:
        tries.append(0)
        return (200, body) if len(tries) == 2 else (503, b"")

    with answering(second_time) as server:
        progress: list[float] = []
        said, arrays = server.ask("tokenize", {}, {}, progress.append)
    assert said == {"a": 1} and arrays["b"].tolist() == [0, 1, 2] and progress == [2]
