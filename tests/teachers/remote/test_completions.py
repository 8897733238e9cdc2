"""A teacher behind vLLM's ``/v1/completions``: what is there is exact, what is not is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.capture.ready_store import open_full_store
from distill.capture.teachers import open_teacher
from distill.config.schema import RunConfig
from distill.config.sources import TeacherConfig
from distill.errors import UserError
from distill.initialization.shape import student_size
from distill.trimming.file import write_vocabulary
from teachers import example_teacher
from teachers.base import Teacher, Tokens
from teachers.gguf.file import read_gguf
from teachers.huggingface.teacher import HuggingFaceTeacher
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.remote import connection as remote
from teachers.remote.completions import CompletionsTeacher
from teachers.remote.connection import Connection, ServerError
from teachers.remote.tail import estimated_tail
from teachers.targets.distributions import CompactTargets
from teachers.targets.recipe import NODES, Recipe
from tests.conftest import command
from tests.support.servers.running import answering, as_json
from tests.support.tiny_checkpoint import WORDS, make_folder

Change = Callable[[dict[str, Any]], Any]


def as_vllm(model: Teacher, change: Change = lambda answer: answer) -> Any:
    """Answers as vLLM documents them (``prompt_logprobs`` of its OpenAI-compatible server): of each
    position the k most probable tokens, and the prompt's own with its rank."""

    def answer(path: str, body: bytes) -> tuple[int, bytes]:
        if path == "/v1/models":
            card = {"id": "org/some-model", "object": "model", "owned_by": "vllm"}
            return 200, as_json({"object": "list", "data": [card | {"max_model_len": 512}]})
        if path == "/version":
            return 200, as_json({"version": "0.11.0"})
        if path != "/v1/completions":
            return 404, as_json({"detail": "Not Found"})
        request = json.loads(body)
        assert request["model"] == "org/some-model" and request["max_tokens"] == 1
        if (asked := request["prompt_logprobs"]) > 20:
            said = f"Requested prompt logprobs of {asked}, which is greater than max allowed: 20"
            return 400, as_json({"error": {"message": said, "type": "BadRequestError"}})
        choices = [
            {
                "index": index,
                "text": "x",
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
                "prompt_logprobs": positions(np.array(prompt, np.int32), asked),
            }
            for index, prompt in enumerate(request["prompt"])
        ]
        whole = {"id": "cmpl-1", "object": "text_completion", "choices": choices[::-1]}
        return 200, as_json(change(whole))

    def positions(tokens: Tokens, count: int) -> list[Any]:
        if len(tokens) < 2:
            return [None]
        result: list[Any] = [None]
        rows = torch.from_numpy(model.logits([tokens])).log_softmax(-1)
        for row, own in zip(rows, tokens[1:].tolist(), strict=True):
            ids = row.topk(count).indices
            ranks = dict(zip(ids.tolist(), range(1, count + 1), strict=True))
            ranks.setdefault(own, int((row > row[own]).sum()) + 1)
            texts = model.detokenize([np.array([one], np.int32) for one in ranks])
            result.append(
                {
                    str(token): {"logprob": float(row[token]), "rank": rank, "decoded_token": text}
                    for (token, rank), text in zip(ranks.items(), texts, strict=True)
                }
            )
        return result

    return answer


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example teacher's tokenizer, without anything else."""
    path = tmp_path_factory.mktemp("vocabulary") / "only.gguf"
    write_vocabulary(read_gguf(example_teacher()), path, "", tensors=False)
    return path


def opened(server: Connection, tokenizer: Path | None) -> CompletionsTeacher:
    """The teacher behind a server, as the settings open it."""
    given = None if tokenizer is None else str(tokenizer)
    teacher = open_teacher(TeacherConfig(path=str(server.address), tokenizer=given))
    assert isinstance(teacher, CompletionsTeacher)
    return teacher


