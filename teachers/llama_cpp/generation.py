"""Generation in the worker: many sequences decoded together, each from its own prompt.

See ``teachers.base.GenerationRequest`` for what is written. The logits a token is chosen from are
what soft targets are made of, so both come from one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teachers.base import GenerationRequest, Keep, Tokens, whole_masks
from teachers.llama_cpp.context import ContextShape, LlamaContext, Outputs
from teachers.llama_cpp.scoring import as_answer, common_prefix, decode_prefix
from teachers.sampling import choose, started
from teachers.targets.distributions import Arrays
from teachers.targets.stored_arrays import Answer

PARALLEL_SEQUENCES = 128
TOLD_SHARE = 0.005  # of all tokens: progress is reported about that often
PENDING_LOGITS = 1 << 22  # collected before they are reduced: 16 MB

Reduce = Callable[[Answer], Arrays]


@dataclass(frozen=True)
class Wanted:
    """What is kept of the logits: nothing without ``reduce``; ``states``: whether it reads them."""

    reduce: Reduce | None = None
    states: bool = False


class SequenceGenerator:
    """Writes the sequences of one request on one context."""

    def __init__(
        self, context: LlamaContext, request: GenerationRequest, wanted: Wanted | None = None
    ) -> None:
        self.context = context
        self.sampling = request.sampling
        self.partials = started(request)
        self.wanted = wanted or Wanted()
        self.keep = request.keep
        self._prefix: list[Arrays] = []  # of what all sequences begin with
        self._pieces: list[Arrays] = []
        self._spans: list[tuple[int, int, int]] = []  # sequence, first position, count; as pieces
        self._pending: list[tuple[Tensor, Tensor | None]] = []

    def run(
        self, progress: Callable[[int], None] = lambda more: None
    ) -> tuple[list[Tokens], Arrays]:
        """The sequences, and what is kept of their wanted positions, in order.

        A sequence ends with the teacher's end-of-turn token, which is kept, or at ``max_length``
        tokens. ``progress`` gets what tokens are new, a finished sequence counting as one of
        ``max_length``.
        """
        longest, told = self.sampling.max_length, 0
        for finished in self._steps():
            done = sum(longest if one.finished else len(one.tokens) for one in self.partials)
            # Seldom: a frame through the pipe takes a part of a small model's step.
            if finished or done - told >= TOLD_SHARE * longest * len(self.partials):
                progress(done - told)
                told = done
        sequences = [np.array(partial.tokens, dtype=np.int32) for partial in self.partials]
        return sequences, self._in_order(sequences)

    def stream(self) -> Iterator[list[int]]:
        """The new tokens of a single sequence after each step; none while it reads."""
        (partial,) = self.partials
        given = len(partial.tokens)
        for _ in self._steps():
            yield partial.tokens[given:]
            given = len(partial.tokens)

    def _steps(self) -> Iterator[int]:
        """Write all sequences to their ends; yields after each step how many it has finished."""
        context, partials, longest = self.context, self.partials, self.sampling.max_length
        cache = context.model.cache
        prompts = [np.array(partial.tokens, dtype=np.int32) for partial in partials]
        shared = common_prefix(prompts)
        wanted = min(PARALLEL_SEQUENCES, len(partials))
        parallel = context.parallel(wanted, longest, cache, shared=shared > 0)
        slots_needed = parallel + (shared > 0)  # one keeps the shared prefix
        context.prepare(ContextShape(slots_needed, longest, cache, states=self.wanted.states))
        for _, outputs in decode_prefix(context, prompts[0][:shared], parallel):
            if self.wanted.reduce is not None:
                self._prefix.append(self.wanted.reduce(as_answer(outputs)))
        for partial in partials:
            partial.fed = shared
        waiting = [index for index in range(len(partials)) if not self._done(index)][::-1]
        slots: dict[int, int] = {}
        while waiting or slots:
            for slot in range(parallel):
                if slot not in slots and waiting:
                    slots[slot] = waiting.pop()
                    context.start(slot, parallel if shared else None)
            self._step(slots)
            finished = [slot for slot, index in slots.items() if self._done(index)]
            for slot in finished:
                del slots[slot]
            yield len(finished)

    def _done(self, index: int) -> bool:
        """Whether a sequence needs no more decoding; nothing is kept of its last token."""
        partial = self.partials[index]
        return partial.finished and (
            self.wanted.reduce is None or partial.fed >= len(partial.tokens) - 1
        )

    def _step(self, slots: dict[int, int]) -> None:
        """Feed each sequence's pending tokens, as far as the batch reaches, and choose the next."""
        room = self.context.batch_tokens
        pieces: list[list[int]] = []
        fed_slots: list[int] = []
        spans: list[tuple[int, int, int]] = []
        for slot, index in slots.items():
            partial = self.partials[index]
            end = len(partial.tokens) - partial.finished
            piece = partial.tokens[partial.fed : min(end, partial.fed + room)]
            if piece:
                pieces.append(piece)
                fed_slots.append(slot)
                spans.append((index, partial.fed, len(piece)))
                partial.fed += len(piece)
                room -= len(piece)
        fed = [self.partials[index] for index, _, _ in spans]
        choosing = [row for row, partial in enumerate(fed) if partial.wants_token]
        counts = [count for _, _, count in spans]
        ends = np.cumsum(counts)[choosing] - 1
        kept = np.concatenate([self._kept(*span) for span in spans])
        rows = kept | self.wanted.states  # of which llama.cpp gives all or none
        rows[ends] = True
        outputs = self.context.decode(
            np.concatenate([np.array(piece, dtype=np.int32) for piece in pieces]),
            np.concatenate([np.arange(start, start + n, dtype=np.int32) for _, start, n in spans]),
            np.repeat(fed_slots, counts).astype(np.int32),
            rows,
        )
        if self.wanted.reduce is not None:
            self._collect(outputs, kept[rows], spans)
        assert outputs.logits is not None
        logits: NDArray[np.float32] = outputs.logits[np.cumsum(rows)[ends] - 1]
        chosen = [fed[row] for row in choosing]
        choose(chosen, logits, self.sampling, self.context.model.end_tokens)

    def _kept(self, index: int, start: int, count: int) -> Keep:
        """Which of a sequence's rows from ``start`` on are kept, ``[count]``."""
        kept = np.full(count, self.wanted.reduce is not None)
        begun = self.keep[index][start : start + count] if self.keep is not None else kept
        kept[: len(begun)] &= begun
        return kept

    def _collect(self, outputs: Outputs, kept: Keep, spans: list[tuple[int, int, int]]) -> None:
        """Collect a step's rows; many are reduced together, which costs each of them less."""
        answer, rows = as_answer(outputs), torch.from_numpy(kept)
        assert answer.logits is not None
        states = None if answer.states is None else answer.states[rows]  # a copy
        if len(logits := answer.logits[rows]):
            self._pending.append((logits, states))
        self._spans += spans
        if sum(logits.numel() for logits, _ in self._pending) >= PENDING_LOGITS:
            self._reduce()

    def _reduce(self) -> None:
        assert self.wanted.reduce is not None
        if self._pending:
            logits = torch.cat([logits for logits, _ in self._pending])
            states = [states for _, states in self._pending if states is not None]
            answer = Answer(logits, torch.cat(states) if states else None)
            self._pieces.append(self.wanted.reduce(answer))
            self._pending.clear()

    def _in_order(self, sequences: list[Tokens]) -> Arrays:
        """What was kept, in the order of the sequences and their wanted positions."""
        if self.wanted.reduce is None:
            return {}
        self._reduce()
        masks = whole_masks(sequences, self.keep)
        starts = np.concatenate(([0], np.cumsum([mask.sum() for mask in masks])))
        spans = [masks[index] for index, _, _ in self._spans]
        rows = [
            starts[index] + mask[:first].sum() + np.arange(mask[first : first + count].sum())
            for mask, (index, first, count) in zip(spans, self._spans, strict=True)
        ]
        arrays: Arrays = {}
        for name in self._pieces[0]:
            values = np.concatenate([piece[name] for piece in self._pieces])
            whole = np.empty((int(starts[-1]), *values.shape[1:]), values.dtype)
            whole[np.concatenate(rows)] = values
            if self._prefix:
                prefix = np.concatenate([piece[name] for piece in self._prefix])
                for start, mask in zip(starts, masks, strict=False):
                    own = prefix[mask[: len(prefix)]]
                    whole[start : start + len(own)] = own
            arrays[name] = whole
        return arrays
