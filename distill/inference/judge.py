"""``distill judge``: decide on prompts with an exported student alone, through llama.cpp."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.heads.gguf_heads import heads_in
from distill.heads.prompts import require_length, require_words
from distill.inference.judge_inputs import require_heads
from distill.inference.reasoning import digests, holds_tags, visible
from students.model.head_decisions import DECISIONS
from students.model.heads import decide
from teachers.base import Sampling, Tokens
from teachers.gguf.file import read_gguf
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.tokenizer.conversation import request_tokens

ANSWER_TOKENS = 32  # of the student's own answer that the verification head looks at
TOGETHER = 32
DIGITS = 6  # of the probabilities in a run's log


@dataclass(frozen=True)
class Judgment:
    """What a student thinks of one prompt.

    ``probabilities`` of the three decisions; ``confidence``: that of the one taken. ``agreement``:
    expected share of the tokens of its own answer that the teacher would have chosen too;
    ``ask_teacher``: whether that is less than the student was found to need. What a missing head
    would say is ``None``.
    """

    prompt: str
    decision: str | None
    probabilities: dict[str, float] | None
    confidence: float | None
    agreement: float | None
    ask_teacher: bool | None

    def to_json(self) -> dict[str, Any]:
        """The judgment as JSON takes it: of the prompt what is not private reasoning, and the
        SHA-256 of all of it."""
        digest = hashlib.sha256(self.prompt.encode("utf-8", errors="surrogateescape")).hexdigest()
        return {**vars(self), "prompt": shown(self.prompt), "prompt_sha256": digest}

    def to_audit(self) -> dict[str, Any]:
        """What a run's log keeps of the judgment: no word of the prompt."""
        chances = self.probabilities
        return {
            "prompt_sha256": self.to_json()["prompt_sha256"],
            "reasoning_sha256": digests(self.prompt),
            "decision": self.decision,
            "probabilities": None
            if chances is None
            else {name: round(p, DIGITS) for name, p in chances.items()},
            "agreement": None if self.agreement is None else round(self.agreement, DIGITS),
            "ask_teacher": self.ask_teacher,
        }


def shown(prompt: str) -> str:
    """What of a prompt is printed: all of it, or where it holds reasoning tags, only what they
    leave visible."""
    return visible(prompt) if holds_tags(prompt) else prompt


class Judge:
    """An exported student with its heads. Use as a context manager."""

    def __init__(self, path: Path, model: GGUFTeacher | None = None) -> None:
        """Load the file, or share ``model``, which is that file loaded and stays the caller's to
        close.

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
        """The safety head's decision on each prompt, up to where the answer begins, and the
        probabilities of all."""
        probabilities = self.heads.probabilities(torch.from_numpy(self.model.last_states(prompts)))
        taken = decide(probabilities, self.heads.thresholds).tolist()
        rows = probabilities.tolist()
        return [
            (DECISIONS[place], dict(zip(DECISIONS, row, strict=True)))
            for place, row in zip(taken, rows, strict=True)
        ]

    def agreement(self, prompt: Tokens, said: Tokens) -> float:
        """Mean probability that the student's most probable token is the teacher's, over the answer
        in ``said``, which begins with ``prompt`` (without an answer: over what would be its first
        token)."""
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
        agreement = (
            [None] * len(prompts) if self.heads.verification is None else self._agreement(tokens)
        )
        return [
            Judgment(
                prompt,
                decision,
                chance,
                None if chance is None or decision is None else chance[decision],
                agreed,
                None if agreed is None else agreed < self.heads.trust,
            )
            for prompt, decision, chance, agreed in zip(
                prompts, taken, chances, agreement, strict=True
            )
        ]

    def tokens(self, prompt: str) -> Tokens:
        require_words(prompt)
        tokens = request_tokens(self.model, [prompt])[0]
        require_length(tokens, self.model.info.context_length, shown(prompt))
        return tokens

    def _agreement(self, prompts: Sequence[Tokens]) -> list[float | None]:
        """Mean probability of agreeing with the teacher over the student's own greedy answer,
        for each prompt."""
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
