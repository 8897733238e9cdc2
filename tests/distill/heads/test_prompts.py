"""Prompts with a decision each: the built-in set, a user's files, the split, the order."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.capture.temporary_files.tokenizer_only import tokenizer_alone, tokenizer_entries
from distill.config.loading import load_config
from distill.errors import UserError
from distill.heads import prompt_set as prompt_set_module
from distill.heads.prompt_set import JOINED_SHARE, PromptSet, shared_ends
from distill.heads.prompts import (
    SafetyPrompt,
    built_in_prompts,
    digest,
    prompt_tokens,
    prompts_by_hand,
    read_prompts,
    read_safety_prompts,
    require_examples,
    split_by_scenario,
    with_labels,
)
from distill.losses.batch import Prompts
from students.model.head_decisions import DECISIONS
from teachers import example_teacher
from teachers.gguf.file import read_gguf
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.tokenizer.conversation import conversation_tokens

ONE_HOT = {name: tuple(float(name == other) for other in DECISIONS) for name in DECISIONS}


def prompt(text: str, scenario: str, decision: str) -> SafetyPrompt:
    return SafetyPrompt(text, scenario, "", ONE_HOT[decision])  # type: ignore[arg-type]


def many(scenarios: int) -> list[SafetyPrompt]:
    """Scenarios of all three decisions, and as many of each single one."""
    every, single = (list(product(range(count), DECISIONS)) for count in (scenarios, 9))
    found = [prompt(f"{n} {name}", f"all {n}", name) for n, name in every]
    return found + [prompt(f"only {n} {name}", f"{name} {n}", name) for n, name in single]


def assert_disjoint(parts: Mapping[Any, Sequence[SafetyPrompt]]) -> None:
    """No scenario is in two parts."""
    for one, other in combinations(parts.values(), 2):
        assert not {p.scenario for p in one} & {p.scenario for p in other}


def test_the_built_in_set_is_large_and_balanced() -> None:
    """600 different prompts; languages and labels within 5 % of an even share, also crossed."""
    prompts = built_in_prompts()
    assert len(prompts) >= 600
    assert len({" ".join(p.text.casefold().split()) for p in prompts}) == len(prompts)
    languages = Counter(p.language for p in prompts)
    labels = Counter(p.decision for p in prompts)
    crossed = Counter((p.language, p.decision) for p in prompts)
    assert set(languages) == {"en", "ja"} and set(labels) == {0, 1, 2} and len(crossed) == 6
    for counts in (languages, labels, crossed):
        even = len(prompts) / len(counts)
        assert all(abs(count - even) <= 0.05 * even for count in counts.values()), counts
    for p in prompts:
        assert p.text == p.text.strip() and sorted(p.label) == [0.0, 0.0, 1.0], p
        japanese = any("぀" <= sign <= "ヿ" or "一" <= sign <= "鿿" for sign in p.text)
        assert japanese == (p.language == "ja"), p


def test_the_built_in_prompts_keep_their_parts() -> None:
    """Whatever a hash of their scenarios would say; those that people wrote come without a part
    where a teacher is to judge them, and are divided by scenario."""
    prompts = built_in_prompts()
    parts = split_by_scenario(prompts)
    assert_disjoint(parts)
    assert all(p.part == name for name, part in parts.items() for p in part)
    assert sum(map(len, parts.values())) == len(prompts)
    judged = prompts_by_hand()
    assert {p.part for p in judged} == {None}
    assert len(parts["test"]) + 900 < len(judged) < 1500  # a teacher answers each
    assert_disjoint(split_by_scenario(judged))


def test_the_split_is_disjoint_and_complete() -> None:
    """Every prompt once, no scenario in two parts, every decision in each."""
    for scenarios in (5, 6, 23):
        prompts = many(scenarios)
        parts = split_by_scenario(prompts)
        texts = sorted(p.text for part in parts.values() for p in part)
        assert texts == sorted(p.text for p in prompts), scenarios
        assert_disjoint(parts)
        assert all({p.decision for p in part} == {0, 1, 2} for part in parts.values()), scenarios
        assert 0.5 <= len(parts["train"]) / len(prompts) <= 0.7, scenarios


def test_the_split_does_not_depend_on_the_order_of_prompts() -> None:
    """The same prompts in another order fall to the same parts."""

    def texts(prompts: list[SafetyPrompt]) -> dict[Any, set[str]]:
        return {name: {p.text for p in part} for name, part in split_by_scenario(prompts).items()}

    prompts = many(12)
    for seed in range(3):
        shuffled = random.Random(seed).sample(prompts, len(prompts))
        assert texts(shuffled) == texts(prompts), seed
        assert digest(shuffled) != digest(prompts), seed


def test_the_digest_is_of_prompts_and_labels() -> None:
    """Another label, word or scenario is another digest; the same ones are not."""
    prompts = many(5)
    found = {digest(prompts), digest(many(6)), digest(prompts[:-1])}
    labels = np.array([p.label for p in prompts], dtype=np.float32)
    assert digest(with_labels(prompts, labels)) == digest(prompts)
    labels[0] = (0.25, 0.5, 0.25)
    soft = with_labels(prompts, labels)
    assert soft[0].decision == 1 and soft[0].label == (0.25, 0.5, 0.25) and soft[1:] == prompts[1:]
    renamed = [SafetyPrompt(p.text, p.scenario + "x", p.language, p.label) for p in prompts]
    assert len(found | {digest(soft), digest(renamed)}) == 5


def test_a_decision_without_enough_scenarios_is_refused() -> None:
    """By name: one with no example at all, and one that a part of the split would lack."""
    with pytest.raises(UserError, match=r"f\.jsonl: no example of ESCALATE and REFUSE"):
        require_examples([prompt("x", "x", "ALLOW")], "f.jsonl")
    few = [p for p in many(0) if p.decision != 2] + [prompt(n, n, "REFUSE") for n in "rs"]
    with pytest.raises(
        UserError, match=r"no REFUSE among the scenarios that fall to the validation part"
    ):
        require_examples(few, "f.jsonl")
    require_examples(many(5), "f.jsonl")


def lines(count: int = 6) -> list[dict[str, object]]:
    """Lines of a sound file."""
    return [{"prompt": f"{name} {n}", "label": name} for n in range(count) for name in DECISIONS]


def write(path: Path, entries: list[dict[str, object]], mark: str = "") -> Path:
    """A file of prompts."""
    text = "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    path.write_text(mark + text, "utf-8")
    return path


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    """Scenario and language if there, else each prompt on its own; labels where they are used."""
    entries = lines()
    entries[0] |= {"scenario": "one", "language": "en"}
    entries[1]["prompt"] = "two lines \u2028 and \u0085 more; \U0001f600 と日本語"
    found = read_prompts(write(tmp_path / "p.jsonl", entries, "\ufeff\n\n"))
    assert [p.text for p in found] == [entry["prompt"] for entry in entries]
    assert [DECISIONS[p.decision] for p in found] == [entry["label"] for entry in entries]
    assert (found[0].scenario, found[0].language) == ("one", "en")
    assert (found[1].scenario, found[1].language) == (found[1].text, "")
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b", "label": "perhaps"}])
    found = read_prompts(path, labelled=False)  # for the teacher to judge
    assert [p.text for p in found] == ["a", "b"] and found[0].label == found[1].label
    assert sum(found[0].label) == pytest.approx(1.0)


BAD: list[tuple[str, str]] = [
    ('{"prompt": "x", "label": "ALLOW"', r"p\.jsonl, line 1 is not JSON"),
    ('{"prompt": "x", "label": "ALLOW"}\n\n{oops}', r"p\.jsonl, line 3 is not JSON"),
    ('{"prompt": ' + "[" * 100_000, r"line 1 is not JSON"),
    ('{"prompt": "x", "label": ' + "9" * 5000 + "}", r"line 1 is not JSON"),
    ("[1, 2]", r"line 1: a JSON list.*\.json"),
    ('"text"', r"line 1 is not an object"),
    ('{"label": "ALLOW"}', r"line 1 has no text under 'prompt'"),
    ('{"prompt": "  ", "label": "ALLOW"}', r"no text under 'prompt'"),
    ('{"prompt": 7, "label": "ALLOW"}', r"no text under 'prompt'"),
    ('{"prompt": "x"}', r"has no 'label'; give one of ALLOW, ESCALATE, REFUSE"),
    ('{"prompt": "x", "label": "allow"}', r"label 'allow' is none of"),
    ('{"prompt": "x", "label": "DENY"}', r"label 'DENY' is none of"),
    ('{"prompt": "x", "label": 0}', r"label 0 is none of"),
    ('{"prompt": "x", "label": ["ALLOW"]}', r"label \['ALLOW'\] is none of"),
    ('{"prompt": "x", "label": "ALLOW", "author": 3}', r"'language' and 'author' must be text"),
    ('{"prompt": "x", "label": "ALLOW", "language": []}', r"must be text"),
    ('{"prompt": "\\ud800", "label": "ALLOW"}', r"line 1: has a lone surrogate"),
    ('{"prompt": "x", "scenario": "\\udfff", "label": "ALLOW"}', r"line 1: has a lone surrogate"),
    ("", r"p\.jsonl: the file is empty"),
    ("\n \n", r"p\.jsonl: the file is empty"),
    ('{"prompt": "x", "label": "ALLOW"}', r"p\.jsonl: no example of ESCALATE and REFUSE"),
]


def test_a_bad_file_is_refused(tmp_path: Path) -> None:
    """With the file, the line, and what is wrong, where labels are not looked at too."""
    path = tmp_path / "p.jsonl"
    for (content, message), labelled in product(BAD, (True, False)):
        if labelled or not re.search("label|no example", message):
            path.write_text(content, encoding="utf-8")
            with pytest.raises(UserError, match=message):
                read_prompts(path, labelled=labelled)
                pytest.fail(f"{content[:80]!r} is taken")


def test_what_is_no_text_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, a folder, other bytes, too large."""
    with pytest.raises(UserError, match=r"none\.jsonl cannot be read: No such file"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path)
    (tmp_path / "p.jsonl").write_bytes('{"prompt": "あ"}'.encode("shift-jis"))
    with pytest.raises(UserError, match=r"p\.jsonl, line \d: not UTF-8"):
        read_prompts(tmp_path / "p.jsonl")
    monkeypatch.setattr("distill.heads.prompts.MAX_FILE_BYTES", 8)
    with pytest.raises(UserError, match="larger than"):
        read_prompts(tmp_path / "p.jsonl")


