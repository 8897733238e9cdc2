"""``distill judge``: decide on prompts with an exported student alone, through llama.cpp."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.heads.gguf_heads import TOGETHER, chances_of, heads_in
from distill.heads.prompts import require_length, require_prompt_text
from distill.inference.judge_inputs import require_heads
from distill.inference.reasoning import digests, holds_tags, visible
from students.model.head_decisions import DECISIONS
from teachers.base import GenerationRequest, Sampling, Tokens, last_predictions
from teachers.gguf.file import read_gguf
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.tokenizer.conversation import request_tokens

ANSWER_TOKENS = 32  # of the student's own answer that the verification head looks at
DIGITS = 6  # of the probabilities in a run's log


@dataclass(frozen=True)
class Judgment:
    """A student's judgment of one prompt; ``None`` for what a missing head would say.

    ``confidence``: the probability that the decision is right. ``agreement``: expected share of its
    own answer's tokens that the teacher would have chosen too; ``ask_teacher``: whether that is too
    low.
    """

    prompt: str
    decision: str | None
    probabilities: dict[str, float] | None
    confidence: float | None
    agreement: float | None
    ask_teacher: bool | None

    def to_json(self) -> dict[str, Any]:
        """As JSON: the prompt without private reasoning, and the SHA-256 of all of it."""
        digest = hashlib.sha256(self.prompt.encode("utf-8", errors="surrogateescape")).hexdigest()
        return {**vars(self), "prompt": shown(self.prompt), "prompt_sha256": digest}

    def to_audit(self) -> dict[str, Any]:
        """What a run's log keeps of the judgment: no word of the prompt."""
        chances = self.probabilities
        return {
            "prompt_sha256": self.to_json()["prompt_sha256"],
            "reasoning_sha256": digests(self.prompt),
            "decision": self.decision,
            "probabilities": chances and {name: round(p, DIGITS) for name, p in chances.items()},
            "agreement": None if self.agreement is None else round(self.agreement, DIGITS),
            "ask_teacher": self.ask_teacher,
        }


def shown(prompt: str) -> str:
    """What of a prompt is printed: all, or what its reasoning tags leave visible."""
    return visible(prompt) if holds_tags(prompt) else prompt


class Judge:
    """An exported student with its heads. Use as a context manager."""

    def __init__(self, path: Path, model: GGUFTeacher | None = None) -> None:
        """Load the file, or share ``model``, which has loaded it and which the caller closes.

        Raises:
            UserError: no heads, or broken ones.
            TeacherFileError, TeacherError: llama.cpp cannot load the file.
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
        """Judge each prompt as a conversation that waits for the answer; ``UserError`` if too
        long."""
        starts = range(0, len(prompts), TOGETHER)
        return [one for start in starts for one in self._judge(prompts[start : start + TOGETHER])]

    def decide(self, prompts: Sequence[Tokens]) -> list[tuple[str, dict[str, float]]]:
        """The safety head's decision on each prompt, and the probabilities of all three."""
        probabilities = chances_of(self.model, self.heads, prompts)
        taken = self.heads.decide(probabilities).tolist()
        return [
            (DECISIONS[index], dict(zip(DECISIONS, row, strict=True)))
            for index, row in zip(taken, probabilities.tolist(), strict=True)
        ]

    def agreement(self, prompt: Tokens, tokens: Tokens) -> float:
        """Mean probability that the student's most probable token is the teacher's, over the answer
        in ``tokens`` behind ``prompt`` (without an answer: over its first token)."""
        # One token longer: a state is known for every token but the last.
        longer = np.append(tokens, tokens[-1]).astype(np.int32)
        last = len(longer) - len(prompt)
        keep = last_predictions([longer], last)
        states = torch.from_numpy(self.model.states([longer], exact=True, keep=keep)["final"])
        logits = torch.from_numpy(self.model.logits([longer], exact=True, keep=keep))
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
        require_prompt_text(prompt)
        tokens = request_tokens(self.model, [prompt])[0]
        require_length(tokens, self.model.info.context_length, shown(prompt))
        return tokens

    def _agreement(self, prompts: Sequence[Tokens]) -> list[float | None]:
        """Mean probability of agreement over the student's own greedy answer, for each prompt."""
        room = self.model.info.context_length
        agreements: list[float | None] = []
        for prompt in prompts:
            length = min(room, len(prompt) + ANSWER_TOKENS)
            tokens = prompt
            if length > len(prompt):
                request = GenerationRequest([[prompt]], Sampling(0.0, 1.0, length))
                tokens = self.model.generate(request)[0]
            agreements.append(self.agreement(prompt, tokens))
        return agreements
