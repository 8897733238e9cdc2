"""``distill serve``: the same targets as from the file, to nobody without the token, whatever is
asked."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.errors import UserError
from distill.serving.access import choose_token
from distill.serving.engine import Engine
from teachers.base import GenerationRequest, Sampling, Tokens
from teachers.errors import TeacherError
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.llama_cpp.wire import pack_ragged
from teachers.remote import connection as remote
from teachers.remote.connection import Connection, ServerError
from teachers.remote.protocol import MAX_BODY_BYTES, pack
from teachers.remote.teacher import ServedTeacher
from teachers.store.capture import capture, fit_shared_codec
from teachers.targets.distributions import CompactTargets
from teachers.targets.recipe import Recipe
from tests.conftest import command
from tests.support.children.capture_child import Source, begin
from tests.support.servers.running import TOKEN, serving

RECIPES = (
    Recipe(num_topk=16, sketch_bytes=40, layers=(0, 5)),
    Recipe(num_topk=4),
    Recipe("hidden"),
    Recipe("dense"),
)


@pytest.fixture(scope="module")
def server(
    example_gguf: GGUFTeacher, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Connection]:
    """The example teacher behind a server."""
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        with serving(example_gguf, tmp_path_factory.mktemp("served")) as connection:
            yield connection


def some_text(teacher: GGUFTeacher) -> list[Tokens]:
    random = np.random.default_rng(7)
    return [
        random.integers(5, teacher.info.vocab_size, size).astype(np.int32) for size in (9, 40, 2, 3)
    ]


def test_the_same_to_the_last_bit(server: Connection, example_gguf: GGUFTeacher) -> None:
    """Everything that a teacher is asked for, from the server as from its file."""
    served, direct = ServedTeacher(server), example_gguf
    assert (served.info, served.runtime) == (direct.info, direct.runtime)
    text = some_text(direct)
    keep = [np.arange(len(tokens) - 1) % 2 == 0 for tokens in text]
    for recipe in RECIPES:
        bases = {}
        if recipe.needs_states or recipe.layers:
            codec, other = (fit_shared_codec(one, text, recipe) for one in (direct, served))
            for name, rows in codec.arrays().items():
                np.testing.assert_array_equal(rows, other.arrays()[name])
            bases = codec.bases
        for masks in (None, keep):
            expected = direct.score(text, recipe, bases, keep=masks)
            answer = served.score(text, recipe, bases, keep=masks)
            assert answer.keys() == expected.keys()
            for name, rows in expected.items():
                assert answer[name].dtype == rows.dtype
                np.testing.assert_array_equal(answer[name], rows)
    np.testing.assert_array_equal(served.logits(text), direct.logits(text))
    np.testing.assert_array_equal(served.states(text)["final"], direct.states(text)["final"])
    request = GenerationRequest([[text[0]], [text[3]]], Sampling(0.8, 0.9, 24, seed=1), 5)
    progress: list[float] = []
    written = served.generate_and_score(request, RECIPES[1], {}, progress.append)
    expected_text, expected = direct.generate_and_score(request, RECIPES[1], {})
    assert [one.tolist() for one in written[0]] == [one.tolist() for one in expected_text]
    np.testing.assert_array_equal(written[1]["tail"], expected["tail"])
    texts = ["Stock: 12 boxes\n", "\u00fcber \u6771\u4eac \udcff", ""]
    special = {"add_special": True, "parse_special": True}
    tokens = direct.tokenize(texts, **special)
    assert [one.tolist() for one in served.tokenize(texts, **special)] == [
        one.tolist() for one in tokens
    ]
    assert served.detokenize(tokens) == direct.detokenize(tokens)
    many = ["box "] * 70_000  # in several requests
    assert len(served.tokenize(many, **special)) == len(many)
    assert served.tokenize([], **special) == [] == served.detokenize([])
    assert min(served.speed(8, 2)) > 0


def ask(
    server: Connection, path: str, body: bytes | None = None, token: str | None = TOKEN
) -> tuple[int, Any]:
    """Status and JSON of one request."""
    link = http.client.HTTPConnection(server.address.host, server.address.port, timeout=60)
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    link.request("GET" if body is None else "POST", path, body, headers)
    answer = link.getresponse()
    content = json.loads(answer.read())
    link.close()
    return answer.status, content


def test_prompt_logprobs_as_vllm_has_them(
    server: Connection, example_gguf: GGUFTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities and ranks are those of the logits, the extra field holds what a store
    keeps of the tail, and nothing is lost on the way through JSON."""
    text, count = some_text(example_gguf)[1], 5
    request = {"prompt": [text.tolist(), text[:1].tolist()], "max_tokens": 0}
    status, answer = ask(
        server, "/v1/completions", json.dumps(request | {"prompt_logprobs": count}).encode()
    )
    assert status == 200 and [one["index"] for one in answer["choices"]] == [0, 1]
    first, second = answer["choices"]
    assert second["prompt_logprobs"] == [None] and len(first["prompt_logprobs"]) == len(text)
    logits = torch.from_numpy(example_gguf.logits([text]))
    sums = logits.logsumexp(dim=-1)
    kept = CompactTargets.from_logits(logits, count)
    extra = first["distill"]
    assert extra["temperatures"][-1] == 1.0 and extra["tail"][0] is None
    assert torch.equal(torch.tensor(extra["tail"][1:]), kept.tail)
    assert torch.equal(torch.tensor(extra["logsumexp"][1:]), sums)
    for row, position in enumerate(first["prompt_logprobs"][1:]):
        token = int(text[row + 1])
        top = [int(one) for one, entry in position.items() if entry["rank"] <= count]
        assert (
            sorted(top, key=lambda one: position[str(one)]["rank"]) == kept.topk_ids[row].tolist()
        )
        assert position.keys() == {*map(str, top), str(token)}
        rank = int((logits[row] > logits[row, token]).sum()) + 1
        assert position[str(token)]["rank"] == rank
        for one, entry in position.items():
            assert entry["logprob"] == float(logits[row, int(one)] - sums[row])
        (name,) = example_gguf.detokenize([np.array([token], np.int32)])
        assert position[str(token)]["decoded_token"] == name
    status, answer = ask(
        server, "/v1/completions", json.dumps({"prompt": text.tolist(), "max_tokens": 1}).encode()
    )
    longer = np.append(text, text[-1]).astype(np.int32)
    best = int(example_gguf.logits([longer])[-1].argmax())
    assert example_gguf.detokenize([np.array([best], np.int32)]) == [answer["choices"][0]["text"]]
    assert answer["choices"][0]["prompt_logprobs"] is None
    monkeypatch.setattr("distill.serving.completions.LOGITS_BYTES", 4 * 1024 * 7)  # in parts
    asked = json.dumps(request | {"prompt_logprobs": count, "max_tokens": 1}).encode()
    parts = ask(server, "/v1/completions", asked)[1]["choices"][0]
    assert len(parts["prompt_logprobs"]) == len(text)
    for one, other in zip(parts["prompt_logprobs"][1:], first["prompt_logprobs"][1:], strict=True):
        assert one.keys() == other.keys()
        for token, entry in one.items():
            assert entry["logprob"] == pytest.approx(other[token]["logprob"], abs=0.05)


