"""Small stores of soft targets, and hidden states like a model's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teachers.base import Keep, Tokens
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.store.capture import CaptureSummary, capture, fit_shared_codec
from teachers.store.manifest import Manifest
from teachers.store.store import SoftTargetStore
from teachers.targets.distributions import (
    Arrays,
    CompactTargets,
    DenseTargets,
    HiddenTargets,
)
from teachers.targets.output_head import OutputHead
from teachers.targets.recipe import Recipe
from teachers.targets.state_codec import Basis
from teachers.targets.stored_arrays import Targets
from tests.support.children.capture_child import RECIPE, Source, begin
from tests.support.teachers import BigramTeacher

Array = NDArray[np.float64]


def write_store(
    folder: Path,
    teacher: BigramTeacher,
    sequences: Sequence[Tokens],
    recipe: Recipe,
    per_shard: int,
    keep: Sequence[Keep] | None = None,
    **identity: Any,
) -> SoftTargetStore:
    """A complete store of what ``teacher`` says about ``sequences``, with masks where given."""
    if keep is not None:
        identity["train_on"] = "assistant"
    content = {"recipe": recipe.to_json(), "vocab_size": teacher.info.vocab_size, **identity}
    store = SoftTargetStore.create_or_open(folder, Manifest(content, len(sequences), per_shard))
    bases: Mapping[str, Basis] = {}
    if store.needs_shared_codec:
        shared_codec = fit_shared_codec(teacher, sequences, recipe, keep)  # type: ignore[arg-type]
        store.write_shared_codec(shared_codec)
        bases = shared_codec.bases
    for shard in range(store.manifest.shards):
        start, stop = store.span(shard)
        some, masks = sequences[start:stop], None if keep is None else keep[start:stop]
        arrays = teacher.score(some, recipe, bases, keep=masks)
        store.write_shard(shard, some, arrays, masks)
    return store


def exact_targets(kind: str, logits: torch.Tensor, num_topk: int) -> Targets:
    """Typed targets that lose nothing of ``logits [N, V]``.

    ``kind``: ``buckets``, ``sketch``, ``hidden`` or ``dense``. The head of two of them gives the
    logits up to a bias of each token and, in ``sketch``, a constant of each position.
    """
    if kind == "dense":
        return DenseTargets(logits)
    bias = torch.linspace(-1.0, 2.0, logits.shape[1], dtype=logits.dtype)
    head = OutputHead(torch.eye(logits.shape[1], dtype=logits.dtype), bias)
    if kind == "hidden":
        return HiddenTargets(logits - bias, head)
    targets = CompactTargets.from_logits(logits, num_topk)
    if kind == "buckets":
        return targets
    constant = torch.arange(len(logits), dtype=logits.dtype)[:, None] % 7
    return replace(targets, coordinates=logits - bias + constant, head=head)


def quiet(done: int, words: str) -> None:
    """A report that nobody reads."""


def filled(
    folder: Path, teacher: GGUFTeacher, source: Source, recipe: Recipe = RECIPE
) -> tuple[SoftTargetStore, CaptureSummary]:
    """A captured store, opened afresh."""
    summary = capture(teacher, source, begin(folder, teacher, source, recipe), quiet)
    return begin(folder, teacher, source, recipe), summary


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Seeded float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(positions: int, width: int, seed: int = 0, decay: float = 0.9) -> Tensor:
    """States with a mean and a falling spectrum along random directions, float32 ``[N, D]``."""
    directions = torch.linalg.qr(normal(width, width, seed=seed + 100))[0]
    spectrum = torch.tensor([3.0 * decay**i for i in range(width)])
    mean = 2.0 * normal(width, seed=seed + 200)
    states: Tensor = (normal(positions, width, seed=seed) * spectrum) @ directions + mean
    return states


def rotation(width: int, seed: int) -> Array:
    """A random orthonormal matrix."""
    return np.linalg.qr(normal(width, width, seed=seed).double().numpy())[0]


def lopsided_metric(width: int) -> Array:
    """Some directions, not those in which the states vary most, count a thousand times more."""
    turn = rotation(width, 17)
    metric: Array = turn * np.logspace(0, 3, width) @ turn.T
    return metric


def rows_of(matrix: Tensor) -> Callable[[int, int], NDArray[np.float32]]:
    """The callback through which an output matrix is read."""
    return lambda start, stop: matrix[start:stop].numpy()


def basis_of_format_4(
    name: str, width: int, wide: int, narrow: int, random: np.random.Generator
) -> Arrays:
    """How stores up to format 4 keep a basis: ``wide`` directions of a byte, ``narrow`` of half."""
    eye = np.eye(width, wide + narrow, dtype=np.float32)
    return {
        f"{name}_mean": np.zeros(width, np.float32),
        f"{name}_encode": eye,
        f"{name}_decode": eye.T.copy(),
        f"{name}_ranges": random.uniform(0.5, 3.0, wide + narrow).astype(np.float32),
        f"{name}_wide": np.array([wide], dtype=np.int64),
    }


def of_format_4(codes: list[list[int]], wide: int, ranges: list[float]) -> list[list[float]]:
    """Coordinates as stores up to format 4 mean them: bytes of range / 127 in two's complement,
    then two nibbles a byte, the first one high, each the middle of a sixteenth of the range."""
    rows = []
    for row in codes:
        values = [(code - 256 if code > 127 else code) / 127 for code in row[:wide]]
        for byte in row[wide:]:
            values += [(nibble - 7.5) / 8 for nibble in divmod(byte, 16)]
        rows.append([value * limit for value, limit in zip(values, ranges, strict=True)])
    return rows
