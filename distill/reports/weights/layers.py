"""Tensor names as layer and kind of weight: ``model.layers.3.self_attn.q_proj.weight`` is
``q_proj`` of layer 3."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

LAYER = re.compile(r"(?:^|\.)(?:layers?|blk|blocks?|h)\.(\d{1,5})(?:\.|$)")


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs; ``layer`` is None for one that is in no layer (then ``kind`` is
    its name)."""

    layer: int | None
    kind: str


def places_of(names: Iterable[str]) -> dict[str, Place]:
    """The place of each name; a kind is as short as it can be and still be told from the others."""
    result: dict[str, tuple[int | None, str]] = {}
    for name in names:
        match = LAYER.search(name)
        rest = name if match is None else name[match.end() :]
        result[name] = (
            None if match is None else int(match[1]),
            rest.removesuffix(".weight") or name,
        )
    whole = {kind for layer, kind in result.values() if layer is not None}
    last = Counter(_last(kind) for kind in whole)
    return {
        name: Place(layer, _last(kind) if layer is not None and last[_last(kind)] == 1 else kind)
        for name, (layer, kind) in result.items()
    }


def kinds_of(places: Iterable[Place]) -> list[str]:
    """Kinds of weight in layers, in order of appearance."""
    return list(dict.fromkeys(place.kind for place in places if place.layer is not None))


def layers_of(places: Iterable[Place]) -> list[int]:
    """Numbers of the layers, ascending."""
    return sorted({place.layer for place in places if place.layer is not None})


def _last(kind: str) -> str:
    return kind.rpartition(".")[2]