def test_which_prompts_the_settings_mean(tmp_path: Path) -> None:
    """Built in, a file, the teacher's judgment of either, or none; prompts are for the teacher."""
    labelled = write(tmp_path / "l.jsonl", lines())
    bare = write(tmp_path / "b.jsonl", [{"prompt": "x"}])

    def read(*settings: str) -> list[SafetyPrompt] | None:
        return read_safety_prompts(load_config(None, {}, settings))

    assert read() == list(built_in_prompts())
    assert read("safety.labels=teacher") == prompts_by_hand()
    assert read(f"safety.labels={labelled}") == read_prompts(labelled)
    asked = read("safety.labels=teacher", f"safety.prompts={bare}")
    assert asked is not None and [p.text for p in asked] == ["x"]
    assert read("safety.labels=none") is None and read("loss.lambda_safety=0") is None
    with pytest.raises(UserError, match=r"is for safety\.labels=teacher"):
        read(f"safety.prompts={bare}")


def test_how_many_prompts_a_step_takes() -> None:
    """As many pass in a long training as in a short one, in few steps where there are many."""
    for settings, steps, rhythm in (
        ([], 10, (1, 16)),
        ([], 500, (7, 15)),
        ([], 2000, (31, 16)),
        ([], 10**6, (15625, 16)),
        ([], 0, (1, 16)),
        (["safety.passes=10"], 3, (4, 14)),
        (["safety.together=3"], 3, (1, 3)),
        (["safety.passes=10", "safety.together=2"], 50, (10, 2)),
    ):
        safety = load_config(None, {}, settings).safety
        assert safety.rhythm(steps) == rhythm, (settings, steps)


