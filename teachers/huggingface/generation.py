"""Generation by a transformers model: sequences decoded together over one key-value cache.

The first segments are fed in one pass, padded on the left; after that every sequence takes one
token per step, forced or chosen. So distances in the cache are distances in the text, which
sliding-window attention relies on. Letters: S sequences decoded together, L tokens of one pass, C
tokens in the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teachers.base import GenerationRequest, Progress, Sampling, Tokens
from teachers.huggingface.device import cache_room, free_bytes
from teachers.huggingface.model import PADDING, padded
from teachers.sampling import PartialSequence, choose, started

PARALLEL_SEQUENCES = 128


class GenerationError(ValueError):
    """The model cannot generate: it keeps no key-value cache, or its logits are not finite."""


class Decoder:
    """A model and its cache: S sequences, fed L tokens at a time."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.accepted = set(inspect.signature(model.forward).parameters)
        if "past_key_values" not in self.accepted:
            raise GenerationError(
                f"a {model.config.model_type} model keeps no key-value cache and cannot generate "
                "here; give it text (--data) to score instead"
            )
        self.cache: Any = None
        self.mask = torch.zeros(0)  # [S, C], int64, on the model's device

    @torch.no_grad()
    def feed(self, tokens: Tensor, mask: Tensor) -> NDArray[np.float32]:
        """Feed ``tokens [S, L]`` where ``mask [S, L]`` is 1; the last one's logits, ``[S, V]``.

        Raises:
            SpeechError: a logit is NaN or +∞.
        """
        mask = mask.to(self.model.device)
        self.mask = mask if self.cache is None else torch.cat((self.mask, mask), dim=-1)
        positions = (self.mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        optional = {"position_ids": positions, "logits_to_keep": 1}
        output = self.model(
            input_ids=tokens.to(self.model.device),
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self.accepted},
        )
        self.cache = output.past_key_values
        logits = output.logits[:, -1].float()
        if bool((torch.isnan(logits) | torch.isposinf(logits)).any()):
            raise GenerationError("the teacher's logits are not finite; its weights are damaged")
        return logits.cpu().numpy()

    def keep(self, rows: list[int]) -> None:
        """Forget all sequences but these."""
        index = torch.tensor(rows, device=self.model.device)
        self.cache.reorder_cache(index)  # which every kind of cache can do, and fewer rows are fine
        self.mask = self.mask[index]


def generate(
    model: Any,
    request: GenerationRequest,
    end_tokens: Collection[int],
    progress: Progress,
    most: int | None = None,
) -> list[Tokens]:
    """Write the sequences of a request, at most ``most`` together; ``progress``: see
    ``Teacher.generate``.

    Raises:
        GenerationError: the model keeps no key-value cache, or its logits are not finite.
        ValueError: a prompt without forced tokens.
    """
    partials = started(request)
    longest = request.sampling.max_length
    together = min(_parallel(model, longest), most or PARALLEL_SEQUENCES)
    for start in range(0, len(partials), together):
        group = partials[start : start + together]
        going = [partial for partial in group if not partial.finished]
        for _ in _write(Decoder(model), going, request.sampling, end_tokens):
            done = sum(longest if one.finished else len(one.tokens) for one in group)
            progress(start + done / longest)
    return [np.array(partial.tokens, dtype=np.int32) for partial in partials]


def _write(
    decoder: Decoder,
    partials: list[PartialSequence],
    sampling: Sampling,
    end_tokens: Collection[int],
) -> Iterator[None]:
    """Write all of ``partials`` to their ends; yields after each step."""
    if not partials:
        return
    tokens, mask = padded([partial.tokens for partial in partials], left=True)
    for partial in partials:
        partial.fed = len(partial.tokens)
    while True:
        logits = decoder.feed(tokens, mask)
        rows = [row for row, partial in enumerate(partials) if partial.wants_token]
        chosen = [partials[row] for row in rows]
        choose(chosen, logits[rows], sampling, end_tokens)
        yield
        going = [row for row, partial in enumerate(partials) if not partial.finished]
        if not going:
            return
        # Copying the cache costs less than carrying the ended ones, once they are half.
        if 2 * len(going) <= len(partials):
            decoder.keep(going)
            partials = [partials[row] for row in going]
        fed = [PADDING if partial.finished else partial.tokens[partial.fed] for partial in partials]
        tokens, mask = torch.tensor(fed)[:, None], torch.ones(len(fed), 1, dtype=torch.int64)
        for partial in partials:
            partial.fed += not partial.finished


def _parallel(model: Any, max_length: int) -> int:
    """How many sequences to decode together."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    fitting = cache_room(free_bytes(model.device)) // (token_bytes * max_length)
    return max(1, min(PARALLEL_SEQUENCES, fitting))
