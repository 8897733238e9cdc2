"""The teacher speaks: many sequences decoded together, each from its own forced beginning.

A request is a list of segments of forced tokens. After each segment the teacher writes freely until
it ends its turn; then the next segment follows in place of its end-of-turn token (a chat template's
text between two turns carries that token itself). Every sequence draws from its own random stream,
so what it says does not depend on which other sequences it shares a batch with. The logits it is
chosen from are what soft targets are made of, so both come from one pass.

Runs inside the worker process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teachers.base import Sampling, Tokens
from teachers.llama_cpp.context import ContextShape, LlamaContext, Outputs
from teachers.llama_cpp.scoring import as_answer, common_prefix
from teachers.sampling import Speech, sample_rows
from teachers.targets.distributions import Arrays
from teachers.targets.stored_arrays import Answer

PARALLEL_SEQUENCES = 128
LOGITS_ASIDE = 1 << 22  # logits set aside before they are reduced: 16 MB

Reduce = Callable[[Answer], Arrays]


@dataclass(frozen=True)
class Wanted:
    """What is kept of the logits on the way: nothing without ``reduce``; ``states``: whether it
    looks at them."""

    reduce: Reduce | None = None
    states: bool = False


@dataclass(frozen=True)
class Said:
    """Sequences with forced and written tokens together, and the arrays of all their positions,
    in order."""

    sequences: list[Tokens]
    arrays: Arrays


class Speaker:
    """Writes sequences on one context."""

    def __init__(self, context: LlamaContext, sampling: Sampling, wanted: Wanted) -> None:
        self.context = context
        self.sampling = sampling
        self.wanted = wanted
        self._aside: list[tuple[Tensor, Tensor | None]] = []
        self._pieces: list[Arrays] = []
        self._shared = 0
        self._beginning: list[Arrays] = []
        self._places: list[
            tuple[int, int, int]
        ] = []  # sequence, first position, count; as in the pieces

    def speak(
        self,
        requests: Sequence[Sequence[Tokens]],
        numbers: Sequence[int],
        progress: Callable[[int], None] = lambda more: None,
    ) -> Said:
        """Let the teacher write one sequence per request.

        A sequence ends with the teacher's end-of-turn token, which is kept, or at ``max_length``
        tokens. ``numbers`` names each request's random stream; ``progress`` is told of each
        finished sequence.
        """
        pairs = zip(requests, numbers, strict=True)
        speeches = [Speech.begin(request, self.sampling, number) for request, number in pairs]
        for finished in self._write(speeches):
            for _ in range(finished):
                progress(1)
        sequences = [np.array(speech.tokens, dtype=np.int32) for speech in speeches]
        return Said(sequences, self._in_order(sequences))

    def stream(self, beginning: Tokens, number: int) -> Iterator[list[int]]:
        """Write one sequence as ``speak`` does, step by step: each step's new tokens, none while
        it reads."""
        speech = Speech.begin([beginning], self.sampling, number)
        given = len(speech.tokens)
        for _ in self._write([speech]):
            yield speech.tokens[given:]
            given = len(speech.tokens)

    def _write(self, speeches: list[Speech]) -> Iterator[int]:
        """Write the speeches to their ends; says after each step how many it has finished."""
        context, longest = self.context, self.sampling.max_length
        exact = context.model.prefers_exact
        beginnings = [np.array(speech.tokens, dtype=np.int32) for speech in speeches]
        self._shared = common_prefix(beginnings)
        extra = int(self._shared > 0)  # the slot that keeps the shared beginning
        wanted = min(PARALLEL_SEQUENCES, len(speeches)) + extra
        parallel = max(1, context.parallel(wanted, longest, exact=exact) - extra)
        context.prepare(ContextShape(parallel + extra, longest, exact, states=self.wanted.states))
        if self._shared:
            self._begin_together(beginnings[0][: self._shared], parallel)
            for speech in speeches:
                speech.fed = self._shared
        waiting = [index for index, speech in enumerate(speeches) if not self._done(speech)][::-1]
        slots: dict[int, int] = {}
        while waiting or slots:
            for slot in range(parallel):
                if slot not in slots and waiting:
                    slots[slot] = waiting.pop()
                    context.begin(slot, parallel if self._shared else None)
            self._step(speeches, slots)
            finished = [slot for slot, index in slots.items() if self._done(speeches[index])]
            for slot in finished:
                del slots[slot]
            yield len(finished)

    def _begin_together(self, tokens: Tokens, slot: int) -> None:
        """Decode what all sequences begin with, once, into a slot of its own."""
        for start in range(0, len(tokens), self.context.batch_tokens):
            piece = tokens[start : start + self.context.batch_tokens]
            positions = np.arange(start, start + len(piece), dtype=np.int32)
            slots = np.full(len(piece), slot, dtype=np.int32)
            outputs = self.context.decode(
                piece, positions, slots, np.ones(len(piece), dtype=np.bool_)
            )
            if self.wanted.reduce is not None:
                self._beginning.append(self.wanted.reduce(as_answer(outputs)))

    def _done(self, speech: Speech) -> bool:
        """Whether a sequence needs no more decoding; what follows its last token does not
        matter."""
        return speech.finished and (
            self.wanted.reduce is None or speech.fed >= len(speech.tokens) - 1
        )

    def _step(self, speeches: list[Speech], slots: dict[int, int]) -> None:
        """Feed what every sequence has pending, as far as the batch reaches, and choose the next
        tokens."""
        room = self.context.batch_tokens
        feeding: list[tuple[int, int, list[int]]] = []
        for slot, index in slots.items():
            speech = speeches[index]
            end = len(speech.tokens) - speech.finished
            piece = speech.tokens[speech.fed : min(end, speech.fed + room)]
            if piece:
                feeding.append((slot, index, piece))
                room -= len(piece)
        counts = [len(piece) for _, _, piece in feeding]
        places = [(index, speeches[index].fed, len(piece)) for _, index, piece in feeding]
        for _, index, piece in feeding:
            speeches[index].fed += len(piece)
        choosing = [
            place for place, (_, index, _) in enumerate(feeding) if speeches[index].wants_token
        ]
        ends = np.cumsum(counts)[choosing] - 1
        everything = self.wanted.reduce is not None or self.wanted.states
        rows = np.zeros(sum(counts), dtype=np.bool_)
        rows[slice(None) if everything else ends] = True
        outputs = self.context.decode(
            np.concatenate([np.array(piece, dtype=np.int32) for _, _, piece in feeding]),
            np.concatenate([np.arange(start, start + n, dtype=np.int32) for _, start, n in places]),
            np.repeat([slot for slot, _, _ in feeding], counts).astype(np.int32),
            rows,
        )
        if self.wanted.reduce is not None:
            self._keep(outputs, places)
        assert outputs.logits is not None
        chosen_from = outputs.logits[ends] if everything else outputs.logits
        self._choose([speeches[feeding[place][1]] for place in choosing], chosen_from)

    def _keep(self, outputs: Outputs, places: list[tuple[int, int, int]]) -> None:
        """Set a step's rows aside; many are reduced together, which costs each of them less."""
        answer = as_answer(outputs)
        states = None if answer.states is None else answer.states.clone()
        assert answer.logits is not None
        self._aside.append((answer.logits.clone(), states))
        self._places += places
        if sum(len(logits) for logits, _ in self._aside) * self.context.vocab_size >= LOGITS_ASIDE:
            self._reduce()

    def _reduce(self) -> None:
        """Reduce what was set aside."""
        assert self.wanted.reduce is not None
        if self._aside:
            states = [states for _, states in self._aside if states is not None]
            logits = torch.cat([logits for logits, _ in self._aside])
            self._pieces.append(
                self.wanted.reduce(Answer(logits, torch.cat(states) if states else None))
            )
            self._aside.clear()

    def _choose(self, speeches: list[Speech], logits: NDArray[np.float32]) -> None:
        """Give each of some sequences its next token."""
        if not speeches:
            return
        draws = np.array([speech.random.random() for speech in speeches])
        for speech, token in zip(
            speeches, sample_rows(logits, draws, self.sampling).tolist(), strict=True
        ):
            speech.take(token, self.context.model.end_tokens)

    def _in_order(self, sequences: list[Tokens]) -> Arrays:
        """What was kept, in the order of the sequences and their positions (n − 1 of n tokens)."""
        if self.wanted.reduce is None:
            return {}
        self._reduce()
        starts = np.concatenate(([0], np.cumsum([len(tokens) - 1 for tokens in sequences])))
        targets = np.concatenate(
            [starts[index] + first + np.arange(count) for index, first, count in self._places]
        )
        arrays: Arrays = {}
        for name in self._pieces[0]:
            values = np.concatenate([piece[name] for piece in self._pieces])
            room = np.empty((int(starts[-1]), *values.shape[1:]), values.dtype)
            room[targets] = values
            if self._beginning:
                shared = np.concatenate([piece[name] for piece in self._beginning])
                room[starts[:-1, None] + np.arange(self._shared)] = shared
            arrays[name] = room
        return arrays
