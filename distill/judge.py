"""``distill judge``: decide on prompts with an exported student alone, through llama.cpp."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table

from distill.audit import record_judgments
from distill.console import Console
from distill.errors import UserError
from distill.preflight import require_heads
from distill.reasoning import holds_tags, visible
from distill.safety_prompts import require_length, require_words
from distill.terminal import coloured, json_line, printable
from students.decisions import DECISIONS
from students.heads import HeadError, Heads, decide, read_heads
from teachers.base import Sampling, Tokens
from teachers.conversation import request_tokens
from teachers.gguf_file import GGUFFile, read_gguf
from teachers.gguf_teacher import GGUFTeacher

ANSWER_TOKENS = 32  # of the student's own answer that the verification head looks at
TOGETHER = 32


@dataclass(frozen=True)
class Judgment:
    """What a student thinks of one prompt.

    ``probabilities`` of the three decisions; ``confidence``: that of the one taken. ``agreement``: expected share of
    the tokens of its own answer that the teacher would have chosen too; ``ask_teacher``: whether that is less than the
    student was found to need. What a missing head would say is ``None``.
    """

    prompt: str
    decision: str | None
    probabilities: dict[str, float] | None
    confidence: float | None
    agreement: float | None
    ask_teacher: bool | None

    def to_json(self) -> dict[str, Any]:
        """The judgment as JSON takes it: of the prompt what is not private reasoning, and the SHA-256 of all of it."""
        digest = hashlib.sha256(self.prompt.encode("utf-8", errors="surrogateescape")).hexdigest()
        return {**vars(self), "prompt": shown(self.prompt), "prompt_sha256": digest}


def shown(prompt: str) -> str:
    """What of a prompt is printed: all of it, or where it holds reasoning tags, only what they leave visible."""
    return visible(prompt) if holds_tags(prompt) else prompt


def heads_in(file: GGUFFile) -> Heads:
    """The heads that a GGUF file carries, which may be none.

    Raises:
        UserError: they are broken.
    """
    values = {key: field.value for key, field in file.fields.items() if key.startswith("so8t.")}
    try:
        return read_heads(values, file.tensors["token_embd.weight"].shape[1])
    except HeadError as error:
        raise UserError(f"{file.path} has broken heads: {error}; export the student again") from None


class Judge:
    """An exported student with its heads. Use as a context manager."""

    def __init__(self, path: Path, model: GGUFTeacher | None = None) -> None:
        """Load the file, or share ``model``, which is that file loaded and stays the caller's to close.

        Raises:
            UserError: it carries no heads, or broken ones.
            TeacherFileError, TeacherError: it is no GGUF file that llama.cpp can load.
        """
        file = read_gguf(path) if model is None else model.file
        require_heads(file)
        self.heads = heads_in(file)
        self._shared = model is not None
        self.model = GGUFTeacher(path) if model is None else model

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._shared:
            self.model.close()

    def judge(self, prompts: Sequence[str]) -> list[Judgment]:
        """Judge each prompt as a conversation that waits for the answer.

        Raises:
            UserError: a prompt is longer than the student's context.
        """
        found = []
        for start in range(0, len(prompts), TOGETHER):
            found += self._judge(prompts[start : start + TOGETHER])
        return found

    def decide(self, prompts: Sequence[Tokens]) -> list[tuple[str, dict[str, float]]]:
        """The safety head's decision on each prompt, up to where the answer begins, and the probabilities of all."""
        probabilities = self.heads.probabilities(torch.from_numpy(self.model.last_states(prompts)))
        taken = decide(probabilities, self.heads.thresholds).tolist()
        rows = probabilities.tolist()
        return [
            (DECISIONS[place], dict(zip(DECISIONS, row, strict=True)))
            for place, row in zip(taken, rows, strict=True)
        ]

    def agreement(self, prompt: Tokens, said: Tokens) -> float:
        """Mean probability that the student's most probable token is the teacher's, over the answer in ``said``, which
        begins with ``prompt`` (without an answer: over what would be its first token)."""
        # One token longer than what is looked at: a state is known for every token but the last.
        longer = np.append(said, said[-1]).astype(np.int32)
        last = len(longer) - len(prompt)
        states = torch.from_numpy(self.model.states([longer], exact=True, last=last)["final"])
        logits = torch.from_numpy(self.model.logits([longer], exact=True, last=last))
        answer = slice(max(1, last - 1))  # what would follow the answer is none of it
        return float(self.heads.agreement(states[answer], logits[answer]).mean())

    def _judge(self, prompts: Sequence[str]) -> list[Judgment]:
        tokens = [self.tokens(prompt) for prompt in prompts]
        chances: list[dict[str, float] | None] = [None] * len(prompts)
        taken: list[str | None] = [None] * len(prompts)
        if self.heads.safety is not None:
            taken, chances = map(list, zip(*self.decide(tokens), strict=True))
        agreement = [None] * len(prompts) if self.heads.verification is None else self._agreement(tokens)
        return [
            Judgment(
                prompt,
                decision,
                chance,
                None if chance is None or decision is None else chance[decision],
                agreed,
                None if agreed is None else agreed < self.heads.trust,
            )
            for prompt, decision, chance, agreed in zip(prompts, taken, chances, agreement, strict=True)
        ]

    def tokens(self, prompt: str) -> Tokens:
        require_words(prompt)
        tokens = request_tokens(self.model, [prompt])[0]
        require_length(tokens, self.model.info.context_length, shown(prompt))
        return tokens

    def _agreement(self, prompts: Sequence[Tokens]) -> list[float | None]:
        """Mean probability of agreeing with the teacher over the student's own greedy answer, for each prompt."""
        room = self.model.info.context_length
        found: list[float | None] = []
        for tokens in prompts:
            length = min(room, len(tokens) + ANSWER_TOKENS)
            said = (
                self.model.speak([[tokens]], Sampling(0.0, 1.0, length))[0]
                if length > len(tokens)
                else tokens
            )
            found.append(self.agreement(tokens, said))
        return found