COMPLETIONS = (
    (b"{", "Expecting"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"prompt": [1, 2], "max_tokens": NaN}', "number NaN"),
    (b"[]", "valid dictionary"),
    (b'{"prompt": "words", "max_tokens": 0}', "prompt"),
    (b'{"prompt": [], "max_tokens": 0}', "no token"),
    (b'{"prompt": [[1], []], "max_tokens": 0}', "no token"),
    (b'{"prompt": [1, 1024], "max_tokens": 0}', "vocabulary of 1024"),
    (b'{"prompt": [1, -1], "max_tokens": 0}', "greater than or equal to 0"),
    (b'{"prompt": [1, 99999999999999999999], "max_tokens": 0}', "prompt"),
    (b'{"prompt": [1, true], "max_tokens": 0}', "prompt"),
    (b'{"prompt": [1], "max_tokens": 7}', "0 or 1"),
    (b'{"prompt": [1], "max_tokens": 1, "temperature": 0.5}', "temperature"),
    (b'{"prompt": [1], "max_tokens": 0, "prompt_logprobs": 5000}', "1024"),
    (b'{"prompt": [1], "max_tokens": 0, "stream": true}', "stream"),
    (b'{"prompt": [1], "max_tokens": 0, "best_of": 3}', "best_of"),
    (b'{"prompt": [1], "max_tokens": 0, "model": "other"}', "/v1/models"),
    (json.dumps({"prompt": [1] * 513, "max_tokens": 0}).encode(), "context of 512"),
    (
        json.dumps({"prompt": [[1] * 500] * 9, "max_tokens": 0, "prompt_logprobs": 999}).encode(),
        "fewer",
    ),
)


