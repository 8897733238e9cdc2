"""lm-evaluation-harness on a GGUF file: log-likelihoods and texts against PyTorch.

``lm_eval`` is optional: a module with its interface stands in for it. The last test runs the real
one where it is installed (tried with 0.4.13).

Over 400 lines because one teacher serves every test.
"""

from __future__ import annotations

import abc
import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distill.errors import UserError
from distill.evaluation import lm_eval_adapter
from distill.evaluation.inputs import check
from distill.evaluation.lm_eval_adapter import (
    encode,
    encode_pair,
    first_token,
    generate,
    run_harness,
    score_pairs,
    score_texts,
    windows,
)
from students.model.decoder import SO8TForCausalLM
from teachers.base import Tokens
from teachers.llama_cpp.teacher import GGUFTeacher

TEXT = "Please order 4 boxes of gloves at 12 each."


def log_probabilities(student: SO8TForCausalLM, tokens: list[int]) -> torch.Tensor:
    """log p of every token behind each of ``tokens``, from the definition, in float64."""
    with torch.no_grad():
        logits = student(torch.tensor([tokens])).logits[0].double()
    return logits - logits.exp().sum(-1, keepdim=True).log()


def expected(
    student: SO8TForCausalLM, context: list[int], continuation: list[int]
) -> tuple[float, bool]:
    """Σ log p of the continuation's tokens, one by one, and whether each is the most probable."""
    total, greedy, seen = 0.0, True, list(context)
    for token in continuation:
        row = log_probabilities(student, seen)[-1]
        total += float(row[token])
        greedy = greedy and bool(row.max() == row[token])
        seen.append(token)
    return total, greedy


def greedy_text(
    student: SO8TForCausalLM, model: GGUFTeacher, context: str, count: int
) -> list[int]:
    """The most probable tokens behind a text, up to the end of the turn."""
    tokens = encode(model, [context])[0].tolist()
    found: list[int] = []
    while len(found) < count:
        best = int(log_probabilities(student, tokens + found)[-1].argmax())
        if best in model.info.end_tokens:
            break
        found.append(best)
    return found


def array(*tokens: int) -> Tokens:
    return np.array(tokens, dtype=np.int32)


def tokens_of(model: GGUFTeacher, text: str) -> list[int]:
    """A text's tokens without BOS."""
    found: list[int] = model.tokenize([text], add_special=False, parse_special=True)[0].tolist()
    return found


@pytest.mark.needs_gguf
def test_log_likelihoods_are_pytorchs(
    tiny_teacher: GGUFTeacher, tiny_student: SO8TForCausalLM
) -> None:
    """The sum over the continuation alone, and the greedy flag both ways, several pairs at once."""
    context = encode(tiny_teacher, [TEXT])[0]
    best = greedy_text(tiny_student, tiny_teacher, TEXT, 3)
    assert len(best) == 3
    pairs = [
        (context, array(7, 300, 12)),
        (context, array(*best)),
        (context[:3], context[3:]),
        (array(first_token(tiny_teacher)), array(5)),
        (context, array()),
    ]
    found = score_pairs(tiny_teacher, pairs)
    for (log_prob, greedy), (before, after) in zip(found, pairs, strict=True):
        total, most_probable = expected(tiny_student, before.tolist(), after.tolist())
        assert log_prob == pytest.approx(total, abs=2e-3) and greedy is most_probable
    assert [greedy for _, greedy in found[:2]] == [False, True] and found[4][0] == 0.0