def test_what_is_there_is_exact(example_gguf: GGUFTeacher, vocabulary: Path) -> None:
    """Top-k ids and log-probabilities, the tail's mass at T = 1; at others it is near."""
    random = np.random.default_rng(3)
    text = [
        one[:60]
        for one in example_gguf.tokenize(
            ["The order of four boxes arrived on Monday and the invoice is still open."] * 2,
            add_special=True,
            parse_special=False,
        )
    ]
    text.append(random.integers(5, 1000, 9).astype(np.int32))
    keep = [np.arange(len(one) - 1) % 3 != 1 for one in text]
    with answering(as_vllm(example_gguf)) as server, opened(server, vocabulary) as teacher:
        info = teacher.info
        assert (info.name, info.vocab_size, info.context_length) == ("org/some-model", 1024, 511)
        assert (info.width, info.layers, info.parameters) == (256, 6, 0)
        assert info.chat_template == example_gguf.info.chat_template
        assert "vLLM 0.11.0" in teacher.runtime and "power law" in teacher.truncation
        for masks in (None, keep):
            got = teacher.score(text, Recipe(num_topk=16), {}, keep=masks)
            expected = example_gguf.score(text, Recipe(num_topk=16), {}, keep=masks)
            np.testing.assert_array_equal(got["topk_ids"], expected["topk_ids"])
            np.testing.assert_allclose(got["topk_logits"], expected["topk_logits"], atol=2e-2)
            one, other = (
                CompactTargets.from_arrays(arrays, 1024, None, None) for arrays in (got, expected)
            )
            assert torch.allclose(one.tail_mass(1.0), other.tail_mass(1.0), atol=1e-4)
            assert float((one.tail_mass(3.0) - other.tail_mass(3.0)).abs().mean()) < 0.1
        with pytest.raises(ServerError, match="sketch_bytes=0"):
            teacher.score(text, Recipe("hidden"), {})
        with pytest.raises(ServerError, match="greater than max allowed: 20"):
            teacher.score(text, Recipe(num_topk=32), {})
        with pytest.raises(UserError, match="--student-size 512x4"):
            student_size(RunConfig.model_validate({"student": {"size": "25%"}}), info)


def test_a_tokenizer_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tokenizer.json and config.json are enough to capture; a student needs GGUF metadata."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "model")
    text = "\n\n".join(["the cat sat on the mat while the other cat was there"] * 3 + [WORDS])
    Path("text.txt").write_text(text, encoding="utf-8")
    with (
        HuggingFaceTeacher(tmp_path / "model") as model,
        answering(as_vllm(model)) as server,
    ):
        (tmp_path / "model" / "model.safetensors").unlink()
        with opened(server, tmp_path / "model") as teacher:
            assert teacher.info.tokenizer_sha256 == model.info.tokenizer_sha256
            assert (teacher.info.width, teacher.info.layers) == (model.info.width, 3)
            assert teacher.info.end_tokens == model.info.end_tokens
        words = ["--teacher", server.address, "--tokenizer", "model", "--data", "text.txt"]
        ended = command("capture", *words, "--set", "data.max_length=16", "--store", "store")
        assert ended.code == 0, ended
        assert "no GGUF file, so no tokenizer is kept" in ended.said
        ended = command("run", *words)
        assert ended.code == 2 and "distill capture" in ended.complaint


def test_the_estimate_of_a_tail() -> None:
    """Right where the tail is a power law; exact at T = 1; nothing where all tokens are known."""
    ranks = np.arange(1, 5001)
    for exponent in (0.3, 1.0, 1.7, 4.0):
        exact = np.log(ranks**-exponent / (ranks**-exponent).sum())[None]
        tail = estimated_tail(exact[:, :16], 5000)[0]
        for node, value in zip(NODES, tail, strict=True):
            wanted = np.log(np.exp(node * (exact[0, 16:] - exact[0, 0])).sum())
            assert abs(value - wanted) < 0.01, (exponent, node)
    certain = estimated_tail(np.array([[0.0, -30.0]]), 5000)
    assert (certain == -1e4).all()
    flat = estimated_tail(np.full((1, 2), -np.log(100)), 100)[0]
    assert np.allclose(flat, np.log(98), atol=0.01)
    assert (estimated_tail(np.log([[0.5, 0.5]]), 2) == -np.inf).all()