TEMPLATE = ([901, 902], [950])


def prompt_set(count: int, seed: int = 0) -> PromptSet:
    """Prompts of different lengths in a template; prompt n has the words 10 n + 1, 10 n + 2, …"""
    prompts = [prompt(str(n), str(n), DECISIONS[n % 3]) for n in range(count)]
    words = [[10 * n + place for place in range(1, 3 + n % 4)] for n in range(count)]
    rows = [np.array([*TEMPLATE[0], *row, *TEMPLATE[1]], dtype=np.int32) for row in words]
    return PromptSet(prompts, rows, seed)


def rows_of(batch: Prompts) -> list[list[int]]:
    """The tokens of a batch without its padding, which has to be 0."""
    assert len(batch.tokens) == len(batch.lengths) == len(batch.labels) == len(batch.weights) > 0
    assert all(not row[int(n) :].any() for row, n in zip(batch.tokens, batch.lengths, strict=True))
    return [row[: int(n)].tolist() for row, n in zip(batch.tokens, batch.lengths, strict=True)]


def test_each_prompt_of_a_turn_falls_to_one_part() -> None:
    """Over the micro-batches of a step every prompt counts once; a stand-in counts nothing."""
    prompts = prompt_set(11)
    for parts, turn in product((1, 2, 3, 7), range(5)):
        whole = prompts.batch(turn, 4, 0, 1)
        expected = list(zip(rows_of(whole), whole.labels.tolist(), strict=True))
        found, weight = [], 0.0
        for part in range(parts):
            batch = prompts.batch(turn, 4, part, parts)
            rows, share = rows_of(batch), float(batch.weights.sum())
            weight += share
            if share:
                found += zip(rows, batch.labels.tolist(), strict=True)
        assert sorted(found) == sorted(expected) and len(expected) == 4, (parts, turn)
        assert weight == pytest.approx(1.0), (parts, turn)