@pytest.mark.needs_gguf
def test_a_long_context_loses_its_beginning(
    tiny_teacher: GGUFTeacher, tiny_student: SO8TForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model sees 16 tokens before the continuation's last one, which is only predicted."""
    monkeypatch.setattr(lm_eval_adapter, "MAX_WINDOW", 16)
    tokens = np.random.default_rng(0).integers(10, 1000, 40).tolist()
    ((log_prob, _),) = score_pairs(tiny_teacher, [(array(*tokens[:36]), array(*tokens[36:]))])
    rows = log_probabilities(tiny_student, tokens[-17:-1])
    total = float(sum(rows[place][tokens[place + 24]] for place in range(12, 16)))
    assert log_prob == pytest.approx(total, abs=2e-3)
    assert abs(total - expected(tiny_student, tokens[:36], tokens[36:])[0]) > 0.1
    with pytest.raises(UserError, match=r"has 17 tokens; .* can look at 16"):
        score_pairs(tiny_teacher, [(array(5), array(*tokens[:17]))])


@pytest.mark.needs_gguf
def test_pairs_are_scored_in_groups(
    tiny_teacher: GGUFTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little memory the logits may take, the figures are the same and in order."""
    pairs = [(array(*range(10, 12 + place)), array(40 + place, 50)) for place in range(9)]
    expected = [log_prob for log_prob, _ in score_pairs(tiny_teacher, pairs)]
    monkeypatch.setattr(lm_eval_adapter, "LOGITS_BYTES", 4 * tiny_teacher.info.vocab_size * 10)
    parts = [log_prob for log_prob, _ in score_pairs(tiny_teacher, pairs)]
    assert parts == pytest.approx(expected, abs=1e-3)
    assert len({round(value, 3) for value in expected}) == 9


@pytest.mark.needs_gguf
def test_context_and_continuation_are_tokenised_together(example_gguf: GGUFTeacher) -> None:
    """The continuation is what the whole has behind the context's tokens, spaces included."""
    bos = [example_gguf.info.bos] if example_gguf.info.add_bos else []
    whole = [*bos, *tokens_of(example_gguf, "The budget is 100")]
    before = [*bos, *tokens_of(example_gguf, "The budget")]
    for context, continuation in (("The budget", " is 100"), ("The budget ", "is 100")):
        head, tail = encode_pair(example_gguf, context, continuation)
        assert [*head.tolist(), *tail.tolist()] == whole and head.tolist() == before
    first = first_token(example_gguf)
    for context in ("", " "):
        head, tail = encode_pair(example_gguf, context, "yes")
        assert head.tolist() == [first] and len(tail) >= 1
    assert encode_pair(example_gguf, "", "yes")[1].tolist() == tokens_of(example_gguf, "yes")
    assert len(encode_pair(example_gguf, "The budget", "")[1]) == 0


def test_a_token_that_grows_over_the_border() -> None:
    """Where the whole has no more tokens than the context, its last one is the continuation."""

    def tokenize(texts: list[str], **_: bool) -> list[Tokens]:
        known = {"or": (1, 2), "order": (9,), "Please or": (5, 1, 2), "Please order": (5, 9)}
        return [array(*known[text]) for text in texts]

    info = SimpleNamespace(bos=0, eos=1, add_bos=False)
    for context, head, tail in (("or", [0], [9]), ("Please or", [5], [9])):
        model: Any = SimpleNamespace(info=info, tokenize=tokenize)
        assert [tokens.tolist() for tokens in encode_pair(model, context, "der")] == [head, tail]


@pytest.mark.needs_gguf
def test_a_text_that_spells_its_first_token_has_it_once(example_gguf: GGUFTeacher) -> None:
    """BOS is put before a text where the model wants one and it is not there."""
    first = first_token(example_gguf)
    spelled = example_gguf.detokenize([array(first)])[0]
    info, file = example_gguf.info, example_gguf.file
    with_bos = replace(info, bos=first, add_bos=True)
    wanting: Any = SimpleNamespace(info=with_bos, tokenize=example_gguf.tokenize, file=file)
    once, twice = (tokens.tolist() for tokens in encode(wanting, ["Hello", spelled + "Hello"]))
    assert once[0] == first and once.count(first) == twice.count(first) == 1
    nothing: Any = SimpleNamespace(info=replace(info, bos=None, eos=None), file=file)
    with pytest.raises(UserError, match="neither BOS nor EOS"):
        first_token(nothing)


def test_windows_are_the_harnesss_own_example() -> None:
    """That of ``LM.loglikelihood_rolling``: ten tokens, four at a time, BOS is 99."""
    pairs = windows(array(*range(10)), 99, 4)
    found = [(before.tolist(), after.tolist()) for before, after in pairs]
    assert found == [([99], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    assert [after.tolist() for _, after in windows(array(*range(4)), 99, 4)] == [[0, 1, 2, 3]]
    assert windows(array(), 99, 4) == []
    for count in range(1, 12):
        pairs = windows(array(*range(count)), 99, 3)
        assert np.concatenate([after for _, after in pairs]).tolist() == list(range(count)), count
        sizes = [(len(before), len(after)) for before, after in pairs]
        assert all(seen >= 1 and seen + new <= 4 for seen, new in sizes), count


@pytest.mark.needs_gguf
def test_whole_texts_are_pytorchs(
    tiny_teacher: GGUFTeacher, tiny_student: SO8TForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token once, in windows of eight, and texts apart."""
    monkeypatch.setattr(lm_eval_adapter, "MAX_WINDOW", 8)
    texts = [TEXT, "Hello", ""]
    found = score_texts(tiny_teacher, texts)
    first = first_token(tiny_teacher)
    for text, value in zip(texts, found, strict=True):
        tokens = tokens_of(tiny_teacher, text)
        stream, total = [first, *tokens], 0.0
        for place in range(1, len(stream)):
            # The window ends at the next multiple of eight, or with the text; eight tokens are
            # seen before its end.
            end = min(math.ceil(place / 8) * 8, len(tokens))
            seen = stream[max(0, end - 8) : place]
            total += float(log_probabilities(tiny_student, seen)[-1][stream[place]])
        assert value == pytest.approx(total, abs=4e-3), text
    assert len(tokens_of(tiny_teacher, TEXT)) > 8 and found[2] == 0.0


@pytest.mark.needs_gguf
def test_texts_are_written_greedily(
    tiny_teacher: GGUFTeacher, tiny_student: SO8TForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What PyTorch finds most probable, over several pieces, cut at a stop text or the limit."""
    monkeypatch.setattr(lm_eval_adapter, "FIRST_PIECE", 8)
    contexts = [TEXT, "Hello"]
    own = [greedy_text(tiny_student, tiny_teacher, context, 24) for context in contexts]
    texts = tiny_teacher.detokenize([array(*tokens) for tokens in own])
    if lm_eval_adapter.space_is_prefixed(tiny_teacher):
        texts = [text.removeprefix(" ") for text in texts]
    limits = {"max_gen_toks": 24, "do_sample": False, "temperature": 0.7}
    unstopped = [(context, {"until": [], **limits}) for context in contexts]
    assert generate(tiny_teacher, unstopped) == texts
    short = tiny_teacher.detokenize([array(*own[0][:5])])[0]
    assert generate(tiny_teacher, [(TEXT, {"max_new_tokens": 5})])[0] in (
        short,
        short.removeprefix(" "),
    )
    late, early = texts[0][30:33], texts[0][20:22]
    assert len(late) == 3
    stop = [(TEXT, {"until": [late, early], **limits}), (contexts[1], {"until": late, **limits})]
    found = generate(tiny_teacher, stop)
    end = min(texts[0].find(late), texts[0].find(early))
    assert found == [texts[0][:end], texts[1].partition(late)[0]] and early not in found[0]


@pytest.mark.needs_gguf
def test_writing_keeps_within_the_window_and_at_the_temperature(
    tiny_teacher: GGUFTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most half of the window; greedy unless a temperature is given and sampling allowed."""
    monkeypatch.setattr(lm_eval_adapter, "MAX_WINDOW", 16)
    seen: list[tuple[float, ...]] = []
    write = tiny_teacher.generate

    def watched(request: Any) -> Any:
        sampling, longest = request.sampling, max(len(prompt[0]) for prompt in request.prompts)
        seen.append((longest, sampling.max_length, sampling.temperature, sampling.top_p))
        return write(request)

    monkeypatch.setattr(tiny_teacher, "generate", watched)
    generate(tiny_teacher, [(TEXT * 3, {"max_gen_toks": 500}), ("", {"max_gen_toks": 3})])
    assert seen == [(8, 16, 0.0, 1.0)]
    for settings, expected in (
        ({"do_sample": True}, (0.0, 1.0)),
        ({"temperature": 0.7, "top_p": 0.9}, (0.7, 0.9)),
        ({"do_sample": False, "temperature": 0.7}, (0.0, 1.0)),
    ):
        generate(tiny_teacher, [("Hello", {**settings, "max_gen_toks": 1})])
        assert seen.pop()[2:] == expected and len(seen) == 1, settings


class Lm(abc.ABC):
    """The harness's interface: three things to answer."""

    @abc.abstractmethod
    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]: ...

    @abc.abstractmethod
    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]: ...

    @abc.abstractmethod
    def generate_until(self, requests: list[Any]) -> list[str]: ...


class Manager:
    """The harness's manager of tasks, which knows three."""

    all_tasks = ("tiny", "gone", "code")

    def load(self, tasks: list[str]) -> dict[str, Any]:
        if tasks == ["gone"]:
            raise ConnectionError("Couldn't reach\nthe data")
        if tasks == ["code"]:
            return {"tasks": {"code": SimpleNamespace(UNSAFE_CODE=True)}}
        return {"tasks": {"tiny": SimpleNamespace()}}


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A module in place of ``lm_eval``; what it was called with."""
    called: dict[str, Any] = {}

    def simple_evaluate(**arguments: Any) -> dict[str, Any]:
        called.update(arguments)
        model = arguments["model"]
        pair = SimpleNamespace(args=("The budget", " is 100"))
        called["pairs"] = model.loglikelihood([pair, pair])
        called["texts"] = model.loglikelihood_rolling([SimpleNamespace(args=("Hello there",))])
        called["written"] = model.generate_until(
            [SimpleNamespace(args=("Hello", {"max_gen_toks": 4}))]
        )
        results = {"alias": "tiny", "sample_len": 3, "exact_match,strict": 1}
        results |= {"acc,none": np.float64(0.5), "acc_stderr,none": "N/A", "f1,none": math.nan}
        return {"results": {"tiny": results}, "groups": {"all": {"acc,none": 0.25}}}

    names = ("lm_eval", "lm_eval.tasks", "lm_eval.api", "lm_eval.api.model")
    modules = {name: ModuleType(name) for name in names}
    modules["lm_eval"].simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    modules["lm_eval"].__spec__ = importlib.util.spec_from_loader("lm_eval", None)
    modules["lm_eval.tasks"].TaskManager = Manager  # type: ignore[attr-defined]
    modules["lm_eval.api.model"].LM = Lm  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield called


@pytest.mark.needs_gguf
def test_the_harness_is_asked_and_its_figures_taken(
    lm_eval: dict[str, Any], tiny_teacher: GGUFTeacher
) -> None:
    """Tasks and limit are passed on; finite numbers come back, without ``none`` filters."""
    found = run_harness(tiny_teacher, ["tiny"], 7)
    assert found == {"tiny": {"acc": 0.5, "exact_match,strict": 1.0}, "all": {"acc": 0.25}}
    assert type(found["tiny"]["acc"]) is float and json.dumps(found)
    assert (lm_eval["tasks"], lm_eval["limit"]) == (["tiny"], 7)
    pair = encode_pair(tiny_teacher, "The budget", " is 100")
    ((log_prob, greedy),) = score_pairs(tiny_teacher, [pair])
    assert lm_eval["pairs"] == [(pytest.approx(log_prob, abs=1e-3), greedy)] * 2
    assert lm_eval["texts"] == pytest.approx(score_texts(tiny_teacher, ["Hello there"]), abs=1e-3)
    assert lm_eval["written"] == generate(tiny_teacher, [("Hello", {"max_gen_toks": 4})])


def test_what_cannot_be_run_is_said(
    lm_eval: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task unknown, without data, or that runs what models write; a harness too old, or none."""
    gone = r"task 'gone' \(ConnectionError: Couldn't reach the data\); .*HF_HUB_OFFLINE=0"
    rows = {"nosuch": "has no task 'nosuch'", "gone": gone, "code": "would run what a model writes"}
    for task, words in rows.items():
        with pytest.raises(UserError, match=words) as caught:
            lm_eval_adapter.require_tasks(["tiny", task])
        assert "\n" not in str(caught.value)
    monkeypatch.delattr(Manager, "load")
    with pytest.raises(UserError, match="too old"):
        lm_eval_adapter.require_tasks(["tiny"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install lm_eval"):
        check.require_harness()


@pytest.mark.slow
@pytest.mark.needs_gguf
def test_with_the_real_harness(
    example_gguf: GGUFTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tasks over a local file: the right choice has the highest log-likelihood."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    choices = [" is 100.", " was", " blue green"]
    pairs = [encode_pair(example_gguf, "The budget", choice) for choice in choices]
    scores = [score_pairs(example_gguf, [pair])[0][0] for pair in pairs]
    best = scores.index(max(scores))
    docs = [
        {"q": "The budget", "choices": choices, "gold": gold, "text": TEXT} for gold in range(3)
    ]
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps(doc) for doc in docs))
    files = {"data_files": {"test": str(tmp_path / "docs.jsonl")}}
    shared = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    shared |= {"doc_to_text": "{{q}}"}
    choose = {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}]}
    choose |= {"doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}", "target_delimiter": ""}
    roll = {"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "bits_per_byte"}]}
    roll |= {"doc_to_text": "", "doc_to_target": "{{text}}"}
    limits = {"until": ["."], "max_gen_toks": 20}
    write = {"output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]}
    write |= {"doc_to_target": generate(example_gguf, [("The budget", limits)])[0]}
    write |= {"generation_kwargs": limits | {"do_sample": False}}
    paths = []
    for name, config in (("choose", choose), ("roll", roll), ("write", write)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps({"task": name, **shared, **config}))
        paths.append(str(path))
    found = run_harness(example_gguf, paths, None)
    assert found["choose"]["acc"] == pytest.approx(1 / 3)
    bits = -score_texts(example_gguf, [TEXT])[0] / math.log(2) / len(TEXT.encode())
    assert found["roll"]["bits_per_byte"] == pytest.approx(bits, rel=1e-3)
    assert found["write"]["exact_match"] == 1.0
    (tmp_path / "docs.jsonl").write_text(json.dumps({**docs[0], "gold": best}))
    assert run_harness(example_gguf, paths[:1], 1)["choose"]["acc"] == 1.0
