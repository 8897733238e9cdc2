"""Prompts with known answers: what share of them a model answers rightly at temperature 0.

One JSON object per line: ``prompt``, and ``answer`` (text) or ``answers`` (several texts that are all right), and if
wanted ``match``, which says when an answer is right:

- ``exact`` (the default): it is one of the right answers;
- ``prefix``: it begins with one;
- ``contains``: one is somewhere in it.

Before they are compared, both texts get Unicode's composed form (NFC), every run of white space becomes one space, and
none is left at the ends. Upper and lower case, digits and punctuation count. A reasoning model's private words are
taken out first (``distill.reasoning``).
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.evaluation.records import Figure, TaskScore
from distill.reasoning import ends_inside, holds_tags, visible
from distill.reports.report import wilson
from teachers.base import Sampling, Tokens
from teachers.conversation import opening_segments, request_tokens
from teachers.gguf_teacher import GGUFTeacher

MATCHES = ("exact", "prefix", "contains")
MAX_FILE_BYTES = 64 << 20
MARGIN = 64  # tokens that an answer may have beyond the longest right one
REASONING_TOKENS = 1024  # besides, for a model whose chat template knows reasoning
TOGETHER = 64  # prompts answered together


@dataclass(frozen=True)
class Task:
    """A prompt and its right answers, none blank; ``match``: one of ``MATCHES``. ``line``: where in the file."""

    prompt: str
    answers: tuple[str, ...]
    match: str = "exact"
    line: int = 0

    def is_right(self, answer: str) -> bool:
        """Whether this answer is a right one (see the module)."""
        found = normalised(answer)
        right = [normalised(one) for one in self.answers]
        if self.match == "contains":
            return any(one in found for one in right)
        if self.match == "prefix":
            return any(found.startswith(one) for one in right)
        return found in right


def normalised(text: str) -> str:
    """The form in which answers are compared."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def read_tasks(path: Path) -> list[Task]:
    """The tasks of a JSONL file; blank lines are skipped, other keys are not looked at.

    Raises:
        UserError: unreadable, not UTF-8, empty, or a line that is not of the form; says which line.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"tasks {path}: larger than {MAX_FILE_BYTES >> 20} MiB; give a smaller file")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"tasks {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"tasks {path} are not UTF-8 text") from None
    lines = enumerate(text.split("\n"), 1)  # JSON may hold other signs that end lines
    tasks = [_task(line, path, number) for number, line in lines if line.strip()]
    if not tasks:
        raise UserError(f"tasks {path}: the file is empty")
    return tasks


def _task(line: str, path: Path, number: int) -> Task:
    where = f"tasks {path}, line {number}"
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError):  # also of a number with too many digits
        raise UserError(f"{where} is not JSON") from None
    if not isinstance(entry, dict):
        raise UserError(f"{where} is not an object with prompt and answer")
    prompt = entry.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where} has no text under 'prompt'")
    answers = _answers(entry, where)
    match = entry.get("match", MATCHES[0])
    if match not in MATCHES:
        raise UserError(f"{where}: match {match!r} is none of {', '.join(MATCHES)}")
    if any("\ud800" <= sign <= "\udfff" for words in (prompt, *answers) for sign in words):
        raise UserError(f"{where}: has a lone surrogate (\\ud800 to \\udfff), which is not text; remove it")
    return Task(prompt, answers, match, number)


def _answers(entry: dict[str, Any], where: str) -> tuple[str, ...]:
    if "answer" in entry and "answers" in entry:
        raise UserError(f"{where} has both 'answer' and 'answers'; leave one of them")
    if "answers" in entry:
        found = entry["answers"]
        if not isinstance(found, list) or not found:
            raise UserError(f"{where}: 'answers' must be a list of texts")
    elif "answer" in entry:
        found = [entry["answer"]]
    else:
        raise UserError(f"{where} has no 'answer'")
    if not all(isinstance(one, str) and one.strip() for one in found):
        raise UserError(f"{where}: an answer is no text, or blank")
    return tuple(found)


def score_task(
    model: GGUFTeacher,
    tasks: Sequence[Task],
    name: str,
    progress: Callable[[int], None] = lambda done: None,
) -> TaskScore:
    """How many of ``tasks`` (≥ 1) the model answers rightly; ``progress`` gets how many it has answered.

    Raises:
        UserError: a prompt does not leave the model room for its answer.
        ChatTemplateError: the model's chat template does not render.
    """
    answers, inside = answer_tasks(model, tasks, progress), _begins_inside(model)
    right = sum(
        task.is_right(visible(answer, inside=inside)) for task, answer in zip(tasks, answers, strict=True)
    )
    return TaskScore(name, right, len(tasks), Figure(right / len(tasks), *wilson(right, len(tasks))))


def answer_tasks(
    model: GGUFTeacher, tasks: Sequence[Task], progress: Callable[[int], None] = lambda done: None
) -> list[str]:
    """What the model answers, through its chat template, at temperature 0, with its reasoning where it has some.

    Raises:
        UserError: a prompt does not leave the model room for its answer.
        ChatTemplateError: the model's chat template does not render.
    """
    prompts = request_tokens(model, [task.prompt for task in tasks])
    wanted = _wanted_tokens(model, tasks)
    for task, prompt, tokens in zip(tasks, prompts, wanted, strict=True):
        _require_room(model, task, len(prompt), tokens)
    limit = max(wanted) + MARGIN
    if holds_tags(model.info.chat_template or ""):
        limit += REASONING_TOKENS
    order = sorted(range(len(tasks)), key=lambda place: len(prompts[place]))  # those of like length together
    answers = [""] * len(tasks)
    for start in range(0, len(order), TOGETHER):
        places = order[start : start + TOGETHER]
        some = [prompts[place] for place in places]
        written = speak_on(model, some, limit, partial(_tell, progress, start))
        for place, text in zip(places, model.detokenize(written), strict=True):
            answers[place] = text
    return answers


def _tell(progress: Callable[[int], None], before: int, done: int) -> None:
    progress(before + done)


def speak_on(
    model: GGUFTeacher,
    prompts: Sequence[Tokens],
    limit: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Tokens]:
    """What the model writes behind each prompt at temperature 0: at most ``limit`` tokens and what its context holds,
    without the token that ends its turn."""
    context = model.info.context_length
    longest = min(context, max(map(len, prompts)) + limit)
    said = model.speak([[prompt] for prompt in prompts], Sampling(0.0, max_length=longest), progress=progress)
    # A shorter prompt has more room in the batch; what a model writes must not depend on that.
    written = [
        tokens[len(prompt) : len(prompt) + limit] for tokens, prompt in zip(said, prompts, strict=True)
    ]
    ends = model.info.end_tokens
    return [tokens[:-1] if len(tokens) and int(tokens[-1]) in ends else tokens for tokens in written]


def _begins_inside(model: GGUFTeacher) -> bool:
    """Whether the model's chat template opens the reasoning that an answer begins with."""
    around = opening_segments(model)
    return around is not None and len(around) == 2 and ends_inside(model.detokenize([around[1]])[0])


def _wanted_tokens(model: GGUFTeacher, tasks: Sequence[Task]) -> list[int]:
    """How many tokens the longest right answer of each task has."""
    flat = [answer for task in tasks for answer in task.answers]
    counts = iter([len(tokens) for tokens in model.tokenize(flat, add_special=False, parse_special=False)])
    return [max(next(counts) for _ in task.answers) for task in tasks]


def _require_room(model: GGUFTeacher, task: Task, prompt: int, answer: int) -> None:
    context = model.info.context_length
    if prompt + answer > context:
        begin = task.prompt if len(task.prompt) <= 40 else task.prompt[:40] + "…"
        raise UserError(
            f"task prompt {begin!r} (line {task.line}) has {prompt} tokens and its answer {answer}; the context of "
            f"{model.file.path} is {context}: leave the line out"
        )
