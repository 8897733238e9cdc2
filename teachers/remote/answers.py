"""What a server may answer to a request: names, types and shapes of arrays, numbers in range.

Letters: N rows that are asked for, V vocabulary, D width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teachers.base import whole_masks
from teachers.llama_cpp.wire import unpack_ragged
from teachers.remote.protocol import Arrays, Model
from teachers.targets.recipe import NODES, TINY_VOCABULARY, Recipe

SPARE_BYTES = 1 << 20  # of an answer beside its arrays
CHARACTER_BYTES, TOKEN_CHARACTERS = 12, 1 << 10  # of JSON; of the longest token

Shapes = dict[str, tuple[type[np.generic], tuple[int, ...]]]
"""Type and shape of a row of each array."""


def row_shapes(operation: str, message: dict[str, Any], arrays: Arrays, model: Model) -> Shapes:
    """What the answer holds of each row; nothing where it has none."""
    if operation in ("score", "generate") and message.get("recipe") is not None:
        return _recipe_shapes(Recipe.from_json(message["recipe"]), arrays, model)
    if operation == "logits":
        return {"logits": (np.float32, (model.vocab_size,))}
    if operation == "states":
        names = ["final", *(f"layer{layer}" for layer in message["layers"])]
        return dict.fromkeys(names, (np.float32, (model.width,)))
    return {}


def _recipe_shapes(recipe: Recipe, arrays: Arrays, model: Model) -> Shapes:
    count = min(recipe.num_topk, model.vocab_size)
    ids: type[np.generic] = np.uint16 if model.vocab_size <= TINY_VOCABULARY else np.int32
    kinds: dict[str, Shapes] = {
        "compact": {
            "topk_ids": (ids, (count,)),
            "topk_logits": (np.float16, (count,)),
            "tail": (np.float32, (len(NODES),)),
        },
        "hidden": {"hidden": (np.int8, (model.width,)), "hidden_scale": (np.float32, ())},
        "dense": {"logits": (np.float32, (model.vocab_size,))},
    }
    shapes = kinds[recipe.kind]
    coded = {"sketch": "final"} if recipe.has_sketch else {}
    for name, basis in (coded | {f"layer{one}": f"layer{one}" for one in recipe.layers}).items():
        bits = int(arrays[f"{basis}_bits"].sum(dtype=np.int64))
        shapes[name] = (np.uint8, (-(-bits // 8),))
        shapes[f"{name}_scale"] = (np.float16, ())
    return shapes


def answer_limit(operation: str, message: dict[str, Any], arrays: Arrays, model: Model) -> int:
    """Bytes that the answer has at most."""
    shapes = row_shapes(operation, message, arrays, model)
    row = sum(np.dtype(kind).itemsize * math.prod(shape) for kind, shape in shapes.values())
    if operation == "generate":
        longest = len(arrays["segment_counts"]) * message["sampling"]["max_length"]
        return SPARE_BYTES + longest * (row + 4)
    if operation == "tokenize":
        # Of a byte there is one token at most; a few more may be added.
        return SPARE_BYTES + sum(
            4 * len(text.encode("utf-8", "replace")) + 64 for text in message["texts"]
        )
    if operation == "detokenize":
        characters = TOKEN_CHARACTERS * len(arrays["tokens"])
        return SPARE_BYTES + CHARACTER_BYTES * characters
    return SPARE_BYTES + row * (0 if "tokens" not in arrays else rows_wanted(arrays, "tokens"))


def rows_wanted(arrays: Arrays, name: str, keep: Arrays | None = None) -> int:
    """N of the sequences in ``arrays``, of which the masks in ``keep`` (or there) want some."""
    sequences, keep = unpack_ragged(arrays, name), arrays if keep is None else keep
    masks = (
        [mask.astype(np.bool_) for mask in unpack_ragged(keep, "keep")] if "keep" in keep else None
    )
    return int(sum(mask.sum() for mask in whole_masks(sequences, masks)))


def require_right(
    operation: str,
    request: tuple[dict[str, Any], Arrays],
    answer: tuple[dict[str, Any], Arrays],
    model: Model,
) -> None:
    """Check an answer.

    Raises:
        ValueError: it is none to this request.
    """
    (message, arrays), (said, given) = request, answer
    shapes, named = row_shapes(operation, message, arrays, model), set()
    rows = 0
    if operation in ("tokenize", "generate"):
        named = {"tokens", "tokens_lengths"}
        count = len(message["texts"] if operation == "tokenize" else arrays["segment_counts"])
        _require_tokens(given, count, model.vocab_size)
    if operation == "generate":
        longest = int(given["tokens_lengths"].max(initial=2))
        if (
            not 2
            <= int(given["tokens_lengths"].min(initial=2))
            <= longest
            <= message["sampling"]["max_length"]
        ):
            raise ValueError("sequences of another length than was asked for")
        rows = rows_wanted(given, "tokens", arrays) if shapes else 0
    elif shapes:
        rows = rows_wanted(arrays, "tokens")
    if given.keys() != shapes.keys() | named:
        raise ValueError(f"the arrays {sorted(given)} instead of {sorted(shapes.keys() | named)}")
    for name, (kind, shape) in shapes.items():
        _require_rows(name, given[name], np.dtype(kind), (rows, *shape))
    if "topk_ids" in given and given["topk_ids"].max(initial=0) >= model.vocab_size:
        raise ValueError(f"a token id of {given['topk_ids'].max()} of {model.vocab_size}")
    if operation == "detokenize":
        texts = said.get("texts")
        some = texts if isinstance(texts, list) else []
        count = sum(isinstance(text, str) for text in some)
        if not len(some) == count == len(arrays["tokens_lengths"]):
            raise ValueError("texts that are none of these tokens")
    if operation == "speed":
        for name in ("prompt", "generation"):
            if type(said.get(name)) not in (int, float) or not 0 < said[name] < math.inf:
                raise ValueError(f"a {name} speed of {said.get(name)!r}")


def _require_tokens(given: Arrays, count: int, vocab_size: int) -> None:
    tokens, lengths = given.get("tokens"), given.get("tokens_lengths")
    if tokens is None or lengths is None:
        raise ValueError("no tokens")
    _require_rows("tokens_lengths", lengths, np.dtype(np.int64), (count,))
    total = int(lengths.clip(0, len(tokens) + 1).sum())
    if lengths.min(initial=0) < 0 or total != tokens.size:
        raise ValueError("tokens that are not as long as their lengths say")
    _require_rows("tokens", tokens, np.dtype(np.int32), (total,))
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(f"token ids outside the vocabulary of {vocab_size}")


def _require_rows(
    name: str, array: NDArray[Any], kind: np.dtype[Any], shape: tuple[int, ...]
) -> None:
    if array.dtype != kind or array.shape != shape:
        raise ValueError(
            f"{name} {array.dtype} {list(array.shape)} instead of {kind} {list(shape)}"
        )
    if kind.kind != "f":
        return
    wrong = np.isnan(array) | np.isposinf(array)
    if name not in ("tail", "logits"):  # there −∞ is a token, or a tail, without any probability
        wrong |= np.isneginf(array)
    if wrong.any():
        raise ValueError(f"{name} with numbers that are not finite")
