"""Prompts with known answers: their files, when an answer is right, how a model is asked."""

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
from distill.evaluation.inputs.task_file import Task, normalized, read_tasks
from distill.evaluation.tasks import MARGIN, REASONING_TOKENS, answer_tasks, score_task
from distill.metrics.intervals import wilson
from teachers.base import GenerationRequest, Tokens
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.tokenizer.conversation import request_tokens
from tests.support.teachers import BigramTeacher

END = 3  # the sign that ends a turn


class Letters:
    """A model whose tokens are letters and which answers as told, whatever its batch."""

    def __init__(self, answers: dict[str, str], template: str, context: int) -> None:
        self.answers = answers
        info = replace(BigramTeacher(8, 4).info, end_tokens=(END,), add_bos=False, bos=2)
        self.info = replace(info, chat_template=template, context_length=context)
        self.file = SimpleNamespace(path=Path("letters.gguf"))
        self.lengths: list[int] = []

    def tokenize(
        self, texts: Sequence[str], *, add_special: bool, parse_special: bool
    ) -> list[Tokens]:
        return [np.array([ord(sign) for sign in text], dtype=np.int32) for text in texts]

    def detokenize(self, sequences: Sequence[Tokens]) -> list[str]:
        return ["".join(chr(token) for token in tokens) for tokens in sequences]

    def generate(self, request: GenerationRequest, progress: Callable[[int], None]) -> list[Tokens]:
        sampling = request.sampling
        assert sampling.temperature == 0.0
        self.lengths.append(sampling.max_length)
        rows = []
        for number, (prompt,) in enumerate(request.prompts, 1):
            question = self.detokenize([prompt])[0].partition("]")[0].removeprefix("[")
            answer = [*(ord(sign) for sign in self.answers[question]), END]
            rows.append(np.array([*prompt, *answer], dtype=np.int32)[: sampling.max_length])
            progress(number)
        return rows


def letters(
    answers: dict[str, str], template: str = "[{{ messages[0].content }}]", context: int = 4096
) -> Any:
    """Such a model in place of a teacher."""
    return Letters(answers, template, context)