def test_each_prompt_passes_once_before_any_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a new order every time, the same for the same seed, wherever one starts."""
    monkeypatch.setattr(prompt_set_module, "CHANGED_SHARE", 0.0)
    monkeypatch.setattr(prompt_set_module, "JOINED_SHARE", 0.0)

    def numbers(prompts: PromptSet, turn: int) -> list[int]:
        batch = prompts.batch(turn, 3, 0, 1)
        rows = rows_of(batch)
        found = [row[len(TEMPLATE[0])] // 10 for row in rows]
        assert rows == [prompts.tokens[n].tolist() for n in found]
        assert batch.labels.tolist() == [list(prompts.prompts[n].label) for n in found]
        return found

    seen = [n for turn in range(33) for n in numbers(prompt_set(11), turn)]
    rounds = [seen[start : start + 11] for start in range(0, 99, 11)]
    assert all(sorted(found) == list(range(11)) for found in rounds)
    assert len({tuple(found) for found in rounds}) == 9
    running = prompt_set(11)
    for turn in (20, 3, 3, 0, 32, 7):
        assert numbers(running, turn) == seen[3 * turn : 3 * turn + 3], turn
    assert [n for turn in range(33) for n in numbers(prompt_set(11, 1), turn)] != seen
    assert set(numbers(prompt_set(2), 0)) == {0, 1}


def test_a_prompt_is_never_seen_twice_alike() -> None:
    """Some words are others', some prompts have company; template, label and length stay."""
    prompts, joined, changed, total = prompt_set(11), 0, 0, 0
    known = {word for row in prompts.tokens for word in row[2:-1].tolist()}
    for number in range(3000):
        row, label = prompts.varied(number)
        again, same = prompts.varied(number)
        assert row.dtype == np.int32 and np.array_equal(row, again) and np.array_equal(label, same)
        assert row[:2].tolist() == TEMPLATE[0] and row[-1:].tolist() == TEMPLATE[1]
        words = row[2:-1].tolist()
        assert set(words) <= known and len(row) <= 2 * max(map(len, prompts.tokens))
        neighbours = [(a, b) for a, b in pairwise(words) if b != a + 1]
        joined += any(b % 10 == 1 for _, b in neighbours)
        changed, total = changed + len(neighbours), total + len(words)
    assert abs(joined / 3000 - JOINED_SHARE) < 0.1 and 0.2 < changed / total < 0.5
    assert not np.array_equal(prompts.varied(0)[0], prompt_set(11, 1).varied(0)[0])