def operations() -> list[tuple[str, bytes, str]]:
    """Requests for the worker that are none, and what is said of them."""
    compact, tokens = (
        Recipe(num_topk=4).to_json(),
        pack_ragged([np.array([3, 4, 5], np.int32)], "tokens"),
    )
    sketch = Recipe(num_topk=4, sketch_bytes=8).to_json()
    long = pack_ragged([np.full(600, 7, np.int32)], "tokens")
    bad = {"tokens": tokens["tokens"], "tokens_lengths": np.array([1 << 62, 2], np.int64)}
    sampling = {"temperature": 1.0, "top_p": 1.0, "max_length": 9, "seed": 0}
    prompts = pack_ragged([np.array([3], np.int32)], "segments")
    return [
        ("score", b"", "safetensors"),
        ("score", pack({}, tokens), "recipe"),
        ("score", pack({"recipe": {"kind": "compact"}}, tokens), "recipe"),
        ("score", pack({"recipe": compact | {"num_topk": 1 << 40}}, tokens), "more than"),
        ("score", pack({"recipe": compact | {"layers": [9], "layer_bytes": 4}}, tokens), "layer 9"),
        ("score", pack({"recipe": sketch}, tokens), "final_mean"),
        ("score", pack({"recipe": compact}), "tokens_lengths"),
        ("score", pack({"recipe": compact}, tokens | {"other": np.zeros(1)}), "other"),
        ("score", pack({"recipe": compact}, long), "513 at most"),
        ("score", pack({"recipe": compact}, bad), "tokens"),
        (
            "score",
            pack({"recipe": compact}, {**tokens, "tokens": np.array([3, 1 << 20, 4], np.int32)}),
            "vocabulary",
        ),
        (
            "score",
            pack({"recipe": compact}, {**tokens, "tokens": np.zeros((3, 1), np.int32)}),
            "int32 [n]",
        ),
        ("logits", pack({"exact": 1}, tokens), "exact"),
        ("states", pack({"exact": False, "layers": [-1]}, tokens), "layers"),
        (
            "generate",
            pack(
                {"sampling": sampling | {"max_length": 600}, "first_index": 0},
                prompts | {"segment_counts": np.array([1])},
            ),
            "context",
        ),
        (
            "generate",
            pack(
                {"sampling": sampling, "first_index": 0},
                prompts | {"segment_counts": np.array([2])},
            ),
            "segment",
        ),
        ("speed", pack({"prompt_tokens": 600, "new_tokens": 1}), "context"),
        ("tokenize", pack({"texts": [1], "add_special": True, "parse_special": True}), "texts"),
        ("load", pack({"path": "/etc/passwd"}), "Not Found"),
    ]


def test_hostile_clients(server: Connection, example_gguf: GGUFTeacher) -> None:
    """One line of JSON for each, and the server answers on."""
    for path in ("/v1/models", "/distill/v1/teacher", "/distill/v1/vocabulary", "/nothing"):
        for token in (None, "", "wrong", TOKEN + "x"):
            assert ask(server, path, token=token)[0] == 401, (path, token)
    assert ask(server, "/v1/completions", b"{}", token=None)[0] == 401
    assert ask(server, "/health", token=None) == (200, {"status": "ok"})
    cases = [("/v1/completions", body, said) for body, said in COMPLETIONS]
    cases += [(f"/distill/v1/{name}", body, said) for name, body, said in operations()]
    for path, body, said in cases:
        status, content = ask(server, path, body)
        message = content["error"]["message"]
        assert status in (400, 404) and said in message and "\n" not in message, (
            path,
            body[:200],
            content,
        )
    link = http.client.HTTPConnection(server.address.host, server.address.port, timeout=60)
    link.putrequest("POST", "/v1/completions")
    link.putheader("Authorization", f"Bearer {TOKEN}")
    link.putheader("Content-Length", str(MAX_BODY_BYTES + 1))
    link.endheaders()
    assert link.getresponse().status == 413
    link.close()
    assert ask(server, "/v1/models")[1]["data"][0]["max_model_len"] == 512


