"""What ``distill serve`` and its clients say to each other beside OpenAI's own routes.

``GET /distill/v1/teacher`` answers with JSON (``Facts``), ``GET /distill/v1/vocabulary`` with a
GGUF file: the teacher's without its layers. ``POST /distill/v1/<operation>`` takes a body of
safetensors: arrays, and among them ``message``, the bytes of a JSON object. It answers with lines
of JSON, ``{"progress": …}`` as a sign of life, then ``{"bytes": n}`` and n bytes of safetensors, or
``{"error": "…"}``.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, NoReturn

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError

ROOT = "/distill/v1"
VERSION = 1
OPERATIONS = ("tokenize", "detokenize", "generate", "score", "states", "logits", "speed")
HEARTBEAT_SECONDS = 2.0
MAX_BODY_BYTES = 64 << 20  # of a request
MAX_ANSWER_BYTES = 1 << 30  # of logits and hidden states
MAX_SEQUENCES = 1 << 16  # in one request
MESSAGE = "message"

Arrays = dict[str, NDArray[np.generic]]
Count = Annotated[int, Field(ge=1, le=1 << 62)]
Size = Annotated[int, Field(ge=1, le=1 << 24)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class Model(_Strict):
    """What llama.cpp says of the model; token ids that it does not have are −1."""

    vocab_size: Size
    width: Size
    layers: Size
    context_length: Size
    bos: Annotated[int, Field(ge=-1)]
    eos: Annotated[int, Field(ge=-1)]
    end_tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=1 << 10)]
    add_bos: bool


class Vocabulary(_Strict):
    """The file that ``/distill/v1/vocabulary`` gives."""

    bytes: Annotated[int, Field(ge=24, le=1 << 36)]
    sha256: Digest


class Facts(_Strict):
    """What a server says of its teacher that is not in the file of its vocabulary."""

    version: int
    runtime: Annotated[str, Field(max_length=500)]
    sha256: Digest
    parameters: Count
    file_bytes: Count
    model: Model
    vocabulary: Vocabulary


def pack(message: dict[str, Any], arrays: Arrays | None = None) -> bytes:
    """A message and arrays as one body."""
    text = np.frombuffer(json.dumps(message).encode("ascii"), dtype=np.uint8)
    named = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    return bytes(safetensors.numpy.save({**named, MESSAGE: text}))


def unpack(body: bytes) -> tuple[dict[str, Any], Arrays]:
    """The inverse of ``pack``.

    Raises:
        ValueError: this is something else.
    """
    try:
        arrays: Arrays = safetensors.numpy.load(body)
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"a body that is no safetensors ({error})") from None
    if MESSAGE not in arrays:
        raise ValueError(f"a body without {MESSAGE!r}")
    message = parse_json(arrays.pop(MESSAGE).tobytes())
    if not isinstance(message, dict):
        raise ValueError(f"{MESSAGE!r} is no JSON object")
    return message, arrays


def parse_json(text: bytes) -> Any:
    """JSON from elsewhere.

    Raises:
        ValueError: it is none, is nested too deeply, or has a number that is not finite.
    """
    try:
        return json.loads(text, parse_constant=_not_finite)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def _not_finite(name: str) -> NoReturn:
    raise ValueError(f"JSON with the number {name}")
