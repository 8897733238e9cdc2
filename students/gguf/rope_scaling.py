"""Rotary embeddings stretched beyond the context a model was first trained for, in GGUF's terms.

transformers scales the angle per position of each rotary pair; llama.cpp takes keys
(``rope.scaling.*``) or divides the angles by a tensor of factors. Letters: R rotary dimensions of a
head, R / 2 pairs.

Where ``longrope`` changes from its short to its long factors is not the same everywhere.
transformers changes in each forward pass whose last position is beyond the original context.
llama.cpp (as in llama-cpp-python 0.3.36) decides by the room of the context it runs in, tokens per
sequence rounded up to 256: a short text in a long context gets the long factors. The two agree
whenever both text and room are within, or both are beyond, the original context.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from students.gguf.architectures import FULL, SLIDING, architecture_of
from students.gguf.metadata import ExportError

YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # llama.cpp's own, and transformers'


@dataclass(frozen=True)
class RopeScaling:
    """``values``: metadata, the architecture's name left off; ``tensors``: divisors of the
    angles, ``[R / 2]``."""

    values: Mapping[str, str | int | float] = field(default_factory=dict)
    tensors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


def rope_parameters(config: Any) -> Mapping[str, Any]:
    """The rotary parameters of a transformers configuration, of its layers that attend to all
    tokens where those with a sliding window have others.

    Raises:
        ExportError: there are none, or other sets than these two.
    """
    parameters = config.rope_parameters
    windows = architecture_of(config).window_period > 0
    if windows and isinstance(parameters, Mapping) and set(parameters) == {FULL, SLIDING}:
        parameters = parameters[FULL]
    if not isinstance(parameters, Mapping) or any(
        isinstance(value, Mapping) for value in parameters.values()
    ):
        only = "a set for each kind of layer" if windows else "one set for all layers"
        raise ExportError(f"rope_parameters is {_short(parameters)}; only {only} can be exported")
    return parameters


def rope_theta(config: Any) -> float:
    """Base of the rotary frequencies of a transformers configuration.

    Raises:
        ExportError: it is missing or no number above 1.
    """
    return _number(rope_parameters(config), "rope_theta", above=1.0)


def window_theta(config: Any) -> float:
    """The same of layers with a sliding window, whose rotary embedding is never stretched.

    Raises:
        ExportError: it is, or there is no such base.
    """
    parameters = config.rope_parameters.get(SLIDING)
    if not isinstance(parameters, Mapping) or parameters.get("rope_type") != "default":
        raise ExportError(
            f"rope_parameters of layers with a sliding window are {_short(parameters)}; only "
            "rope_type 'default' can be exported"
        )
    return _number(parameters, "rope_theta", above=1.0)


def rope_type(config: Any) -> str:
    """Name of the scaling, ``default`` where there is none.

    Raises:
        ExportError: see ``rope_parameters``.
    """
    return str(rope_parameters(config).get("rope_type") or "default")


def rope_scaling(config: Any, dimensions: int) -> RopeScaling:
    """What a GGUF file says of the scaling of ``config``, whose heads turn ``dimensions`` (R).

    Raises:
        ExportError: a kind of scaling that GGUF does not have, or invalid parameters.
    """
    kind, parameters = rope_type(config), rope_parameters(config)
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        factor = _number(parameters, "factor", above=0.0)
        return RopeScaling({"rope.scaling.type": "linear", "rope.scaling.factor": factor})
    if kind == "llama3":
        return RopeScaling(tensors={"rope_freqs.weight": _llama3_factors(config, dimensions)})
    if kind == "longrope":
        return _longrope(config, dimensions)
    if kind == "yarn":
        return _yarn(parameters)
    raise ExportError(
        f"rope_type {kind!r} cannot be exported; default, linear, llama3, longrope and yarn can"
    )


def _llama3_factors(config: Any, dimensions: int) -> NDArray[np.float32]:
    """Llama 3.1's rule: stretch long waves by ``factor``, keep short ones, mix those between."""
    parameters = rope_parameters(config)
    factor = _number(parameters, "factor", above=0.0)
    low = _number(parameters, "low_freq_factor", above=0.0)
    high = _number(parameters, "high_freq_factor", above=low)
    original = _number(parameters, "original_max_position_embeddings", above=0.0)
    exponents = np.arange(0, dimensions, 2, dtype=np.float64) / dimensions
    waves = original / (2 * math.pi * rope_theta(config) ** exponents)  # in the original context
    kept = np.clip((waves - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - kept) / factor + kept)).astype(np.float32)


def _longrope(config: Any, dimensions: int) -> RopeScaling:
    parameters = rope_parameters(config)
    original = int(_number(parameters, "original_max_position_embeddings", above=1.0))
    tensors = {}
    for name in ("long", "short"):
        factors = parameters.get(f"{name}_factor")
        values = np.asarray(factors if isinstance(factors, list) else [], dtype=np.float32)
        valid = bool(np.isfinite(values).all() and (values > 0).all())
        if values.shape != (dimensions // 2,) or not valid:
            raise ExportError(
                f"{name}_factor of rope_parameters is {_short(factors)}; {dimensions // 2} "
                "positive numbers are needed"
            )
        tensors[f"rope_factors_{name}.weight"] = values
    if parameters.get("attention_factor") is not None:
        scale = _number(parameters, "attention_factor", above=0.0)
    else:
        stretch = config.max_position_embeddings / original
        if parameters.get("factor") is not None:
            stretch = _number(parameters, "factor", above=0.0)
        scale = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    keys = {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": scale}
    return RopeScaling(keys, tensors)


def _yarn(parameters: Mapping[str, Any]) -> RopeScaling:
    factor = _number(parameters, "factor", above=0.0)
    original = int(_number(parameters, "original_max_position_embeddings", above=0.0))
    for name, usual in YARN_BETAS.items():
        if (parameters.get(name) or usual) != usual:
            raise ExportError(
                f"{name} of rope_parameters is {parameters[name]!r}; yarn is exported with "
                f"{usual:g}"
            )
    if not parameters.get("truncate", True):
        raise ExportError(
            "truncate of rope_parameters is False; yarn is exported with rounded limits alone"
        )
    own = _magnitude(factor, 1.0)  # what llama.cpp multiplies cosine and sine by of its own accord
    if parameters.get("attention_factor") is not None:
        scale = _number(parameters, "attention_factor", above=0.0)
    elif parameters.get("mscale") and parameters.get("mscale_all_dim"):
        over, under = (
            _number(parameters, name, above=0.0) for name in ("mscale", "mscale_all_dim")
        )
        scale = _magnitude(factor, over) / _magnitude(factor, under)
    else:
        scale = own
    values: dict[str, str | int | float] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": original,
    }
    if not math.isclose(scale, own, rel_tol=1e-6):
        values["rope.scaling.attn_factor"] = scale / own
    return RopeScaling(values)


def _magnitude(factor: float, weight: float) -> float:
    """How much attention is sharpened for a context ``factor`` times as long (Peng et al. 2023)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _number(parameters: Mapping[str, Any], name: str, *, above: float) -> float:
    value: Any = parameters.get(name)
    if type(value) not in (int, float) or not math.isfinite(value) or not value > above:
        raise ExportError(
            f"{name} of rope_parameters is {_short(value)}; a number above {above:g} is needed"
        )
    return float(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
