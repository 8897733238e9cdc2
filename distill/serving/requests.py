"""What a client may ask of the worker; it is untrusted, and a request that is none would end the
worker."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from teachers.llama_cpp.wire import unpack_ragged
from teachers.remote.answers import answer_limit, rows_wanted
from teachers.remote.protocol import MAX_ANSWER_BYTES, MAX_SEQUENCES, Arrays, Model
from teachers.targets.recipe import Recipe
from teachers.targets.state_codec import PARTS, Basis


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _Tokenize(_Message):
    texts: Annotated[list[str], Field(max_length=MAX_SEQUENCES)]
    add_special: bool
    parse_special: bool


class _Detokenize(_Message):
    pass


class _Sampling(_Message):
    temperature: Annotated[float, Field(ge=0.0, le=1e6)]
    top_p: Annotated[float, Field(gt=0.0, le=1.0)]
    max_length: Annotated[int, Field(ge=2)]
    seed: Annotated[int, Field(ge=0, lt=1 << 63)]


class _Scored(_Message):
    recipe: dict[str, Any] | None = None


class _Generate(_Scored):
    sampling: _Sampling
    first_index: Annotated[int, Field(ge=0, lt=1 << 62)]


class _Score(_Scored):
    recipe: dict[str, Any]


class _Logits(_Message):
    exact: bool


class _States(_Logits):
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=1 << 10)]


class _Speed(_Message):
    prompt_tokens: Annotated[int, Field(ge=1)]
    new_tokens: Annotated[int, Field(ge=1)]


MESSAGES: dict[str, type[_Message]] = {
    "tokenize": _Tokenize,
    "detokenize": _Detokenize,
    "generate": _Generate,
    "score": _Score,
    "states": _States,
    "logits": _Logits,
    "speed": _Speed,
}
SEQUENCES = {"detokenize": "tokens", "generate": "segments"} | dict.fromkeys(
    ("score", "states", "logits"), "tokens"
)


def require_valid(operation: str, message: dict[str, Any], arrays: Arrays, model: Model) -> None:
    """Check a request.

    Raises:
        ValueError: it is none, or asks for too much; in a line.
    """
    parse(MESSAGES[operation], message)
    known = _require_sequences(operation, message, arrays, model)
    if message.get("recipe") is not None:
        try:
            recipe = Recipe.from_json(message["recipe"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"recipe that is none ({error})") from None
        if (
            max(recipe.num_topk, recipe.sketch_bytes, recipe.layer_bytes)
            > model.vocab_size + model.width
        ):
            raise ValueError(f"recipe of more than the teacher has: {recipe}")
        _require_layers(recipe.layers, model)
        for name in [
            *(["final"] if recipe.has_sketch else []),
            *(f"layer{i}" for i in recipe.layers),
        ]:
            known |= _require_basis(name, arrays, model.width)
    if operation == "states":
        _require_layers(message["layers"], model)
    if (
        operation == "speed"
        and message["prompt_tokens"] + message["new_tokens"] > model.context_length
    ):
        raise ValueError(f"more tokens than the context of {model.context_length}")
    if unknown := arrays.keys() - known:
        raise ValueError(f"arrays that {operation} does not take: {sorted(unknown)[:3]}")
    if operation not in ("tokenize", "detokenize"):
        size = answer_limit(operation, message, arrays, model)
        if size > MAX_ANSWER_BYTES:
            raise ValueError(
                f"answer of up to {size} bytes, more than {MAX_ANSWER_BYTES}; ask for less"
            )


def parse(kind: type[BaseModel], content: Any) -> Any:
    """``content`` as ``kind``.

    Raises:
        ValueError: it is none; names the first place, not what is there.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None


def _require_sequences(
    operation: str, message: dict[str, Any], arrays: Arrays, model: Model
) -> set[str]:
    """Check token sequences and masks; returns the names of their arrays."""
    if operation not in SEQUENCES:
        return set()
    name = SEQUENCES[operation]
    sequences = _ragged(name, arrays)
    known = {name, f"{name}_lengths"}
    for tokens in sequences:
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < model.vocab_size:
            raise ValueError(f"token id outside the vocabulary of {model.vocab_size}")
    lengths = [len(tokens) for tokens in sequences]
    longest = model.context_length + 1  # the last one is never fed
    if operation == "generate":
        longest, counts = message["sampling"]["max_length"], _integers("segment_counts", arrays)
        if longest > model.context_length:
            raise ValueError(f"max_length {longest} of a context of {model.context_length}")
        if (
            not counts.size
            or counts.min() < 1
            or int(counts.clip(max=len(lengths) + 1).sum()) != len(lengths)
        ):
            raise ValueError("segments that are not as many as segment_counts say")
        starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
        if min(lengths[start] for start in starts.tolist()) < 1:
            raise ValueError("a prompt without a token")
        known |= {"segment_counts"}
        count = len(counts)
    else:
        count = len(sequences)
        if operation != "detokenize" and min(lengths, default=0) < 2:
            raise ValueError("a sequence of fewer than 2 tokens")
    if max(lengths, default=0) > longest:
        raise ValueError(f"{max(lengths)} tokens in a sequence; {longest} at most")
    if operation != "detokenize" and "keep" in arrays:
        masks = _ragged("keep", arrays)
        if len(masks) != count or any(((mask != 0) & (mask != 1)).any() for mask in masks):
            raise ValueError("keep that is no mask of these sequences")
        known |= {"keep", "keep_lengths"}
        if operation != "generate" and rows_wanted(arrays, "tokens") == 0:
            raise ValueError("keep that wants nothing")
    return known


def _ragged(name: str, arrays: Arrays) -> list[Any]:
    lengths = _integers(f"{name}_lengths", arrays)
    values = arrays.get(name)
    if values is None or values.dtype != np.int32 or values.ndim != 1:
        raise ValueError(f"{name} that is not int32 [n]")
    if len(lengths) > MAX_SEQUENCES:
        raise ValueError(f"{len(lengths)} sequences; {MAX_SEQUENCES} at most")
    total = int(lengths.clip(max=len(values) + 1).sum()) if lengths.size else 0
    if lengths.min(initial=0) < 0 or total != len(values):
        raise ValueError(f"{name} that is not as long as {name}_lengths say")
    return unpack_ragged(arrays, name)


def _integers(name: str, arrays: Arrays) -> Any:
    values = arrays.get(name)
    if values is None or values.dtype != np.int64 or values.ndim != 1:
        raise ValueError(f"{name} that is not int64 [n]")
    return values


def _require_layers(layers: tuple[int, ...] | list[int], model: Model) -> None:
    if layers and max(layers) >= model.layers:
        raise ValueError(f"layer {max(layers)}; the teacher has 0 to {model.layers - 1}")


def _require_basis(name: str, arrays: Arrays, width: int) -> set[str]:
    """Check the code of a hidden state (``teachers.targets.state_codec.Basis``); its arrays."""
    if missing := [part for part in PARTS if f"{name}_{part}" not in arrays]:
        raise ValueError(f"no {name}_{missing[0]}")
    if len(Basis.from_arrays(arrays, name).mean) != width:
        raise ValueError(f"{name}_mean of another width than {width}")
    return {f"{name}_{part}" for part in (*PARTS, "signed")} & arrays.keys()
