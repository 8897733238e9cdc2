"""What is kept of each position, as a store's manifest says it; without PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

# 1/T at which the tail's mass is stored: T = 6, 3, 2, 1.5, 1.2, 1. It is log(V − K) at 1/T = 0
# whatever the teacher, so seven points of a smooth convex function are known on [0, 1]; a
# polynomial through them gives the mass at every T ≥ 1.
NODES = (1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0)
# Where nothing else is asked for, compact targets take so many bytes in all; more, up to so many
# for the tail's shape alone, where it would be more than so many nats off at T = 1.
BYTES_PER_POSITION = 200
MOST_SKETCH_BYTES = 320
SKETCH_KL = 0.02
SCALE_BYTES = 2
TINY_VOCABULARY = 1 << 16  # up to here a token id takes two bytes, else four


@dataclass(frozen=True)
class Recipe:
    """What a capture keeps.

    Attributes:
        kind: one of ``KINDS``.
        num_topk: tokens kept exactly (``compact``).
        sketch_bytes: bytes of the state code, the tail's shape (``compact``), at most; 0 for none.
        sketch_kl: nats that the code may lose, so that no more bytes are taken than that needs (or
            than are usual); 0: all are.
        layers: layers whose output is kept too, counted from 0.
        layer_bytes: bytes of each such state.
    """

    kind: str = "compact"
    num_topk: int = 16
    sketch_bytes: int = 0
    sketch_kl: float = 0.0
    layers: tuple[int, ...] = ()
    layer_bytes: int = 128

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"targets of kind {self.kind!r} do not exist; choose one of {', '.join(KINDS)}"
            )
        least = min(self.num_topk - 1, self.sketch_bytes, self.layer_bytes - 1)
        if least < 0 or not 0.0 <= self.sketch_kl < inf:
            raise ValueError(f"recipe out of range: {self}")
        if len(self.layers) != len(set(self.layers)) or any(layer < 0 for layer in self.layers):
            raise ValueError(f"recipe with layers {self.layers}; name each once, from 0")

    @property
    def needs_logits(self) -> bool:
        """Whether the teacher's output layer has to be computed."""
        return KINDS[self.kind].needs_logits

    @property
    def needs_states(self) -> bool:
        """Whether the teacher's final hidden state is read."""
        return KINDS[self.kind].needs_states or self.has_sketch

    @property
    def has_sketch(self) -> bool:
        """Whether the tail's shape is kept."""
        return self.kind == "compact" and self.sketch_bytes > 0

    def bytes_per_position(self, vocab_size: int, width: int) -> int:
        """Stored bytes of one position, at most (few or constant states need fewer directions, and
        the tail's shape perhaps fewer bytes than it may have)."""
        code = min(self.sketch_bytes, width) + SCALE_BYTES if self.has_sketch else 0
        layers = len(self.layers) * (min(self.layer_bytes, width) + SCALE_BYTES)
        return KINDS[self.kind].bytes(self, vocab_size, width) + code + layers

    def to_json(self) -> dict[str, Any]:
        """The recipe as a store's identity and the worker's requests carry it."""
        content: dict[str, Any] = {
            "kind": self.kind,
            "num_topk": self.num_topk if self.kind == "compact" else None,
            "sketch_bytes": self.sketch_bytes if self.kind == "compact" else None,
            "layers": list(self.layers),
            "layer_bytes": self.layer_bytes if self.layers else None,
        }
        if self.has_sketch and self.sketch_kl:  # formats up to 4 do not know it
            content["sketch_kl"] = self.sketch_kl
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Recipe:
        """The inverse of ``to_json``.

        Raises:
            KeyError, TypeError, ValueError: this is no recipe.
        """
        kind, layers = content["kind"], content["layers"]
        compact = kind == "compact"
        meaningful = {"num_topk": compact, "sketch_bytes": compact, "layer_bytes": bool(layers)}
        written = {name: content[name] for name in meaningful}  # all are there
        given = {name: value for name, value in written.items() if meaningful[name]}
        if any(type(value) is not int for value in given.values()):
            raise ValueError(f"recipe with {given}")
        if any(type(layer) is not int for layer in layers):
            raise ValueError(f"recipe with layers {layers!r}")
        allowed = content.get("sketch_kl", 0.0)
        if type(allowed) is not float:
            raise ValueError(f"recipe with sketch_kl {allowed!r}")
        return cls(kind=kind, layers=tuple(layers), sketch_kl=allowed, **given)


@dataclass(frozen=True)
class Kind:
    """What a kind of targets needs of the teacher; ``bytes``: of one position, from recipe, V, D.

    Codes of states and layers (``Recipe.bytes_per_position``) come on top.
    """

    needs_logits: bool
    needs_states: bool
    bytes: Callable[[Recipe, int, int], int]


KINDS = {
    "compact": Kind(True, False, lambda recipe, v, d: compact_bytes(min(recipe.num_topk, v), v)),
    "hidden": Kind(False, True, lambda recipe, v, d: d + 4),
    "dense": Kind(True, False, lambda recipe, v, d: 4 * v),
}


def compact_bytes(num_topk: int, vocab_size: int) -> int:
    """Bytes of one position's top-k and tail masses."""
    return num_topk * ((2 if vocab_size <= TINY_VOCABULARY else 4) + 2) + 4 * len(NODES)


def least_sketch_bytes(recipe: Recipe, vocab_size: int) -> int:
    """What is left for the tail's shape of ``BYTES_PER_POSITION``, as far as the recipe has it."""
    left = BYTES_PER_POSITION - compact_bytes(recipe.num_topk, vocab_size) - SCALE_BYTES
    return min(max(1, left), recipe.sketch_bytes)


def compact_recipe(num_topk: int, vocab_size: int, width: int) -> Recipe:
    """Compact targets with the tail's shape as it is kept where nothing else is asked for, and
    without where there is no tail."""
    if num_topk >= vocab_size:
        return Recipe("compact", num_topk)
    return Recipe("compact", num_topk, min(MOST_SKETCH_BYTES, width), SKETCH_KL)
