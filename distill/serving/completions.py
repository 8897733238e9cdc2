"""``POST /v1/completions``: log-probabilities of a prompt's tokens, as vLLM gives them.

Letters: N positions, V vocabulary, K tokens asked for.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from distill.serving.engine import Engine
from teachers.base import Tokens, budget_slices
from teachers.llama_cpp.wire import pack_ragged
from teachers.targets.distributions import CompactTargets
from teachers.targets.recipe import NODES

LOGITS_BYTES = 256 << 20  # held at once
MOST_TOPK = 1024
MOST_ENTRIES = 1 << 21  # of all positions together: about 200 MB of JSON
LEAST_LOGPROB = -9999.0  # vLLM's, for a token without any probability

Token = Annotated[int, Field(ge=0, lt=1 << 31)]


class CompletionRequest(BaseModel):
    """What is understood of OpenAI's request; all else is refused, as it would be ignored."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    prompt: list[Token] | list[list[Token]]
    max_tokens: Literal[0, 1]
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_TOPK)] | None = None
    model: str | None = None
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    n: Literal[1] = 1
    stream: Literal[False] = False
    echo: Literal[False] = False
    logprobs: None = None
    seed: int | None = None
    user: str | None = None

    @property
    def prompts(self) -> list[Tokens]:
        """The prompts' tokens."""
        some = self.prompt
        nested = some if some and isinstance(some[0], list) else [some]
        return [np.array(one, dtype=np.int32) for one in nested]


def require_answerable(request: CompletionRequest, engine: Engine) -> None:
    """Check what depends on the teacher.

    Raises:
        ValueError: there are no such tokens, or too many of them.
    """
    info, prompts = engine.teacher.info, request.prompts
    if not prompts or min(len(one) for one in prompts) < 1:
        raise ValueError("prompt: there is no token; give the ids of one or several prompts")
    if max(int(one.max()) for one in prompts) >= info.vocab_size:
        raise ValueError(f"prompt: a token id outside the vocabulary of {info.vocab_size}")
    longest = max(len(one) for one in prompts) + request.max_tokens
    if longest > info.context_length:
        raise ValueError(
            f"prompt: {longest} tokens, more than the context of {info.context_length}"
        )
    if request.max_tokens and request.temperature:
        raise ValueError(
            "temperature: only 0 is known here, the most probable token; this server does not write"
        )
    if request.model not in (None, info.name):
        raise ValueError("model: another one is served here; see /v1/models")
    entries = sum(len(one) for one in prompts) * (1 + (request.prompt_logprobs or 0))
    if entries > MOST_ENTRIES:
        raise ValueError(
            f"prompt: {entries} log-probabilities, more than {MOST_ENTRIES}; ask for fewer at once"
        )


def complete(request: CompletionRequest, engine: Engine) -> dict[str, Any]:
    """The response to a request that was checked; in the engine's thread."""
    info, choices = engine.teacher.info, []
    total = 0
    for index, tokens in enumerate(request.prompts):
        total += len(tokens)
        choice: dict[str, Any] = {
            "index": index,
            "text": "",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "prompt_logprobs": None,
        }
        # What follows the last token is computed only where something follows it.
        fed = np.append(tokens, tokens[-1]).astype(np.int32) if request.max_tokens else tokens
        positions: list[dict[str, Any] | None] = [None]
        tails: list[list[float] | None] = [None]
        sums: list[float | None] = [None]
        last = None
        for start, logits in _logits(engine, fed, request.prompt_logprobs is not None):
            last = logits[-1]
            if request.prompt_logprobs is not None:
                rows = logits[: len(tokens) - 1 - start]
                following = tokens[start + 1 : start + 1 + len(rows)]
                some, tail, lse = _positions(rows, following, request.prompt_logprobs, engine)
                positions, tails, sums = positions + some, tails + tail, sums + lse
        if request.prompt_logprobs is not None:
            choice["prompt_logprobs"] = positions
            choice["distill"] = {
                "temperatures": [1.0 / node for node in NODES],
                "tail": tails,
                "logsumexp": sums,
            }
        if request.max_tokens and last is not None:
            token = int(last.argmax())
            choice["text"] = _texts([token], engine)[0]
            if token in info.end_tokens:
                choice["finish_reason"] = "stop"
        choices.append(choice)
    written = request.max_tokens * len(choices)
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": info.name,
        "choices": choices,
        "usage": {
            "prompt_tokens": total,
            "completion_tokens": written,
            "total_tokens": total + written,
        },
    }


def _logits(engine: Engine, tokens: Tokens, whole: bool) -> Iterator[tuple[int, Tensor]]:
    """Logits ``[n, V]`` of a sequence's positions, or of the last alone, as many as fit at once,
    and where they start."""
    count = len(tokens) - 1
    if count < 1:
        return
    room = max(1, LOGITS_BYTES // (4 * engine.teacher.info.vocab_size))
    first = 0 if whole else count - 1
    for part in budget_slices([1] * (count - first), room):
        start, stop = first + part.start, first + part.stop
        keep = np.zeros(count, dtype=np.int32)
        keep[start:stop] = 1
        arrays = pack_ragged([tokens], "tokens")
        if stop - start < count:
            arrays |= pack_ragged([keep], "keep")
        yield (
            start,
            torch.from_numpy(np.array(engine.ask("logits", {"exact": False}, arrays)[1]["logits"])),
        )


def _positions(
    logits: Tensor, following: Tokens, count: int, engine: Engine
) -> tuple[list[dict[str, Any] | None], list[list[float] | None], list[float | None]]:
    """Of N positions whose next tokens are ``following``: vLLM's mappings, the log of the tail's
    mass at each temperature, and log Σ exp z."""
    if not len(logits):
        return [], [], []
    wanted = torch.from_numpy(following.astype(np.int64))[:, None]
    kept = CompactTargets.from_logits(logits, max(1, count))
    ids = torch.cat((kept.topk_ids[:, :count], wanted), dim=1)
    sums = logits.logsumexp(dim=-1, keepdim=True)
    logprobs = (logits.gather(1, ids) - sums).clamp(min=LEAST_LOGPROB)
    ranks = (logits > logits.gather(1, wanted)).sum(dim=1) + 1
    unique = sorted(set(ids.flatten().tolist()))
    names = dict(zip(unique, _texts(unique, engine), strict=True))
    positions: list[dict[str, Any] | None] = []
    for row, values, rank in zip(ids.tolist(), logprobs.tolist(), ranks.tolist(), strict=True):
        places = [*range(1, len(row)), rank]
        # The prompt's own token is the last, and may be among the first: once is enough.
        entries = dict(zip(row, zip(values, places, strict=True), strict=True))
        positions.append(
            {
                str(token): {"logprob": value, "rank": place, "decoded_token": names[token]}
                for token, (value, place) in entries.items()
            }
        )
    tails: list[list[float] | None] = [*kept.tail.tolist()] if count else [None] * len(logits)
    if count >= logits.shape[-1]:
        tails = [None] * len(logits)  # there is none
    return positions, tails, [*sums[:, 0].tolist()]


def _texts(tokens: Sequence[int], engine: Engine) -> list[str]:
    single = [np.array([token], dtype=np.int32) for token in tokens]
    return list(engine.ask("detokenize", {}, pack_ragged(single, "tokens"))[0]["texts"])
