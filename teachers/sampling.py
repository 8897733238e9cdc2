"""Sampling: how a row of logits becomes one token, and how a sequence grows turn by turn.

Nothing here knows how logits are computed, so every kind of teacher generates by the same rules.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from teachers.base import GenerationRequest, Sampling, Tokens


def sample_rows(
    logits: NDArray[np.float32], draws: NDArray[np.float64], sampling: Sampling
) -> Tokens:
    """One token per row ``[S]`` of ``logits [S, V]``, by inverting the cumulative distribution.

    ``draws [S]`` are uniform in [0, 1). Temperature 0 is greedy.
    """
    if sampling.temperature == 0.0:
        return logits.argmax(axis=-1).astype(np.int32)
    scaled = logits.astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    if sampling.top_p < 1.0:
        order = np.argsort(-weights, axis=-1, kind="stable")
        ranked = np.take_along_axis(weights, order, axis=-1)
        # The mass ahead of each token; the first is always kept.
        before = np.cumsum(ranked, axis=-1) - ranked
        ranked[before >= sampling.top_p * weights.sum(axis=-1, keepdims=True)] = 0.0
        np.put_along_axis(weights, order, ranked, axis=-1)
    cumulative = np.cumsum(weights, axis=-1)
    targets = draws * cumulative[:, -1]
    chosen = [
        np.searchsorted(row, target, side="right")
        for row, target in zip(cumulative, targets, strict=True)
    ]
    return np.minimum(chosen, logits.shape[-1] - 1).astype(np.int32)


@dataclass
class PartialSequence:
    """One sequence being written: forced segments, and the teacher's own turns between them.

    Attributes:
        segments: forced tokens still to come; each stands in place of the end of the turn before.
        random: the sequence's own random stream, so that it does not depend on its company.
        max_length: tokens the sequence may have, forced ones included.
        tokens: what it holds so far.
        fed: how many of ``tokens`` the model has seen.
        finished: nothing will be added any more.
    """

    segments: list[Tokens]
    random: np.random.Generator
    max_length: int
    tokens: list[int] = field(default_factory=list)
    fed: int = 0
    finished: bool = False

    @classmethod
    def start(cls, prompt: Sequence[Tokens], sampling: Sampling, index: int) -> PartialSequence:
        """Sequence ``index``, which holds the prompt's first segment.

        Raises:
            ValueError: the prompt has no segment, or an empty one.
        """
        if not prompt or any(len(segment) == 0 for segment in prompt):
            raise ValueError(f"prompt {index} has no forced tokens; give at least BOS")
        random = np.random.Generator(np.random.Philox(key=[sampling.seed, index]))
        partial = cls(list(prompt), random, sampling.max_length)
        partial._force()
        return partial

    @property
    def wants_token(self) -> bool:
        """Whether the model has seen everything, so that it chooses the next token."""
        return self.fed == len(self.tokens) and not self.finished

    def take(self, token: int, end_tokens: Collection[int]) -> None:
        """Add the token the teacher chose; the next segment replaces the end of its turn."""
        if token in end_tokens and self.segments:
            self._force()
            return
        self.tokens.append(token)
        self.finished = token in end_tokens or len(self.tokens) >= self.max_length

    def _force(self) -> None:
        room = self.max_length - len(self.tokens)
        self.tokens += self.segments.pop(0)[:room].tolist()
        self.finished = len(self.tokens) >= self.max_length


def started(request: GenerationRequest) -> list[PartialSequence]:
    """The sequences of a request, each with its first segment."""
    return [
        PartialSequence.start(prompt, request.sampling, request.first_index + index)
        for index, prompt in enumerate(request.prompts)
    ]


def choose(
    partials: Sequence[PartialSequence],
    logits: NDArray[np.float32],
    sampling: Sampling,
    end_tokens: Collection[int],
) -> None:
    """Give each of some sequences ``[S]`` its next token, from ``logits [S, V]``."""
    if partials:
        draws = np.array([partial.random.random() for partial in partials])
        for partial, token in zip(partials, sample_rows(logits, draws, sampling), strict=True):
            partial.take(int(token), end_tokens)
