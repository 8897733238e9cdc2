"""The teacher's answer as the stored arrays that a recipe asks for, and back to typed targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teachers.targets.distributions import (
    Arrays,
    CompactTargets,
    DenseTargets,
    HiddenTargets,
    OutputHead,
)
from teachers.targets.recipe import TINY_VOCABULARY, Recipe
from teachers.targets.state_codec import Basis

Targets = CompactTargets | HiddenTargets | DenseTargets

FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class Answer:
    """What a teacher said about N positions, as far as the recipe needs it.

    ``logits [N, V]``, ``states [N, D]`` (final hidden, after the last norm), ``layers``: output of
    each chosen layer, ``[N, D]``; all float32.
    """

    logits: Tensor | None = None
    states: Tensor | None = None
    layers: Mapping[int, Tensor] | None = None


def reduce(answer: Answer, recipe: Recipe, bases: Mapping[str, Basis]) -> Arrays:
    """The arrays a store keeps of an answer; ``bases`` holds ``final`` and ``layer<i>`` where they
    are needed.

    Raises:
        ValueError: something in the answer is not finite.
    """
    arrays: Arrays = {}
    if recipe.kind == "compact":
        assert answer.logits is not None
        arrays |= _compact(answer.logits, recipe.num_topk)
    elif recipe.kind == "dense":
        assert answer.logits is not None
        _require_finite(answer.logits)
        arrays["logits"] = answer.logits.numpy().copy()
    if recipe.kind == "hidden":
        assert answer.states is not None
        _require_finite(answer.states)
        scale = (answer.states.abs().amax(dim=-1) / 127.0).clamp(min=1e-30)
        arrays["hidden"] = (answer.states / scale[:, None]).round().to(torch.int8).numpy()
        arrays["hidden_scale"] = scale.numpy()
    if recipe.has_sketch:
        assert answer.states is not None
        _require_finite(answer.states)
        arrays["sketch"], arrays["sketch_scale"] = bases["final"].encoded(answer.states)
    for layer in recipe.layers:
        assert answer.layers is not None
        states = answer.layers[layer]
        _require_finite(states)
        arrays[f"layer{layer}"], arrays[f"layer{layer}_scale"] = bases[f"layer{layer}"].encoded(
            states
        )
    return arrays


def _compact(logits: Tensor, num_topk: int) -> Arrays:
    """Top-k and tail masses."""
    small = logits.shape[-1] <= TINY_VOCABULARY
    joined = CompactTargets.from_logits(logits, num_topk)
    return {
        "topk_ids": joined.topk_ids.numpy().astype(np.uint16 if small else np.int32),
        "topk_logits": joined.topk_logits.clamp(min=-FLOAT16_MAX).half().numpy(),
        "tail": joined.tail.numpy(),
    }


def _require_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ValueError("the teacher's answer is not finite; its weights are damaged")


def array_names(recipe: Recipe) -> list[str]:
    """The arrays that ``reduce`` makes for the distribution itself."""
    names = {
        "compact": ["topk_ids", "topk_logits", "tail"],
        "hidden": ["hidden", "hidden_scale"],
        "dense": ["logits"],
    }[recipe.kind]
    return names + (["sketch", "sketch_scale"] if recipe.has_sketch else [])


def typed(
    arrays: Arrays, recipe: Recipe, vocab_size: int, basis: Basis | None, head: OutputHead | None
) -> Targets:
    """Stored arrays of some positions as typed targets."""
    if recipe.kind == "dense":
        return DenseTargets(_floats(arrays["logits"]))
    if recipe.kind == "hidden":
        assert head is not None
        return HiddenTargets(
            _floats(arrays["hidden"]) * _floats(arrays["hidden_scale"])[:, None], head
        )
    sketch: dict[str, Any] = {}
    if recipe.has_sketch:
        assert basis is not None
        codes: NDArray[Any] = arrays["sketch"]
        sketch = {
            "coordinates": basis.coordinates(codes, arrays["sketch_scale"].astype(np.float16)),
            "head": head,
        }
    return CompactTargets(
        torch.from_numpy(arrays["topk_ids"].astype(np.int64)),
        _floats(arrays["topk_logits"]),
        _floats(arrays["tail"]),
        vocab_size,
        **sketch,
    )


def join(parts: Sequence[Targets]) -> Targets:
    """The rows of several records of one kind, in order."""
    first = parts[0]
    if isinstance(first, CompactTargets):
        return CompactTargets.join([part for part in parts if isinstance(part, CompactTargets)])
    if isinstance(first, HiddenTargets):
        return HiddenTargets.join([part for part in parts if isinstance(part, HiddenTargets)])
    return DenseTargets.join([part for part in parts if isinstance(part, DenseTargets)])


def _floats(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))
