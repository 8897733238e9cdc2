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

import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import UserError

MATCHES = ("exact", "prefix", "contains")
MAX_FILE_BYTES = 64 << 20


@dataclass(frozen=True)
class Task:
    """A prompt and its right answers, none blank; ``match``: one of ``MATCHES``. ``line``: where
    in the file."""

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
            raise UserError(
                f"tasks {path}: larger than {MAX_FILE_BYTES >> 20} MiB; give a smaller file"
            )
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
        raise UserError(
            f"{where}: has a lone surrogate (\\ud800 to \\udfff), which is not text; remove it"
        )
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
