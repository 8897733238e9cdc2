"""Scoring many sequences in the worker: contexts, batches of like length, rows in order.

Runs inside the worker process; PyTorch, which takes a second to load, comes only with what needs
it. Letters: N rows over all sequences, in order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from teachers.base import Keep, whole_masks
from teachers.llama_cpp.context import ContextShape, LlamaContext, Outputs
from teachers.llama_cpp.sizes import CACHE_STEP
from teachers.llama_cpp.wire import Arrays

if TYPE_CHECKING:
    from teachers.targets.stored_arrays import Answer


Tokens = NDArray[np.int32]
Reduce = Callable[[Outputs], Arrays]

SHARED_TOKENS = 32  # a common beginning this long is decoded once and copied
LEAST_WANTED = 16  # rows of a batch: products with few take kernels that round otherwise
LIKE_LENGTH = 0.9  # sequences at least this part of the longest are filled up and decoded with it


def common_prefix(sequences: Sequence[Tokens]) -> int:
    """How many tokens all sequences begin with, where that is worth sharing, else 0.

    At least one further token of each is left to decode.
    """
    first = sequences[0]
    count = min(len(tokens) for tokens in sequences) - 2
    for tokens in sequences[1:]:
        if count < SHARED_TOKENS:
            return 0
        differing = np.flatnonzero(first[:count] != tokens[:count])
        count = int(differing[0]) if len(differing) else count
    return count if count >= SHARED_TOKENS and len(sequences) > 1 else 0


def decode_prefix(
    context: LlamaContext, tokens: Tokens, slot: int
) -> Iterator[tuple[int, Outputs]]:
    """Decode what all sequences begin with, once, into a slot of its own, in batches.

    Yields their rows and the position at which they start.
    """
    for start in range(0, len(tokens), context.batch_tokens):
        piece = tokens[start : start + context.batch_tokens]
        positions = np.arange(start, start + len(piece), dtype=np.int32)
        slots = np.full(len(piece), slot, dtype=np.int32)
        yield start, context.decode(piece, positions, slots, np.ones(len(piece), dtype=np.bool_))


def _selected(outputs: Outputs, rows: Keep) -> Outputs:
    """The outputs of some rows, ``[n]``."""
    if bool(rows.all()):
        return outputs
    return Outputs(
        None if outputs.logits is None else outputs.logits[rows],
        None if outputs.states is None else outputs.states[rows],
        {layer: values[rows] for layer, values in outputs.layers.items()},
    )


def groups_of_like_length(
    lengths: NDArray[np.int64], batch_tokens: int, parallel: int
) -> list[list[int]]:
    """Divide sequences into groups that fill a batch, longest first, with little padding.

    Each group has at most ``parallel`` sequences, and its size times its longest is at most
    ``batch_tokens`` (a longer sequence is a group of its own).
    """
    groups: list[list[int]] = []
    longest = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        size = len(groups[-1]) if groups else 0
        room = 0 < size < parallel and (size + 1) * longest <= batch_tokens
        if room and length >= LIKE_LENGTH * longest:
            groups[-1].append(index)
        else:
            groups.append([index])
            longest = length
    return groups


class Contexts(Protocol):
    """What scoring needs of the worker's server."""

    model: Any

    def contexts_of(self, count: int) -> list[LlamaContext]:
        """So many contexts on the model."""
        ...

    def report(self, more: int) -> None:
        """Report to the parent that ``more`` rows are done."""
        ...