def test_a_server_that_goes_and_comes_back(
    example_gguf: GGUFTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing saved is lost: the capture ends with a line, and goes on where it stopped."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(remote, "WAITS", (0.01, 0.01))
    source, recipe = Source(), Recipe(num_topk=4)
    context = serving(example_gguf, tmp_path)
    server = context.__enter__()
    port = server.address.port
    teacher = ServedTeacher(server)
    saved = []

    def report(done: float, what: str) -> None:
        if what == "saved":
            saved.append(done)
            if len(saved) == 2:
                context.__exit__(None, None, None)

    with pytest.raises(
        ServerError, match=rf"127.0.0.1:{port} does not answer .*Nothing saved is lost"
    ):
        capture(teacher, source, begin(tmp_path / "store", teacher, source, recipe), report)
    with serving(example_gguf, tmp_path, port):
        store = begin(tmp_path / "store", teacher, source, recipe)
        summary = capture(teacher, source, store, lambda done, what: None)
    assert (summary.reused, summary.written) == (2, 2)
    expected = begin(tmp_path / "direct", example_gguf, source, recipe)
    capture(example_gguf, source, expected, lambda done, what: None)
    for shard in range(4):
        assert store.shard_path(shard).read_bytes() == expected.shard_path(shard).read_bytes()


def test_a_worker_that_dies(tiny_teacher_path: Path) -> None:
    """Whoever asked is told, and the next is answered."""
    with Engine(lambda: GGUFTeacher(tiny_teacher_path, threads=1)) as engine:
        asked = ("logits", {"exact": False}, pack_ragged([np.array([3, 4], np.int32)], "tokens"))
        engine.ask(*asked)
        os.kill(engine.teacher.worker.process_id, signal.SIGTERM)
        with pytest.raises(TeacherError, match="died"):
            engine.ask(*asked)
        assert engine.ask(*asked)[1]["logits"].shape == (1, 1024)


def test_tokens() -> None:
    """Made where none is given; a short one only where no other machine can reach the server."""
    made, new = choose_token(None, "0.0.0.0")
    assert new and len(made) >= 32 and made != choose_token(None, "0.0.0.0")[0]
    assert choose_token("short", "127.0.0.1") == ("short", False)
    assert choose_token("short", "::1") == choose_token("short", "localhost")
    for token, host in (("short", "0.0.0.0"), ("", "127.0.0.1"), ("two words", "localhost")):
        with pytest.raises(UserError, match="--token"):
            choose_token(token, host)


def bytes_of(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server in its own process, and a capture from it: the same store as from the file, and the
    token is in neither."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DISTILL_TEACHER_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    words = [sys.executable, "-m", "distill", "serve", "--port", "0"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        said, address, token = "", None, None
        while not (address and token):
            line = server.stdout.readline()
            assert line, said
            said += line
            address = re.search(r"http://127\.0\.0\.1:\d+", said)
            token = re.search(r"DISTILL_TEACHER_TOKEN=(\S+)", said)
        given = ["--samples", 6, "--set", "data.max_length=24"]
        wrong = command("capture", *given, "--teacher", address[0], "--store", "wrong")
        assert wrong.code == 2 and "refuses the token" in wrong.complaint
        setting = ["--set", f"teacher.token={token[1]}"]
        ended = command("capture", *given, *setting, "--teacher", address[0], "--store", "served")
        assert ended.code == 0, ended
        small = ["--student-size", "32x1", "--epochs", 1, "--safety-labels", "none"]
        small += ["--set", "train.on_policy=0.5", "--out", "run"]
        ended = command("run", *given, *setting, "--teacher", address[0], *small)
        assert ended.code == 0 and "student cannot start from the teacher's weights" in ended.said
        assert Path("run/student.gguf").exists()
        assert not [
            path for path in Path("run").rglob("*.*") if token[1].encode() in bytes_of(path)
        ]
        vocab = command("capture", *setting, "--teacher", address[0], "--vocab", "50%")
        assert vocab.code == 2 and "is a server" in vocab.complaint
        os.kill(server.pid, signal.SIGINT)
        assert server.wait(20) == 130
    assert command("capture", *given, "--store", "direct").code == 0
    for path in Path("direct").glob("*.*"):
        assert path.read_bytes() == (Path("served") / path.name).read_bytes(), path
        assert token[1].encode() not in path.read_bytes()
