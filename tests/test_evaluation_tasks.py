"""Prompts with known answers: how files are read, when an answer is right, and how a model is asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distill.errors import UserError
from distill.evaluation.task_file import Task, normalised, read_tasks
from distill.evaluation.tasks import MARGIN, REASONING_TOKENS, answer_tasks, score_task
from distill.reports.report import wilson
from teachers.base import Sampling, Tokens
from teachers.conversation import request_tokens
from teachers.gguf_teacher import GGUFTeacher
from tests.conftest import BigramTeacher

END = 3  # the sign that ends a turn


class Letters:
    """A model whose tokens are letters and which answers what it was told to, whatever else is in its batch."""

    def __init__(
        self, answers: dict[str, str], template: str = "[{{ messages[0].content }}]", context: int = 4096
    ) -> None:
        self.answers = answers
        info = BigramTeacher(8, 4).info
        self.info = replace(
            info, chat_template=template, context_length=context, end_tokens=(END,), add_bos=False, bos=2
        )
        self.file = SimpleNamespace(path=Path("letters.gguf"))
        self.lengths: list[int] = []

    def tokenize(self, texts: Sequence[str], *, add_special: bool, parse_special: bool) -> list[Tokens]:
        return [np.array([ord(sign) for sign in text], dtype=np.int32) for text in texts]

    def detokenize(self, sequences: Sequence[Tokens]) -> list[str]:
        return ["".join(chr(token) for token in tokens) for tokens in sequences]

    def speak(
        self,
        requests: Sequence[Sequence[Tokens]],
        sampling: Sampling,
        *,
        progress: Callable[[int], None],
    ) -> list[Tokens]:
        assert sampling.temperature == 0.0
        self.lengths.append(sampling.max_length)
        found = []
        for place, (prompt,) in enumerate(requests, 1):
            request = self.detokenize([prompt])[0].partition("]")[0].removeprefix("[")
            answer = [*(ord(sign) for sign in self.answers[request]), END]
            found.append(np.array([*prompt, *answer], dtype=np.int32)[: sampling.max_length])
            progress(place)
        return found


def written(path: Path, *lines: Any) -> Path:
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8"
    )
    return path


def test_read_tasks(tmp_path: Path) -> None:
    """One answer or several, blank lines, other keys, a byte order mark, signs that end lines elsewhere."""
    path = written(
        tmp_path / "t.jsonl",
        {"prompt": "2 + 2?", "answer": "4", "id": 7},
        "",
        {"prompt": "a\u2028b", "answers": ["yes", "はい"], "match": "prefix"},
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_tasks(path) == [
        Task("2 + 2?", ("4",), "exact", 1),
        Task("a\u2028b", ("yes", "はい"), "prefix", 3),
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("[1]", "line 2 is not an object"),
        ({"answer": "4"}, "line 2 has no text under 'prompt'"),
        ({"prompt": " ", "answer": "4"}, "line 2 has no text under 'prompt'"),
        ({"prompt": "x"}, "line 2 has no 'answer'"),
        ({"prompt": "x", "answer": 4}, "line 2: an answer is no text, or blank"),
        ({"prompt": "x", "answer": " \n"}, "line 2: an answer is no text, or blank"),
        ({"prompt": "x", "answers": []}, "line 2: 'answers' must be a list"),
        ({"prompt": "x", "answers": "4"}, "line 2: 'answers' must be a list"),
        ({"prompt": "x", "answers": ["4", None]}, "line 2: an answer is no text"),
        ({"prompt": "x", "answer": "4", "answers": ["5"]}, "line 2 has both"),
        (
            {"prompt": "x", "answer": "4", "match": "regex"},
            "line 2: match 'regex' is none of exact, prefix, contains",
        ),
        ({"prompt": "x", "answer": "4", "match": ["exact"]}, "is none of"),
        ({"prompt": "x", "answer": "\ud800"}, "line 2: has a lone surrogate"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: Any, words: str) -> None:
    path = written(tmp_path / "t.jsonl", {"prompt": "ok", "answer": "ok"}, line)
    with pytest.raises(UserError, match=words.replace("[", r"\[")) as caught:
        read_tasks(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    """Missing, a folder, empty, blank, not UTF-8."""
    (tmp_path / "blank").write_text("\n \n")
    (tmp_path / "bytes").write_bytes(b'{"prompt": "\xff"}')
    for name, words in (
        ("no", "cannot be read"),
        ("", "cannot be read"),
        ("blank", "is empty"),
        ("bytes", "not UTF-8"),
    ):
        with pytest.raises(UserError, match=words):
            read_tasks(tmp_path / name)


@pytest.mark.parametrize(
    ("match", "answer", "right"),
    [
        ("exact", "4", True),
        ("exact", "  4\n", True),
        ("exact", "4.", False),
        ("exact", "It is 4", False),
        ("exact", "caf\u0065\u0301  au\n\tlait", True),
        ("exact", "Café au lait", False),
        ("prefix", "4, because 2 and 2 are 4", True),
        ("prefix", "It is 4", False),
        ("contains", "It is 4, I think", True),
        ("contains", "It is four", False),
        ("contains", "café au", False),
    ],
)
def test_when_an_answer_is_right(match: str, answer: str, right: bool) -> None:
    """White space and composed letters are alike, all else counts; any of several answers will do."""
    assert Task("2 + 2?", ("café au lait", "4"), match).is_right(answer) is right
    assert normalised("\u3000a \n b ") == "a b"


def test_score_counts_right_answers() -> None:
    """Reasoning is not an answer, be it whole, cut short, or opened by the chat template."""
    answers = {"a": "<think>no, 5</think> 4", "b": " 4", "c": "<think>4", "d": "5"}
    tasks = [Task(prompt, ("4",)) for prompt in answers]
    done: list[int] = []
    score = score_task(Letters(answers), tasks, "sums", done.append)  # type: ignore[arg-type]
    assert (score.name, score.right, score.prompts) == ("sums", 2, 4)
    assert (score.share.value, score.share.low, score.share.high) == (0.5, *wilson(2, 4))
    assert done[-1] == 4
    opened = Letters({"a": "4", "b": "5</think>4"}, "[{{ messages[0].content }}]<think>")
    assert score_task(opened, tasks[:2], "sums").right == 1  # type: ignore[arg-type]


def test_an_answer_does_not_depend_on_its_batch() -> None:
    """All are cut at the same length, though a short prompt has more room beside a long one."""
    late = "x" * (MARGIN + 1) + "4"
    answers = {"a": late, "b" * 300: late, "c": "x" * MARGIN + "4"}
    tasks = [Task(prompt, ("4",), "contains") for prompt in answers]
    model = Letters(answers)
    said = answer_tasks(model, tasks)  # type: ignore[arg-type]
    assert [len(text) for text in said] == [MARGIN + 1] * 3
    assert [task.is_right(text) for task, text in zip(tasks, said, strict=True)] == [False, False, True]
    assert said == [answer_tasks(Letters(answers), [task])[0] for task in tasks]  # type: ignore[arg-type]
    assert model.lengths == [302 + MARGIN + 1]


def test_room_for_the_answer() -> None:
    """A longer answer and a model that reasons get more tokens; a prompt that leaves none is refused by its line."""
    long = Letters({"a": "y" * 200})
    assert answer_tasks(long, [Task("a", ("4", "y" * 100))])[0] == "y" * (100 + MARGIN)  # type: ignore[arg-type]
    reasons = Letters(
        {"a": "y" * 5000}, "{% if false %}</think>{% endif %}[{{ messages[0].content }}]", 10_000
    )
    assert len(answer_tasks(reasons, [Task("a", ("4",))])[0]) == 1 + MARGIN + REASONING_TOKENS  # type: ignore[arg-type]
    short = Letters({"a": "4", "b" * 39: "4", "b" * 40: "4"}, context=42)
    fitting = [Task("a", ("4",)), Task("b" * 39, ("4",))]
    assert answer_tasks(short, fitting) == ["4", "4"]  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"task prompt 'b{40}' \(line 9\) has 42 tokens and its answer 1; .* is 42"
    ):
        answer_tasks(short, [Task("a", ("4",)), Task("b" * 40, ("4",), line=9)])  # type: ignore[arg-type]


@pytest.mark.needs_gguf
def test_a_real_model_answers_what_its_logits_say(example_gguf: GGUFTeacher) -> None:
    """Asked together: the most probable token of each answer so far, up to the end of the turn."""
    prompts = ["Please order 4 boxes of gloves at 12 each. The budget is 100.", "Hello", "What is 3 + 4?"]
    own = []
    for tokens in request_tokens(example_gguf, prompts):
        longer, answer = tokens, list[int]()
        while len(answer) < 12:
            # What follows the last token is never computed, so another one comes behind it.
            following = int(example_gguf.logits([np.append(longer, 0).astype(np.int32)])[-1].argmax())
            if following in example_gguf.info.end_tokens:
                break
            answer.append(following)
            longer = np.append(longer, following).astype(np.int32)
        own.append(example_gguf.detokenize([np.array(answer, dtype=np.int32)])[0])
    tasks = [Task(prompt, (answer,), "prefix") for prompt, answer in zip(prompts, own, strict=True)]
    assert all(len(answer) > 5 for answer in own) and len(set(own)) > 1
    score = score_task(example_gguf, [*tasks, Task("Hello", ("no such answer",))], "own")
    assert score.right == 3 and score.prompts == 4