def judge_one(path: Path, prompt: str, as_json: bool, console: Console) -> None:
    """Judge one prompt and print what comes of it."""
    with Judge(path) as judge:
        judgment = judge.judge([prompt])[0]
        _write_down(path, [judgment])
        name, refuses_from = judge.model.info.name, judge.heads.thresholds[0]
    if as_json:
        print(json_line(judgment.to_json()))
        return
    console.rich.print(_table(judgment, name, refuses_from))


def judge_all(path: Path, texts: Sequence[str], as_json: bool, console: Console) -> None:
    """Judge every prompt and print one line each."""
    with Judge(path) as judge:
        judgments = judge.judge(texts)
    _write_down(path, judgments)
    if as_json:
        for judgment in judgments:
            print(json_line(judgment.to_json()))
        return
    table = Table(title=f"{len(judgments)} prompts", title_justify="left")
    for column in ("decision", "probability", "agreement", "prompt"):
        table.add_column(column)
    for judgment in judgments:
        table.add_row(
            coloured(judgment.decision),
            _share(judgment.confidence),
            _agreement(judgment),
            escape(printable(shown(judgment.prompt))),
        )
    console.rich.print(table)


def _write_down(path: Path, judgments: list[Judgment]) -> None:
    """Put the decisions of a run's student into the run's log, before anybody sees them; where the run lies so that
    nobody may write there, say that they are not in it."""
    try:
        record_judgments(path, judgments)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        words = f"{path.parent} cannot be written to ({error.strerror}): the decision is not in the run's log"
        Console(stderr=True).warn(words)


def _table(judgment: Judgment, name: str, refuses_from: float) -> Table:
    table = Table(title=escape(printable(name)), title_justify="left", show_header=False)
    if judgment.probabilities is not None:
        table.add_row("decision", coloured(judgment.decision))
        for decision, chance in judgment.probabilities.items():
            table.add_row(decision, f"{chance:6.1%}  {'█' * round(30 * chance)}")
        table.add_row("probability of that", _share(judgment.confidence))
        table.add_row("refuses from", f"{refuses_from:.1%} on (fitted, so that little is missed)")
    if judgment.agreement is not None:
        table.add_row("answers as the teacher would", _agreement(judgment))
    return table


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _agreement(judgment: Judgment) -> str:
    advice = "  → ask the teacher" if judgment.ask_teacher else ""
    return f"{_share(judgment.agreement)} of its tokens{advice}" if judgment.agreement is not None else ""
