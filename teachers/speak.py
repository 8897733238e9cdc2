"""The teacher speaks: many sequences decoded together, each from its own forced beginning.

A request is a list of segments of forced tokens. After each segment the teacher writes freely until it
ends its turn; then the next segment follows in place of its end-of-turn token (a chat template's text
between two turns carries that token itself). Every sequence draws from its own random stream, so what
it says does not depend on which other sequences it shares a batch with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from teachers.base import Sampling, Tokens
from teachers.llama_cpp import ContextShape, LlamaContext

PARALLEL_SEQUENCES = 128


@dataclass
class _Slot:
    """One sequence being written."""

    index: int
    segments: list[Tokens]
    random: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)

    def begin_segment(self, max_length: int) -> None:
        room = max_length - len(self.tokens)
        self.pending = self.segments.pop(0)[:room].tolist()
        self.tokens += self.pending


def sample_rows(logits: NDArray[np.float32], draws: NDArray[np.float64], sampling: Sampling) -> Tokens:
    """Pick one token per row by inverting the cumulative distribution: ``[S, V]`` and ``[S]`` → ``[S]``.

    ``draws`` are uniform in [0, 1). Temperature 0 is greedy.
    """
    if sampling.temperature == 0.0:
        return logits.argmax(axis=-1).astype(np.int32)
    scaled = logits.astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    if sampling.top_p < 1.0:
        order = np.argsort(-weights, axis=-1, kind="stable")
        ranked = np.take_along_axis(weights, order, axis=-1)
        before = np.cumsum(ranked, axis=-1) - ranked  # mass ahead of each token; the first is always kept
        ranked[before >= sampling.top_p * weights.sum(axis=-1, keepdims=True)] = 0.0
        np.put_along_axis(weights, order, ranked, axis=-1)
    cumulative = np.cumsum(weights, axis=-1)
    targets = draws * cumulative[:, -1]
    chosen = [
        np.searchsorted(row, target, side="right") for row, target in zip(cumulative, targets, strict=True)
    ]
    return np.minimum(chosen, logits.shape[-1] - 1).astype(np.int32)


def speak(
    context: LlamaContext,
    requests: Sequence[Sequence[Tokens]],
    sampling: Sampling,
    *,
    first_index: int = 0,
    progress: Callable[[int], None] = lambda more: None,
) -> list[Tokens]:
    """Let the teacher write one sequence per request and return forced and written tokens together.

    A sequence ends with the teacher's end-of-turn token, which is kept, or at ``max_length`` tokens.
    ``first_index`` numbers the random streams, so that request i of a later call continues the count;
    ``progress`` is told of each finished sequence.
    """
    parallel = context.parallel(min(PARALLEL_SEQUENCES, len(requests)), sampling.max_length)
    # Many short sequences are bound by reading the cache, and a float16 one is enough to choose words by; the
    # soft targets of what is said are computed afterwards, exactly.
    context.prepare(ContextShape(parallel, sampling.max_length, context.model.speaks_exactly))
    waiting = list(enumerate(requests))[::-1]
    finished: dict[int, Tokens] = {}
    slots: dict[int, _Slot] = {}
    while waiting or slots:
        for number in range(parallel):
            if number not in slots and waiting:
                index, segments = waiting.pop()
                stream = np.random.Generator(np.random.Philox(key=[sampling.seed, first_index + index]))
                slots[number] = _Slot(index, [np.asarray(part, np.int32) for part in segments], stream)
                slots[number].begin_segment(sampling.max_length)
                context.forget(number)
        for number in _advance(context, slots, sampling):
            slot = slots.pop(number)
            finished[slot.index] = np.array(slot.tokens, dtype=np.int32)
            progress(1)
    return [finished[index] for index in range(len(requests))]


def _advance(context: LlamaContext, slots: dict[int, _Slot], sampling: Sampling) -> list[int]:
    """Feed what is pending, sample one token for each fully fed sequence; returns the finished slots."""
    feeding: list[tuple[int, list[int]]] = []
    room = context.batch_tokens
    for number, slot in slots.items():
        piece = slot.pending[:room]
        if piece:
            feeding.append((number, piece))
            room -= len(piece)
    tokens = np.concatenate([np.array(piece, dtype=np.int32) for _, piece in feeding])
    positions = np.concatenate([_positions(slots[number], len(piece)) for number, piece in feeding])
    owners = np.repeat([number for number, _ in feeding], [len(piece) for _, piece in feeding]).astype(
        np.int32
    )
    complete = [number for number, piece in feeding if len(piece) == len(slots[number].pending)]
    ends = np.cumsum([len(piece) for _, piece in feeding]) - 1
    wanted = np.zeros(len(tokens), dtype=np.bool_)
    wanted[[end for (number, _), end in zip(feeding, ends, strict=True) if number in complete]] = True
    logits = context.decode(tokens, positions, owners, wanted)
    for number, piece in feeding:
        slots[number].pending = slots[number].pending[len(piece) :]
    if not complete:
        return []
    draws = np.array([slots[number].random.random() for number in complete])
    chosen = sample_rows(logits, draws, sampling)
    return [
        number
        for number, token in zip(complete, chosen.tolist(), strict=True)
        if not _continue(context, slots[number], token, sampling.max_length)
    ]


def _positions(slot: _Slot, count: int) -> NDArray[np.int32]:
    start = len(slot.tokens) - len(slot.pending)
    return np.arange(start, start + count, dtype=np.int32)


def _continue(context: LlamaContext, slot: _Slot, token: int, max_length: int) -> bool:
    """Take in a sampled token; returns whether the sequence goes on."""
    if len(slot.tokens) >= max_length:
        return False
    if token in context.model.end_tokens and slot.segments:
        slot.begin_segment(max_length)
        return len(slot.tokens) < max_length
    slot.tokens.append(token)
    slot.pending = [token]
    return token not in context.model.end_tokens and len(slot.tokens) < max_length
