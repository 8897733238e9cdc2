"""lm-evaluation-harness on a GGUF file: log-likelihoods and texts against PyTorch, and what the harness is told.

``lm_eval`` is optional, so a module with its interface stands in for it; with the real one there (tried with 0.4.13),
the last test runs it.
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
from distill.evaluation import harness
from distill.evaluation.harness import (
    encoded,
    first_token,
    generate,
    run_harness,
    score_pairs,
    score_texts,
    windows,
)
from students.model import SO8TForCausalLM
from teachers.base import Tokens
from teachers.gguf_teacher import GGUFTeacher

TEXT = "Please order 4 boxes of gloves at 12 each."


def log_probabilities(student: SO8TForCausalLM, tokens: list[int]) -> list[list[float]]:
    """log p of every token of the vocabulary behind each of ``tokens``, from the definition, in float64."""
    with torch.no_grad():
        logits = student(torch.tensor([tokens])).logits[0].double()
    return (logits - logits.exp().sum(-1, keepdim=True).log()).tolist()


def expected(student: SO8TForCausalLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Σ log p of the continuation's tokens, one by one, and whether each is the most probable."""
    total, greedy, seen = 0.0, True, list(context)
    for token in continuation:
        row = log_probabilities(student, seen)[-1]
        total += row[token]
        greedy = greedy and max(row) == row[token]
        seen.append(token)
    return total, greedy


def greedy_text(student: SO8TForCausalLM, model: GGUFTeacher, context: str, count: int) -> list[int]:
    """The most probable tokens behind a text, up to the end of the turn."""
    tokens = harness.encode(model, [context])[0].tolist()
    found: list[int] = []
    while len(found) < count:
        row = log_probabilities(student, tokens + found)[-1]
        best = row.index(max(row))
        if best in model.info.end_tokens:
            break
        found.append(best)
    return found


def array(*tokens: int) -> Tokens:
    return np.array(tokens, dtype=np.int32)


@pytest.mark.needs_gguf
def test_log_likelihoods_are_pytorchs(tiny_teacher: GGUFTeacher, tiny_student: SO8TForCausalLM) -> None:
    """The sum over the continuation alone, and the greedy flag both ways, several pairs at once."""
    context = harness.encode(tiny_teacher, [TEXT])[0]
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
    for one, (before, after) in zip(found, pairs, strict=True):
        total, greedy = expected(tiny_student, before.tolist(), after.tolist())
        assert one.log_probability == pytest.approx(total, abs=2e-3) and one.greedy is greedy
    assert [one.greedy for one in found[:2]] == [False, True] and found[4].log_probability == 0.0