class Scorer:
    """Rows of every sequence, reduced batch by batch while the other contexts decode.

    A sequence of n tokens has n − 1 rows (what follows its last token is not known), of which
    those are computed that its mask wants. Sequences of like length are decoded together, shorter
    ones padded. Which are together depends on their lengths alone, so the rows do not depend on
    which context happens to be free.
    """

    def __init__(
        self, sequences: Sequence[Tokens], shape: ContextShape, keep: Sequence[Keep] | None = None
    ) -> None:
        """``shape``: what is wanted of each token (its numbers of sequences and tokens are chosen
        here). Batches and rows are the same with and without masks ``keep``."""
        self.sequences = sequences
        self.lengths = np.array([len(tokens) - 1 for tokens in sequences], dtype=np.int64)
        self.masks = whole_masks(sequences, keep)
        self.starts = np.concatenate(([0], np.cumsum([mask.sum() for mask in self.masks])))
        self.shape = replace(shape, masked=keep is not None)
        self.prefix = common_prefix(sequences)
        self.result: Arrays = {}

    def run(self, server: Contexts, reduce: Reduce) -> Arrays:
        """The reduced arrays of all kept rows, ``[N, …]``, in the sequences' order. ``reduce`` is
        called in the contexts' threads and may return views of what it gets: they are copied."""
        contexts = server.contexts_of(server.model.scoring_contexts)
        shape, groups = self._planned(contexts[0])
        waiting = iter(groups)
        taking = threading.Lock()

        def work(context: LlamaContext) -> None:
            context.prepare(shape)
            prefix = self.sequences[0][: self.prefix]
            for start, outputs in decode_prefix(context, prefix, shape.sequences - 1):
                if context is contexts[0]:
                    arrays = reduce(outputs)
                    for index, mask in enumerate(self.masks):
                        mine = mask[start : min(self.prefix, start + context.batch_tokens)]
                        rows = {name: values[mine] for name, values in arrays.items()}
                        self._put(index, start, rows)
            while True:
                with taking:
                    group = next(waiting, None)
                if group is None:
                    return
                for slot in range(len(group)):
                    context.start(slot, shape.sequences - 1 if self.prefix else None)
                for start, outputs in self._decoded(context, group):
                    self._scatter(group, start, reduce(outputs))
                server.report(int(self.lengths[group].sum()))

        with ThreadPoolExecutor(len(contexts)) as pool:
            list(pool.map(work, contexts))
        return self.result

    def _planned(self, context: LlamaContext) -> tuple[ContextShape, list[list[int]]]:
        """The context's shape and which sequences are decoded together."""
        own = self.lengths - self.prefix
        longest = int(self.lengths.max())
        unlimited = groups_of_like_length(own, context.batch_tokens, len(own))
        cache = self.shape.cache or context.model.cache
        shared = self.prefix > 0
        wanted = max(len(group) for group in unlimited)
        parallel = context.parallel(wanted, longest, cache, shared=shared)
        groups = groups_of_like_length(own, context.batch_tokens, parallel)
        tokens = -(-longest // CACHE_STEP) * CACHE_STEP
        shape = replace(self.shape, sequences=parallel + shared, tokens=tokens, cache=cache)
        return shape, groups

    def _decoded(self, context: LlamaContext, group: list[int]) -> Iterator[tuple[int, Outputs]]:
        """Decode a group; yields rows and the position in its sequences at which they start."""
        own = self.lengths[group] - self.prefix
        size = int(own.max())
        grid = np.zeros((len(group), size), dtype=np.int32)
        kept = np.zeros((len(group), size), dtype=np.bool_)
        for row, index in enumerate(group):
            grid[row, : own[row]] = self.sequences[index][self.prefix : -1]
            kept[row, : own[row]] = self.masks[index][self.prefix :]
        for offset in range(0, size, context.batch_tokens):  # only a group of one is longer
            piece = grid[:, offset : offset + context.batch_tokens]
            start = self.prefix + offset
            positions = np.arange(start, start + piece.shape[1], dtype=np.int32)
            slots = np.repeat(np.arange(len(group), dtype=np.int32), piece.shape[1])
            rows = kept[:, offset : offset + piece.shape[1]].reshape(-1)
            wanted = rows | (not self.shape.masked)  # without masks all, padding too
            wanted[np.flatnonzero(~wanted)[: max(0, LEAST_WANTED - int(wanted.sum()))]] = True
            flat = np.tile(positions, len(group))
            outputs = context.decode(piece.reshape(-1), flat, slots, wanted)
            if rows.any():
                yield start, _selected(outputs, rows[wanted])

    def _scatter(self, group: list[int], start: int, arrays: Arrays) -> None:
        """Put a group's rows where they belong; a group of one may come in several pieces."""
        if len(group) == 1:
            return self._put(group[0], start, arrays)
        taken = 0
        for index in group:
            count = int(self.masks[index][start:].sum())
            rows = {name: values[taken : taken + count] for name, values in arrays.items()}
            self._put(index, start, rows)
            taken += count
        return None

    def _put(self, index: int, start: int, arrays: Arrays) -> None:
        """Store a sequence's kept rows from ``start`` on; the first of an array allocates all."""
        first = int(self.starts[index] + self.masks[index][:start].sum())
        for name, values in arrays.items():
            whole = self.result.get(name)
            if whole is None:
                room = np.empty((int(self.starts[-1]), *values.shape[1:]), values.dtype)
                whole = self.result.setdefault(name, room)  # contexts may race here; one wins
            whole[first : first + len(values)] = values


def as_answer(outputs: Outputs) -> Answer:
    """llama.cpp's buffers as tensors, without a copy."""
    import torch

    from teachers.targets.stored_arrays import Answer

    return Answer(
        None if outputs.logits is None else torch.from_numpy(outputs.logits),
        None if outputs.states is None else torch.from_numpy(outputs.states),
        {layer: torch.from_numpy(values) for layer, values in outputs.layers.items()},
    )


def as_arrays(outputs: Outputs) -> Arrays:
    """A batch's outputs as named arrays, without a copy: ``logits``, ``final``, ``layer<i>``."""
    arrays: Arrays = {}
    if outputs.logits is not None:
        arrays["logits"] = outputs.logits
    if outputs.states is not None:
        arrays["final"] = outputs.states
    return arrays | {f"layer{layer}": values for layer, values in outputs.layers.items()}
