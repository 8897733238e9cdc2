"""What is kept of each position: the recipe, the teacher's answer as stored arrays, and back to typed targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teachers.sketch import Basis
from teachers.soft_targets import (
    KINDS,
    NODES,
    Arrays,
    CompactTargets,
    DenseTargets,
    HiddenTargets,
    OutputHead,
)

Targets = CompactTargets | HiddenTargets | DenseTargets

BYTES_PER_POSITION = 200  # what compact targets may take where the recipe does not say
SCALE_BYTES = 2
FLOAT16_MAX = 65504.0
TINY_VOCABULARY = 1 << 16  # up to here a token id takes two bytes, else four


@dataclass(frozen=True)
class Recipe:
    """What a capture keeps.

    Attributes:
        kind: ``compact``, ``hidden`` or ``dense``.
        num_topk: tokens kept exactly (``compact``).
        sketch_bytes: bytes for the shape of the tail (``compact``); 0 for none.
        layers: layers whose output is kept too, counted from 0.
        layer_bytes: bytes of each such state.
    """

    kind: str = "compact"
    num_topk: int = 16
    sketch_bytes: int = 0
    layers: tuple[int, ...] = ()
    layer_bytes: int = 128

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"targets of kind {self.kind!r} do not exist; choose one of {', '.join(KINDS)}")
        if self.num_topk < 1 or self.sketch_bytes < 0 or self.layer_bytes < 1:
            raise ValueError(f"recipe out of range: {self}")
        if len(self.layers) != len(set(self.layers)) or any(layer < 0 for layer in self.layers):
            raise ValueError(f"recipe with layers {self.layers}; name each once, from 0")

    @property
    def needs_logits(self) -> bool:
        """Whether the teacher's output layer has to be computed."""
        return self.kind != "hidden"

    @property
    def needs_states(self) -> bool:
        """Whether the teacher's final hidden state is looked at."""
        return self.kind == "hidden" or self.has_sketch

    @property
    def has_sketch(self) -> bool:
        """Whether the tail's shape is kept."""
        return self.kind == "compact" and self.sketch_bytes > 0

    def bytes_per_position(self, vocab_size: int, width: int) -> int:
        """Stored bytes of one position, at most (few or constant states need fewer directions)."""
        layers = len(self.layers) * (min(self.layer_bytes, width) + SCALE_BYTES)
        if self.kind == "dense":
            return 4 * vocab_size + layers
        if self.kind == "hidden":
            return width + 4 + layers
        sketch = min(self.sketch_bytes, width) + SCALE_BYTES if self.has_sketch else 0
        return compact_bytes(min(self.num_topk, vocab_size), vocab_size) + sketch + layers

    def to_json(self) -> dict[str, Any]:
        """The recipe as a store's identity and the worker's requests carry it."""
        return {
            "kind": self.kind,
            "num_topk": self.num_topk if self.kind == "compact" else None,
            "sketch_bytes": self.sketch_bytes if self.kind == "compact" else None,
            "layers": list(self.layers),
            "layer_bytes": self.layer_bytes if self.layers else None,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Recipe:
        """The inverse of ``to_json``.

        Raises:
            KeyError, TypeError, ValueError: this is no recipe.
        """
        numbers = {"num_topk": kind_is(content, "compact"), "sketch_bytes": kind_is(content, "compact")}
        numbers["layer_bytes"] = bool(content["layers"])
        written = {name: content[name] for name in numbers}
        given = {name: value for name, value in written.items() if numbers[name]}
        layers = content["layers"]
        if any(type(value) is not int for value in given.values()):
            raise ValueError(f"recipe with {given}")
        if any(type(layer) is not int for layer in layers):
            raise ValueError(f"recipe with layers {layers!r}")
        return cls(kind=content["kind"], layers=tuple(layers), **given)


def kind_is(content: Mapping[str, Any], kind: str) -> bool:
    """Whether a recipe's JSON is of this kind."""
    return bool(content["kind"] == kind)


def compact_bytes(num_topk: int, vocab_size: int) -> int:
    """Bytes of one position's top-k and tail masses."""
    return num_topk * ((2 if vocab_size <= TINY_VOCABULARY else 4) + 2) + 4 * len(NODES)


def default_sketch_bytes(num_topk: int, vocab_size: int, width: int) -> int:
    """What is left for the tail's shape of ``BYTES_PER_POSITION``; 0 where there is no tail."""
    if num_topk >= vocab_size:
        return 0
    left = BYTES_PER_POSITION - compact_bytes(num_topk, vocab_size) - SCALE_BYTES
    return max(0, min(left, width))


@dataclass(frozen=True)
class Answer:
    """What a teacher said about N positions, as far as the recipe needs it.

    ``logits [N, V]``, ``states [N, D]`` (final hidden, after the last norm), ``layers``: output of each chosen
    layer, ``[N, D]``; all float32.
    """

    logits: Tensor | None = None
    states: Tensor | None = None
    layers: Mapping[int, Tensor] | None = None


def reduce(answer: Answer, recipe: Recipe, bases: Mapping[str, Basis]) -> Arrays:
    """The arrays a store keeps of an answer; ``bases`` holds ``final`` and ``layer<i>`` where they are needed.

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
        arrays[f"layer{layer}"], arrays[f"layer{layer}_scale"] = bases[f"layer{layer}"].encoded(states)
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
        return HiddenTargets(_floats(arrays["hidden"]) * _floats(arrays["hidden_scale"])[:, None], head)
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