def test_prompts_together_have_the_graver_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """REFUSE over ESCALATE over ALLOW, in either order; the words of both are there, whole."""
    monkeypatch.setattr(prompt_set_module, "CHANGED_SHARE", 0.0)
    monkeypatch.setattr(prompt_set_module, "JOINED_SHARE", 1.0)
    prompts, orders = prompt_set(11), set()
    for number in range(400):
        row, label = prompts.varied(number)
        words = row[2:-1].tolist()
        parts = [word // 10 for word in words if word % 10 == 1]
        assert words == [word for n in parts for word in prompts.tokens[n][2:-1].tolist()]
        assert int(label.argmax()) == max(n % 3 for n in parts) and 1 <= len(parts) <= 2
        orders.add(len(parts) == 2 and parts[0] % 3 < parts[1] % 3)
    assert orders == {True, False}


def test_what_all_rows_begin_and_end_with() -> None:
    """The template around the words; each row keeps at least one token of its own."""
    for rows, ends in (
        ([[1, 2, 3, 9], [1, 2, 4, 9]], (2, 1)),
        ([[1, 2, 9], [1, 2, 7, 8, 9]], (2, 0)),
        ([[1, 5], [1, 5]], (1, 0)),
        ([[1, 5, 5], [1, 5, 5, 5]], (2, 0)),
        ([[1, 2, 3], [4, 5, 6]], (0, 0)),
        ([[1, 2, 3]], (2, 0)),
        ([[7], [8, 9]], (0, 0)),
        ([[1], [1]], (0, 0)),
    ):
        assert shared_ends([np.array(row, dtype=np.int32) for row in rows]) == ends, rows


TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces and\ttabs\nand lines\r\n",
    "日本語の文章です。漢字とカナ、そして「括弧」。",
    "混ぜた text with 数字 12345 and émigré naïve",
    "emoji 😀👨‍👩‍👧‍👦🏳️‍🌈 and ⁣separators​",
    "<|im_start|>user <s> </s> <unk> [INST] special words as text",
    "\u2028\u0085\x07 control",
    "x" * 300,
]


def test_a_tokenizer_alone_is_the_teachers(example_gguf: GGUFTeacher) -> None:
    """The same ids for lines and conversations, with and without special tokens, and text back."""
    entries = tokenizer_entries(read_gguf(example_teacher()))
    some = built_in_prompts()[::23]
    texts = TEXTS + [p.text for p in some]
    with tokenizer_alone(entries, example_gguf.info.vocab_size) as words:
        for special in (False, True):
            mine = words.tokenize(texts, add_special=special, parse_special=special)
            theirs = example_gguf.tokenize(texts, add_special=special, parse_special=special)
            assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert words.detokenize(theirs) == example_gguf.detokenize(theirs)
        assert words.info.tokenizer_sha256 == example_gguf.info.tokenizer_sha256
        for name in ("bos", "eos", "end_tokens", "add_bos", "chat_template"):
            assert getattr(words.info, name) == getattr(example_gguf.info, name)
        for p, tokens in zip(some, prompt_tokens(words, some, 512), strict=True):
            talk = [{"role": "user", "content": p.text}]
            assert np.array_equal(tokens, conversation_tokens(example_gguf, talk, answer=True))
        with pytest.raises(
            UserError, match=r"prompt 'x{40}…' has \d+ tokens, the student's context is 64"
        ):
            prompt_tokens(words, [prompt("x" * 600, "x", "ALLOW")], 64)
        folder = words.file.path
    assert not folder.exists()
