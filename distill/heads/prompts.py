"""Prompts with a decision each: the built-in set, a user's file, or the teacher's own judgment;
split, and as tokens.

Without PyTorch: a file that cannot be used is refused before that is imported.

A *scenario* is what a prompt is about. All prompts of a scenario go to the same part of the split,
so that scores measure generalization to other scenarios, not to other wordings.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distill.capture.data_files import rows
from distill.capture.file_text import require_size
from distill.capture.json_values import json_lines, require_unicode
from distill.config.schema import RunConfig
from distill.errors import UserError
from students.model.head_decisions import DECISIONS
from teachers.base import Teacher, Tokens
from teachers.tokenizer.conversation import request_tokens

BUILT_IN = "builtin"
TEACHER = "teacher"
Part = Literal["train", "validation", "test"]
# Of every five scenarios.
SPLIT: tuple[Part, ...] = ("train", "validation", "train", "test", "train")
MAX_FILE_BYTES = 64 << 20
GRAMMAR_WEIGHT = 0.2  # of a prompt that a grammar wrote, to another's (docs/benchmarks.md)
JUDGED_AUTHORS = ("w", "u")  # of the built-in prompts, whose a teacher is asked about
COLUMNS = ("prompt", "label", "scenario", "language", "author")


@dataclass(frozen=True)
class SafetyPrompt:
    """One prompt.

    ``label``: probabilities of ALLOW, ESCALATE and REFUSE; ``language`` and ``author`` may be
    empty. ``part``: of the split, where it is not left to the scenario; ``weight``: how much it
    counts in the fit.
    """

    text: str
    scenario: str
    language: str
    label: tuple[float, float, float]
    part: Part | None = None
    author: str = ""
    weight: float = 1.0

    @property
    def decision(self) -> int:
        """The most probable decision, an index into ``DECISIONS``."""
        return int(np.argmax(self.label))


@cache
def built_in_prompts() -> tuple[SafetyPrompt, ...]:
    """The prompts that come with the program, English and Japanese: a grammar's to learn from,
    others of many authors to learn from and to fit probabilities to, and others again to measure
    on (``tools/safety_prompts``)."""
    content = resources.files("distill.heads").joinpath("prompts.jsonl.gz").read_bytes()
    lines = json_lines(gzip.decompress(content).decode().split("\n"), "safety prompts")
    return tuple(
        replace(
            _prompt(entry, where, labelled=True),
            part=entry["part"],
            weight=GRAMMAR_WEIGHT if entry["part"] == "train" else 1.0,
        )
        for where, entry in lines
    )


def prompts_by_hand() -> list[SafetyPrompt]:
    """The built-in prompts of a few authors, of no fixed part: few enough for a teacher to
    judge."""
    return [
        replace(prompt, part=None)
        for prompt in built_in_prompts()
        if prompt.part == "test" or prompt.author in JUDGED_AUTHORS
    ]


def read_prompts(path: Path, *, labelled: bool = True, divided: bool = True) -> list[SafetyPrompt]:
    """Prompts of rows: ``prompt``, ``label`` and, if there, ``scenario``, ``language``, ``author``.

    Without a scenario each prompt is one of its own. With ``labelled=False`` labels are not asked
    for; with ``divided=False`` there need not be enough of each for every part of the split.

    Raises:
        UserError: unreadable, not rows of that form, a label outside the three, or too few of a
        decision.
    """
    require_size(path, "safety prompts", MAX_FILE_BYTES)
    result = rows(path, COLUMNS, "safety prompts")
    prompts = [_prompt(entry, where, labelled=labelled) for where, entry in result]
    if not prompts:
        raise UserError(f"safety prompts {path}: the file is empty")
    if labelled and divided:
        require_examples(prompts, str(path))
    return prompts


def read_safety_prompts(config: RunConfig) -> list[SafetyPrompt] | None:
    """The prompts that the settings mean, without the teacher's labels yet; ``None`` where no head
    is wanted.

    Raises:
        UserError: the file cannot be used.
    """
    if not config.safety_head:
        return None
    safety = config.safety
    if safety.prompts is not None and safety.labels != TEACHER:
        raise UserError(
            f"safety.prompts = {safety.prompts!r} is for safety.labels=teacher; a file with labels "
            "of its own is given as safety.labels"
        )
    if safety.prompts is not None:
        return read_prompts(Path(safety.prompts), labelled=False)
    if safety.labels == BUILT_IN:
        return list(built_in_prompts())
    if safety.labels == TEACHER:
        return prompts_by_hand()
    return read_prompts(Path(safety.labels))


def read_given_prompts(path: Path | None) -> list[SafetyPrompt] | None:
    """The prompts of ``--safety-prompts``; ``UserError`` if the file cannot be used."""
    return None if path is None else read_prompts(path, divided=False)


def require_examples(prompts: Sequence[SafetyPrompt], source: str) -> None:
    """Raise ``UserError`` if a part of the split lacks a decision."""
    counts = Counter(prompt.decision for prompt in prompts)
    if missing := [name for number, name in enumerate(DECISIONS) if not counts[number]]:
        raise UserError(
            f"safety prompts {source}: no example of {' and '.join(missing)}; each of "
            f"{', '.join(DECISIONS)} needs some"
        )
    for part, chosen in split_by_scenario(prompts).items():
        counts = Counter(prompt.decision for prompt in chosen)
        if missing := [name for number, name in enumerate(DECISIONS) if not counts[number]]:
            raise UserError(
                f"safety prompts {source}: no {' and no '.join(missing)} among the scenarios that "
                f"fall to the {part} part; give more prompts of it (at least five scenarios each)"
            )


def split_by_scenario(prompts: Sequence[SafetyPrompt]) -> dict[Part, list[SafetyPrompt]]:
    """Three fifths to train, one to fit probabilities to, one to measure; prompts that are of a
    part stay in it.

    Scenarios are assigned in turn, those with the same decisions together so that each part gets
    its share, in the order of a hash of their names.
    """
    decisions: dict[str, set[int]] = {}
    for prompt in prompts:
        if prompt.part is None:
            decisions.setdefault(prompt.scenario, set()).add(prompt.decision)
    order = sorted(
        decisions,
        key=lambda name: (sorted(decisions[name]), hashlib.sha256(name.encode()).digest()),
    )
    part_of = {name: SPLIT[index % len(SPLIT)] for index, name in enumerate(order)}
    parts: dict[Part, list[SafetyPrompt]] = {"train": [], "validation": [], "test": []}
    for prompt in prompts:
        parts[prompt.part or part_of[prompt.scenario]].append(prompt)
    return parts


def digest(prompts: Sequence[SafetyPrompt]) -> str:
    """SHA-256 of prompts and labels, as hexadecimal."""
    lines = [
        [
            prompt.text,
            prompt.scenario,
            list(prompt.label),
            *(one for one in (prompt.part, prompt.author) if one),
        ]
        for prompt in prompts
    ]
    return hashlib.sha256(json.dumps(lines, ensure_ascii=True).encode()).hexdigest()


def with_labels(prompts: Sequence[SafetyPrompt], labels: NDArray[np.float32]) -> list[SafetyPrompt]:
    """The same prompts with other labels ``[N, 3]``."""
    rows = [(float(a), float(e), float(r)) for a, e, r in labels.tolist()]
    return [replace(prompt, label=row) for prompt, row in zip(prompts, rows, strict=True)]


def prompt_tokens(
    teacher: Teacher, prompts: Sequence[SafetyPrompt], context_length: int
) -> list[Tokens]:
    """Each prompt as a conversation that waits for the answer, in the teacher's own tokens.

    Raises:
        UserError: a prompt is longer than the student's context.
    """
    rows = request_tokens(teacher, [prompt.text for prompt in prompts])
    for tokens, prompt in zip(rows, prompts, strict=True):
        require_length(tokens, context_length, prompt.text)
    return rows


def require_length(
    tokens: Tokens, context_length: int, text: str, counted: str = "", reader: str = "student"
) -> None:
    """Raise ``UserError`` if a prompt is empty or does not fit the context of its ``reader``;
    ``counted``: what else is among the tokens."""
    start = text if len(text) <= 40 else text[:40] + "…"
    if len(tokens) == 0:
        raise UserError(f"prompt {start!r} has no tokens; write something to judge")
    if len(tokens) > context_length:
        raise UserError(
            f"prompt {start!r} has {len(tokens)} tokens{counted and ' '}{counted}, the {reader}'s "
            f"context is {context_length}; shorten it"
        )


def require_prompt_text(prompt: str) -> None:
    """Raise ``UserError`` if the prompt is empty."""
    if not prompt.strip():
        raise UserError("the prompt is empty; write something to judge")


def _prompt(entry: Any, where: str, *, labelled: bool) -> SafetyPrompt:
    if not isinstance(entry, dict):
        raise UserError(f"{where} is not an object with prompt and label")
    entry = {name: value for name, value in entry.items() if value is not None}
    prompt, label = entry.get("prompt"), entry.get("label")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where} has no text under 'prompt'")
    share = (1 / 3, 1 / 3, 1 / 3)
    if labelled:
        if label not in DECISIONS:
            if label is None:
                raise UserError(f"{where} has no 'label'; give one of {', '.join(DECISIONS)}")
            raise UserError(f"{where}: label {label!r} is none of {', '.join(DECISIONS)}")
        one = [float(label == name) for name in DECISIONS]
        share = (one[0], one[1], one[2])
    scenario, language = entry.get("scenario", prompt), entry.get("language", "")
    author = entry.get("author", "")
    if not all(isinstance(one, str) for one in (scenario, language, author)):
        raise UserError(f"{where}: 'scenario', 'language' and 'author' must be text")
    require_unicode([prompt, scenario, language, author], where)
    return SafetyPrompt(prompt, scenario, language, share, author=author)
