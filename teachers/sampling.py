"""Choosing tokens: how a row of logits becomes one token, and how a sequence is written turn by
turn.

Nothing here knows how logits are computed, so every kind of teacher speaks by the same rules.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from teachers.base import Sampling, Tokens


def sample_rows(
    logits: NDArray[np.float32], draws: NDArray[np.float64], sampling: Sampling
) -> Tokens:
    """Pick one token per row by inverting the cumulative distribution: ``[S, V]`` and ``[S]`` →
    ``[S]``.

    ``draws`` are uniform in [0, 1). Temperature 0 is greedy.
    """
    if sampling.temperature == 0.0:
        return logits.argmax(axis=-1).astype(np.int32)
    scaled = logits.astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    if sampling.top_p < 1.0:
        order = np.argsort(-weights, axis=-1, kind="stable")
        ranked = np.take_along_axis(weights, order, axis=-1)
        before = (
            np.cumsum(ranked, axis=-1) - ranked
        )  # mass ahead of each token; the first is always kept
        ranked[before >= sampling.top_p * weights.sum(axis=-1, keepdims=True)] = 0.0
        np.put_along_axis(weights, order, ranked, axis=-1)
    cumulative = np.cumsum(weights, axis=-1)
    targets = draws * cumulative[:, -1]
    chosen = [
        np.searchsorted(row, target, side="right")
        for row, target in zip(cumulative, targets, strict=True)
    ]
    return np.minimum(chosen, logits.shape[-1] - 1).astype(np.int32)


def random_stream(sampling: Sampling, index: int) -> np.random.Generator:
    """The random stream of sequence ``index``: what a sequence says does not depend on its
    company."""
    return np.random.Generator(np.random.Philox(key=[sampling.seed, index]))


@dataclass
class Speech:
    """One sequence being written: forced segments, and the teacher's own turns between them.

    Attributes:
        segments: forced tokens still to come; each takes the place of the end of the turn before
        it. random: the sequence's own random stream. max_length: tokens the sequence may have,
        forced ones included. tokens: what it holds so far. fed: how many of ``tokens`` the model
        has seen. finished: nothing will be added any more.
    """

    segments: list[Tokens]
    random: np.random.Generator
    max_length: int
    tokens: list[int] = field(default_factory=list)
    fed: int = 0
    finished: bool = False

    @classmethod
    def begin(cls, request: Sequence[Tokens], sampling: Sampling, index: int) -> Speech:
        """A speech that holds its first segment.

        Raises:
            ValueError: the request has no segment, or an empty one (there is nothing to speak
            from).
        """
        if not request or any(len(segment) == 0 for segment in request):
            raise ValueError(f"request {index} to speak has no forced tokens; give at least BOS")
        speech = cls(list(request), random_stream(sampling, index), sampling.max_length)
        speech._force()
        return speech

    @property
    def wants_token(self) -> bool:
        """Whether the model has seen everything, so that the next token is the teacher's to
        choose."""
        return self.fed == len(self.tokens) and not self.finished

    def take(self, token: int, end_tokens: Collection[int]) -> None:
        """Add the token the teacher chose; at the end of its turn the next segment stands in its
        place."""
        if token in end_tokens and self.segments:
            self._force()
            return
        self.tokens.append(token)
        self.finished = token in end_tokens or len(self.tokens) >= self.max_length

    def _force(self) -> None:
        room = self.max_length - len(self.tokens)
        self.tokens += self.segments.pop(0)[:room].tolist()
        self.finished = len(self.tokens) >= self.max_length