@pytest.mark.needs_gguf
def test_a_long_context_loses_its_beginning(
    tiny_teacher: GGUFTeacher, tiny_student: SO8TForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model sees the last 16 tokens before the last of the continuation, which is only predicted."""
    monkeypatch.setattr(harness, "MAX_WINDOW", 16)
    tokens = np.random.default_rng(0).integers(10, 1000, 40).tolist()
    found = score_pairs(tiny_teacher, [(array(*tokens[:36]), array(*tokens[36:]))])[0]
    rows = log_probabilities(tiny_student, tokens[-17:-1])
    total = sum(rows[place][tokens[place + 24]] for place in range(12, 16))
    assert found.log_probability == pytest.approx(total, abs=2e-3)
    assert len(rows) == 16 and abs(total - expected(tiny_student, tokens[:36], tokens[36:])[0]) > 0.1
    with pytest.raises(UserError, match=r"continuation of a benchmark has 17 tokens; .* can look at 16"):
        score_pairs(tiny_teacher, [(array(5), array(*tokens[:17]))])


@pytest.mark.needs_gguf
def test_pairs_are_scored_in_groups(tiny_teacher: GGUFTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little memory the logits may take, the figures are the same and in order."""
    pairs = [(array(*range(10, 12 + place)), array(40 + place, 50)) for place in range(9)]
    whole = score_pairs(tiny_teacher, pairs)
    monkeypatch.setattr(harness, "LOGITS_BYTES", 4 * tiny_teacher.info.vocab_size * 10)
    parts = score_pairs(tiny_teacher, pairs)
    assert [one.log_probability for one in parts] == pytest.approx(
        [one.log_probability for one in whole], abs=1e-3
    )
    assert len({round(one.log_probability, 3) for one in whole}) == 9


@pytest.mark.needs_gguf
def test_context_and_continuation_are_tokenised_together(example_gguf: GGUFTeacher) -> None:
    """The continuation is what the whole has behind the context's tokens; spaces between belong to it."""
    bos = [example_gguf.info.bos] if example_gguf.info.add_bos else []
    whole = [
        *bos,
        *example_gguf.tokenize(["The budget is 100"], add_special=False, parse_special=True)[0].tolist(),
    ]
    before = [*bos, *example_gguf.tokenize(["The budget"], add_special=False, parse_special=True)[0].tolist()]
    for context, continuation in (("The budget", " is 100"), ("The budget ", "is 100")):
        head, tail = encoded(example_gguf, context, continuation)
        assert [*head.tolist(), *tail.tolist()] == whole and head.tolist() == before
    first = first_token(example_gguf)
    alone = example_gguf.tokenize(["yes"], add_special=False, parse_special=True)[0].tolist()
    for context in ("", " "):
        head, tail = encoded(example_gguf, context, "yes")
        assert head.tolist() == [first] and len(tail) >= 1
    assert encoded(example_gguf, "", "yes")[1].tolist() == alone
    assert len(encoded(example_gguf, "The budget", "")[1]) == 0


def test_a_token_that_grows_over_the_border() -> None:
    """Where the whole has no more tokens than the context, its last token is the continuation, behind something."""

    def tokenize(texts: list[str], **_: bool) -> list[Tokens]:
        known = {"or": (1, 2), "order": (9,), "Please or": (5, 1, 2), "Please order": (5, 9)}
        return [array(*known[text]) for text in texts]

    info = SimpleNamespace(bos=0, eos=1, add_bos=False)
    for context, head, tail in (("or", [0], [9]), ("Please or", [5], [9])):
        model: Any = SimpleNamespace(info=info, tokenize=tokenize)
        assert [tokens.tolist() for tokens in encoded(model, context, "der")] == [head, tail]


@pytest.mark.needs_gguf
def test_a_text_that_spells_its_first_token_has_it_once(example_gguf: GGUFTeacher) -> None:
    """BOS is put before a text where the model wants one and it is not there."""
    first = first_token(example_gguf)
    spelled = example_gguf.detokenize([array(first)])[0]
    info = example_gguf.info
    wanting = SimpleNamespace(
        info=replace(info, bos=first, add_bos=True), tokenize=example_gguf.tokenize, file=example_gguf.file
    )
    once, twice = harness.encode(wanting, ["Hello", spelled + "Hello"])  # type: ignore[arg-type]
    assert once[0] == first and once.tolist().count(first) == 1 and twice.tolist().count(first) == 1
    nothing = SimpleNamespace(info=replace(info, bos=None, eos=None), file=example_gguf.file)
    with pytest.raises(UserError, match="neither BOS nor EOS"):
        first_token(nothing)  # type: ignore[arg-type]


def test_windows_are_the_harnesss_own_example() -> None:
    """The example in ``lm_eval.api.model.LM.loglikelihood_rolling``: ten tokens, four at a time, BOS is 99."""
    found = [(before.tolist(), after.tolist()) for before, after in windows(array(*range(10)), 99, 4)]
    assert found == [([99], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    assert [after.tolist() for _, after in windows(array(*range(4)), 99, 4)] == [[0, 1, 2, 3]]
    assert windows(array(), 99, 4) == []
    for count in range(1, 12):
        pairs = windows(array(*range(count)), 99, 3)
        assert [token for _, after in pairs for token in after.tolist()] == list(range(count))
        assert all(len(before) >= 1 and len(before) + len(after) <= 4 for before, after in pairs)


@pytest.mark.needs_gguf
def test_whole_texts_are_pytorchs(
    tiny_teacher: GGUFTeacher, tiny_student: SO8TForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token once, in windows of eight, and texts apart."""
    monkeypatch.setattr(harness, "MAX_WINDOW", 8)
    texts = [TEXT, "Hello", ""]
    found = score_texts(tiny_teacher, texts)
    first = first_token(tiny_teacher)
    for text, value in zip(texts, found, strict=True):
        tokens = tiny_teacher.tokenize([text], add_special=False, parse_special=True)[0].tolist()
        stream, total = [first, *tokens], 0.0
        for place in range(1, len(stream)):
            # The window's end: the next multiple of eight, or the end of the text; eight tokens are seen before it.
            end = min(math.ceil(place / 8) * 8, len(tokens))
            total += log_probabilities(tiny_student, stream[max(0, end - 8) : place])[-1][stream[place]]
        assert value == pytest.approx(total, abs=4e-3)
    assert (
        len(tiny_teacher.tokenize([TEXT], add_special=False, parse_special=True)[0]) > 8 and found[2] == 0.0
    )


@pytest.mark.needs_gguf
def test_texts_are_written_greedily(tiny_teacher: GGUFTeacher, tiny_student: SO8TForCausalLM) -> None:
    """What PyTorch finds most probable, over several pieces, cut at the first stop text and at the limit."""
    contexts = [TEXT, "Hello"]
    own = [greedy_text(tiny_student, tiny_teacher, context, 80) for context in contexts]
    spaced = harness.writes_space_first(tiny_teacher)
    texts = tiny_teacher.detokenize([np.array(tokens, dtype=np.int32) for tokens in own])
    texts = [text.removeprefix(" ") if spaced else text for text in texts]
    limits = {"max_gen_toks": 80, "do_sample": False, "temperature": 0.7}
    assert generate(tiny_teacher, [(context, {"until": [], **limits}) for context in contexts]) == texts
    short = tiny_teacher.detokenize([array(*own[0][:5])])[0]
    assert generate(tiny_teacher, [(TEXT, {"max_new_tokens": 5})])[0] in (short, short.removeprefix(" "))
    late, early = texts[0][60:63], texts[0][20:22]
    stop = [(TEXT, {"until": [late, early], **limits}), (contexts[1], {"until": late, **limits})]
    found = generate(tiny_teacher, stop)
    assert found[0] == texts[0][: min(texts[0].find(late), texts[0].find(early))] and early not in found[0]
    assert found[1] == (texts[1].partition(late)[0])


@pytest.mark.needs_gguf
def test_writing_keeps_within_the_window(tiny_teacher: GGUFTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most half of the window is written, whatever is asked for; the context loses its beginning."""
    monkeypatch.setattr(harness, "MAX_WINDOW", 16)
    seen: list[tuple[int, int]] = []
    speak = tiny_teacher.speak

    def watched(requests: Any, sampling: Any, **more: Any) -> Any:
        seen.append((max(len(segments[0]) for segments in requests), sampling.max_length))
        return speak(requests, sampling, **more)

    monkeypatch.setattr(tiny_teacher, "speak", watched)
    generate(tiny_teacher, [(TEXT * 3, {"max_gen_toks": 500}), ("", {"max_gen_toks": 3})])
    assert seen == [(8, 16)]


def test_settings_of_temperature() -> None:
    """As the harness normalises them: greedy unless a temperature is given and sampling not ruled out."""
    assert harness._temperature({}) == (0.0, 1.0)
    assert harness._temperature({"do_sample": True}) == (0.0, 1.0)
    assert harness._temperature({"temperature": 0.7, "top_p": 0.9}) == (0.7, 0.9)
    assert harness._temperature({"do_sample": False, "temperature": 0.7}) == (0.0, 1.0)


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
        called["written"] = model.generate_until([SimpleNamespace(args=("Hello", {"max_gen_toks": 4}))])
        results = {
            "alias": "tiny", "sample_len": 3, "acc,none": np.float64(0.5), "acc_stderr,none": "N/A",
            "exact_match,strict": 1, "f1,none": float("nan"),
        }  # fmt: skip
        return {"results": {"tiny": results}, "groups": {"all": {"acc,none": 0.25}}}

    modules = {
        name: ModuleType(name) for name in ("lm_eval", "lm_eval.tasks", "lm_eval.api", "lm_eval.api.model")
    }
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
    pair = score_pairs(tiny_teacher, [encoded(tiny_teacher, "The budget", " is 100")])[0]
    assert lm_eval["pairs"] == [(pytest.approx(pair.log_probability, abs=1e-3), pair.greedy)] * 2
    assert lm_eval["texts"] == pytest.approx(score_texts(tiny_teacher, ["Hello there"]), abs=1e-3)
    assert lm_eval["written"] == generate(tiny_teacher, [("Hello", {"max_gen_toks": 4})])


def test_what_cannot_be_run_is_said(lm_eval: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown task, one whose data is not there, one that runs what models write, an old harness, none."""
    for task, words in (
        ("nosuch", "has no task 'nosuch'"),
        ("gone", r"cannot load task 'gone' \(ConnectionError: Couldn't reach the data\); .*HF_HUB_OFFLINE=0"),
        ("code", "would run what a model writes"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            harness.require_tasks(["tiny", task])
        assert "\n" not in str(caught.value)
    monkeypatch.delattr(Manager, "load")
    with pytest.raises(UserError, match="too old"):
        harness.require_tasks(["tiny"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install lm_eval"):
        harness.require_harness()


@pytest.mark.slow
@pytest.mark.needs_gguf
def test_with_the_real_harness(
    example_gguf: GGUFTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks of its form over a local file: the choice it counts right is the one of the highest log-likelihood."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    choices = [" is 100.", " was", " blue green"]
    best = max(
        range(3),
        key=lambda place: (
            score_pairs(example_gguf, [encoded(example_gguf, "The budget", choices[place])])[
                0
            ].log_probability
        ),
    )
    docs = [{"q": "The budget", "choices": choices, "gold": gold, "text": TEXT} for gold in range(3)]
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps(doc) for doc in docs))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}},
    }
    shared |= {"test_split": "test", "doc_to_text": "{{q}}"}
    choose = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}
    choose |= {"target_delimiter": "", "metric_list": [{"metric": "acc"}]}
    roll = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    roll |= {"metric_list": [{"metric": "bits_per_byte"}]}
    written = generate(example_gguf, [("The budget", {"until": ["."], "max_gen_toks": 20})])[0]
    write = {
        "output_type": "generate_until",
        "doc_to_target": written,
        "metric_list": [{"metric": "exact_match"}],
    }
    write |= {"generation_kwargs": {"until": ["."], "max_gen_toks": 20, "do_sample": False}}
    paths = []
    for name, config in (("choose", choose), ("roll", roll), ("write", write)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps({"task": name, **shared, **config}))
        paths.append(str(path))
    found = run_harness(example_gguf, paths, None)
    assert best in range(3) and found["choose"]["acc"] == pytest.approx(1 / 3)
    bits = -score_texts(example_gguf, [TEXT])[0] / math.log(2) / len(TEXT.encode())
    assert found["roll"]["bits_per_byte"] == pytest.approx(bits, rel=1e-3)
    assert found["write"]["exact_match"] == 1.0
    (tmp_path / "docs.jsonl").write_text(json.dumps({**docs[0], "gold": best}))
    assert run_harness(example_gguf, paths[:1], 1)["choose"]["acc"] == 1.0