def written(path: Path, *lines: Any) -> Path:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def test_read_tasks(tmp_path: Path) -> None:
    """One answer or several, blank lines, other keys, a byte order mark, odd line ends."""
    path = written(
        tmp_path / "t.jsonl",
        {"prompt": "2 + 2?", "answer": "4", "id": 7},
        "",
        {"prompt": "a\u2028b", "answers": ["yes", "はい"], "match": "prefix"},
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_tasks(path) == [
        Task("2 + 2?", ("4",), "exact", f"tasks {path}, line 1"),
        Task("a\u2028b", ("yes", "はい"), "prefix", f"tasks {path}, line 3"),
    ]


def test_bad_lines_are_named(tmp_path: Path) -> None:
    """In one line, with the file."""
    rows: list[tuple[Any, str]] = [
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
        ({"prompt": "x", "answer": "4", "match": "no"}, "line 2: match 'no' is none of exact,"),
        ({"prompt": "x", "answer": "4", "match": ["exact"]}, "is none of"),
        ({"prompt": "x", "answer": "\ud800"}, "line 2: has a lone surrogate"),
    ]
    for line, words in rows:
        path = written(tmp_path / "t.jsonl", {"prompt": "ok", "answer": "ok"}, line)
        with pytest.raises(UserError) as caught:
            read_tasks(path)
        said = str(caught.value)
        assert words in said and str(path) in said and "\n" not in said, str(line)[:80]


def test_bad_files_are_named(tmp_path: Path) -> None:
    """Missing, a folder, empty, blank, not UTF-8."""
    (tmp_path / "blank").write_text("\n \n")
    (tmp_path / "bytes").write_bytes(b'{"prompt": "\xff"}')
    rows = {"no": "cannot be read", "": "cannot be read", "blank": "is empty", "bytes": "not UTF-8"}
    for name, words in rows.items():
        with pytest.raises(UserError, match=words):
            read_tasks(tmp_path / name)


def test_when_an_answer_is_right() -> None:
    """White space and composed letters are alike, all else counts; any answer will do."""
    for match, answer, right in (
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
    ):
        task = Task("2 + 2?", ("café au lait", "4"), match)
        assert task.is_right(answer) is right, (match, answer)
    assert normalized("\u3000a \n b ") == "a b"


def test_score_counts_right_answers() -> None:
    """Reasoning is not an answer, be it whole, cut short, or opened by the chat template."""
    answers = {"a": "<think>no, 5</think> 4", "b": " 4", "c": "<think>4", "d": "5"}
    tasks = [Task(prompt, ("4",)) for prompt in answers]
    done: list[int] = []
    score = score_task(letters(answers), tasks, "sums", done.append)
    assert (score.name, score.right, score.prompts) == ("sums", 2, 4)
    assert (score.share.value, score.share.low, score.share.high) == (0.5, *wilson(2, 4))
    assert done[-1] == 4
    opened = letters({"a": "4", "b": "5</think>4"}, "[{{ messages[0].content }}]<think>")
    assert score_task(opened, tasks[:2], "sums").right == 1


def test_an_answer_does_not_depend_on_its_batch() -> None:
    """All are cut at the same length, though a short prompt has more room beside a long one."""
    late = "x" * (MARGIN + 1) + "4"
    answers = {"a": late, "b" * 300: late, "c": "x" * MARGIN + "4"}
    tasks = [Task(prompt, ("4",), "contains") for prompt in answers]
    model = letters(answers)
    said = answer_tasks(model, tasks)
    assert [len(text) for text in said] == [MARGIN + 1] * 3
    right = [task.is_right(text) for task, text in zip(tasks, said, strict=True)]
    assert right == [False, False, True]
    assert said == [answer_tasks(letters(answers), [task])[0] for task in tasks]
    assert model.lengths == [302 + MARGIN + 1]


def test_room_for_the_answer() -> None:
    """A longer answer and a model that reasons get more; a prompt that leaves none is refused."""
    long = letters({"a": "y" * 200})
    assert answer_tasks(long, [Task("a", ("4", "y" * 100))])[0] == "y" * (100 + MARGIN)
    template = "{% if false %}</think>{% endif %}[{{ messages[0].content }}]"
    reasons = letters({"a": "y" * 5000}, template, 10_000)
    first = Task("a", ("4",))
    assert len(answer_tasks(reasons, [first])[0]) == 1 + MARGIN + REASONING_TOKENS
    short = letters({"a": "4", "b" * 39: "4", "b" * 40: "4"}, context=42)
    assert answer_tasks(short, [first, Task("b" * 39, ("4",))]) == ["4", "4"]
    words = r"'b{40}' \(line 9\) has 42 tokens and its answer 1; .* is 42"
    with pytest.raises(UserError, match=words):
        answer_tasks(short, [first, Task("b" * 40, ("4",), where="line 9")])


@pytest.mark.needs_gguf
def test_a_real_model_answers_what_its_logits_say(example_gguf: GGUFTeacher) -> None:
    """Asked together: the most probable token of each answer so far, up to the end of the turn."""
    prompts = [
        "Please order 4 boxes of gloves at 12 each. The budget is 100.",
        "Hello",
        "What is 3 + 4?",
    ]
    own = []
    for tokens in request_tokens(example_gguf, prompts):
        longer, answer = tokens, list[int]()
        while len(answer) < 6:
            # What follows the last token is never computed, so another one comes behind it.
            logits = example_gguf.logits([np.append(longer, 0).astype(np.int32)])
            following = int(logits[-1].argmax())
            if following in example_gguf.info.end_tokens:
                break
            answer.append(following)
            longer = np.append(longer, following).astype(np.int32)
        own.append(example_gguf.detokenize([np.array(answer, dtype=np.int32)])[0])
    tasks = [Task(prompt, (answer,), "prefix") for prompt, answer in zip(prompts, own, strict=True)]
    assert all(len(answer) > 5 for answer in own) and len(set(own)) > 1
    score = score_task(example_gguf, [*tasks, Task("Hello", ("no such answer",))], "own")
    assert score.right == 3 and score.prompts == 4
