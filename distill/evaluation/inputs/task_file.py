"""A file of prompts with known answers; read without PyTorch.

One JSON object per line: ``prompt``, and ``answer`` (text) or ``answers`` (several texts that are
all right), and if wanted ``match``, which says when an answer is right:

- ``exact`` (the default): it is one of the right answers;
- ``prefix``: it begins with one;
- ``contains``: one is somewhere in it.

Before they are compared, both texts get Unicode's composed form (NFC), every run of white space
becomes one space, and none is left at the ends. Upper and lower case, digits and punctuation count.
A reasoning model's private words are taken out first (``distill.inference.reasoning``).
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.capture.data_files import rows
from distill.capture.file_text import require_size
from distill.capture.json_values import require_unicode
from distill.errors import UserError

MATCHES = ("exact", "prefix", "contains")
MAX_FILE_BYTES = 64 << 20
COLUMNS = ("prompt", "answer", "answers", "match")


@dataclass(frozen=True)
class Task:
    """A prompt and its right answers, none blank; ``match``: of ``MATCHES``; ``where``: file and
    line."""

    prompt: str
    answers: tuple[str, ...]
    match: str = "exact"
    where: str = ""

    def is_right(self, answer: str) -> bool:
        """Whether this answer is a right one (see the module)."""
        given = normalized(answer)
        right = [normalized(one) for one in self.answers]
        if self.match == "contains":
            return any(one in given for one in right)
        if self.match == "prefix":
            return given.startswith(tuple(right))
        return given in right


def normalized(text: str) -> str:
    """The form in which answers are compared."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def read_tasks(path: Path) -> list[Task]:
    """The tasks of a JSONL file; blank lines are skipped, other keys ignored.

    Raises:
        UserError: unreadable, empty, or a malformed line, which it names.
    """
    require_size(path, "tasks", MAX_FILE_BYTES)
    result = rows(path, COLUMNS, "tasks")
    tasks = [_task(entry, where) for where, entry in result]
    if not tasks:
        raise UserError(f"tasks {path}: the file is empty")
    return tasks


def _task(entry: Any, where: str) -> Task:
    if not isinstance(entry, dict):
        raise UserError(f"{where} is not an object with prompt and answer")
    prompt = entry.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where} has no text under 'prompt'")
    entry = {name: value for name, value in entry.items() if value is not None}
    answers = _answers(entry, where)
    match = entry.get("match", MATCHES[0])
    if match not in MATCHES:
        raise UserError(f"{where}: match {match!r} is none of {', '.join(MATCHES)}")
    require_unicode([prompt, *answers], where)
    return Task(prompt, answers, match, where)


def _answers(entry: dict[str, Any], where: str) -> tuple[str, ...]:
    if "answer" in entry and "answers" in entry:
        raise UserError(f"{where} has both 'answer' and 'answers'; leave one of them")
    if "answers" in entry:
        answers = entry["answers"]
        if not isinstance(answers, list) or not answers:
            raise UserError(f"{where}: 'answers' must be a list of texts")
    elif "answer" in entry:
        answers = [entry["answer"]]
    else:
        raise UserError(f"{where} has no 'answer'")
    if not all(isinstance(one, str) and one.strip() for one in answers):
        raise UserError(f"{where}: an answer is no text, or blank")
    return tuple(answers)
