"""What is kept of each position, as a store's manifest says it; without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KINDS = ("compact", "hidden", "dense")
# 1/T at which the tail's mass is stored: T = 6, 3, 2, 1.5, 1.2, 1. It is log(V − K) at 1/T = 0
# whatever the teacher, so seven points of a smooth convex function are known on [0, 1]; a
# polynomial through them gives the mass at every T ≥ 1.
NODES = (1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0)
BYTES_PER_POSITION = 200  # what compact targets may take where the recipe does not say
SCALE_BYTES = 2
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
            raise ValueError(
                f"targets of kind {self.kind!r} do not exist; choose one of {', '.join(KINDS)}"
            )
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
        numbers = {
            "num_topk": kind_is(content, "compact"),
            "sketch_bytes": kind_is(content, "compact"),
        }
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
