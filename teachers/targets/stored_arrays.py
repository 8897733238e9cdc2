"""The teacher's answer as the stored arrays that a recipe asks for, and back to typed targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from teachers.targets.distributions import Answer, Arrays, Targets, require_finite
from teachers.targets.output_head import OutputHead
from teachers.targets.recipe import Recipe
from teachers.targets.state_codec import Basis

CLASSES: dict[str, Any] = {targets.kind: targets for targets in get_args(Targets)}


def reduce(answer: Answer, recipe: Recipe, bases: Mapping[str, Basis]) -> Arrays:
    """The arrays a store keeps of an answer; ``bases``: ``final``, ``layer<i>`` where needed.

    Raises:
        ValueError: something in the answer is not finite.
    """
    arrays: Arrays = CLASSES[recipe.kind].reduce(answer, recipe)
    if recipe.has_sketch:
        assert answer.states is not None
        require_finite(answer.states)
        arrays["sketch"], arrays["sketch_scale"] = bases["final"].encoded(answer.states)
    for layer in recipe.layers:
        assert answer.layers is not None
        name, states = f"layer{layer}", answer.layers[layer]
        require_finite(states)
        arrays[name], arrays[f"{name}_scale"] = bases[name].encoded(states)
    return arrays


def array_names(recipe: Recipe) -> list[str]:
    """The arrays that ``reduce`` makes for the distribution itself."""
    names = list(CLASSES[recipe.kind].arrays)
    return names + (["sketch", "sketch_scale"] if recipe.has_sketch else [])


def typed(
    arrays: Arrays, recipe: Recipe, vocab_size: int, basis: Basis | None, head: OutputHead | None
) -> Targets:
    """Stored arrays of some positions as typed targets."""
    code = None
    if recipe.has_sketch:
        assert basis is not None
        scales = arrays["sketch_scale"].astype(np.float16)
        code = basis.coordinates(arrays["sketch"], scales)  # type: ignore[arg-type]
    targets: Targets = CLASSES[recipe.kind].from_arrays(arrays, vocab_size, code, head)
    return targets


def join(parts: Sequence[Targets]) -> Targets:
    """The rows of several records of one kind, in order."""
    joined: Targets = type(parts[0]).join(list(parts))  # type: ignore[arg-type]
    return joined