def each(change: Callable[[dict[str, Any]], None]) -> Change:
    """A change to the mapping of each position."""

    def changed(answer: dict[str, Any]) -> dict[str, Any]:
        for choice in answer["choices"]:
            for position in choice["prompt_logprobs"][1:]:
                change(position)
        return answer

    return changed


def without(answer: dict[str, Any]) -> dict[str, Any]:
    """llama-server's: a field that it does not know is ignored."""
    return {"choices": [{"index": one["index"], "text": ""} for one in answer["choices"]]}


def renamed(position: dict[str, Any]) -> None:
    for entry in position.values():
        entry["decoded_token"] = "zz"


ANSWERS: list[tuple[Change, str]] = [
    (without, "llama-server does not"),
    (lambda answer: {"choices": answer["choices"][:1]}, "one choice for each"),
    (lambda answer: {"choices": [answer["choices"][0]] * 2}, "without their index"),
    (lambda answer: [], "one choice for each"),
    (each(renamed), "has another tokenizer"),
    (each(lambda position: position.update({"1024": {"logprob": -1.0}})), "has token 1024, the"),
    (each(lambda position: position.update({"\x1b": {"logprob": -1.0}})), "the token"),
    (each(lambda position: position.update({"5": {"logprob": 7.5}})), "the log-probability 7.5"),
    (each(lambda position: position.update({"5": {"logprob": "x"}})), "the log-probability 'x'"),
    (each(lambda position: position.update({"5": None})), "the log-probability None"),
]


def test_servers_that_do_not_do(
    example_gguf: GGUFTeacher, vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that names the server and what to do."""
    monkeypatch.setattr(remote, "WAITS", (0.0,))
    for change, said in ANSWERS:
        with answering(as_vllm(example_gguf, change)) as server:
            with pytest.raises(ServerError, match=said) as error:
                opened(server, vocabulary)
            assert str(server.address) in str(error.value) and "\x1b" not in str(error.value)
    few = each(lambda position: [position.pop(one) for one in list(position)[3:]])
    mass = each(lambda position: [entry.update(logprob=-0.1) for entry in position.values()])
    for change, said in ((few, "--max-logprobs 8"), (mass, "add up to")):
        with (
            answering(as_vllm(example_gguf, change)) as server,
            opened(server, vocabulary) as teacher,
            pytest.raises(ServerError, match=said),
        ):
            teacher.score([np.arange(5, 9, dtype=np.int32)], Recipe(num_topk=8), {})
    unnamed = pytest.raises(UserError, match="--tokenizer")
    with answering(as_vllm(example_gguf)) as server, unnamed:
        opened(server, None)


def test_the_command(
    example_gguf: GGUFTeacher,
    vocabulary: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A capture from such a server: its store says what is truncated, and a student learns from
    it."""
    monkeypatch.chdir(tmp_path)
    text = "\n\n".join(f"Order {n}: {n * 3} boxes of gloves for the ward." for n in range(20))
    Path("text.txt").write_text(text, encoding="utf-8")
    with answering(as_vllm(example_gguf)) as server:
        given = ["--teacher", server.address, "--tokenizer", vocabulary, "--store", "store"]
        silent = command("capture", *given, "--samples", 4)
        assert silent.code == 2 and "--data" in silent.complaint
        data = ["--data", "text.txt", "--set", "data.max_length=24"]
        ended = command("capture", *given, *data)
        plan = command("plan", *given[:4], *data, "--student-size", "32x1")
    assert (ended.code, plan.code) == (0, 0), (ended, plan)
    assert "no sketch" in ended.said and "power law" in ended.said + ended.complaint
    assert "power law" in open_full_store(Path("store"))[0].manifest.truncation
    words = ["--student-size", "32x1", "--epochs", 1, "--safety-labels", "none", "--out", "run"]
    ended = command("train", "store", *words)
    assert ended.code == 0, ended
    page = Path("run/report.html").read_text(encoding="utf-8")
    card = Path("run/README.md").read_text(encoding="utf-8")
    assert "truncated: a server" in page and "truncated: a server" in card
