"""A transformers model speaks: sequences decoded together over one key-value cache.

The first segments are fed in one pass, padded on the left; after that every sequence takes one
token per step, forced or chosen. So distances in the cache are distances in the text, which
sliding-window attention relies on. Letters: S sequences decoded together, L tokens of one pass, C
tokens in the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teachers.base import Sampling, Tokens
from teachers.sampling import Speech, sample_rows

PARALLEL_SEQUENCES = 128
CACHE_BYTES = 2 << 30  # the KV cache stays below this (one sequence always fits)
PADDING = 0  # any token: its place is masked


class SpeechError(ValueError):
    """The model cannot speak: it keeps no key-value cache, or its logits are not finite."""


class Decoder:
    """A model and its cache: S sequences, fed L tokens at a time."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.accepted = set(inspect.signature(model.forward).parameters)
        if "past_key_values" not in self.accepted:
            raise SpeechError(
                f"a {model.config.model_type} model keeps no key-value cache and cannot speak "
                "here; give it text "
                "(--data) to score instead"
            )
        self.cache: Any = None
        self.mask = torch.zeros(0)  # [S, C], int64, on the model's device

    @torch.no_grad()
    def feed(self, tokens: Tensor, mask: Tensor) -> NDArray[np.float32]:
        """Feed ``tokens [S, L]`` where ``mask [S, L]`` is 1; logits after the last of them, ``[S,
        V]``.

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
            raise SpeechError("the teacher's logits are not finite; its weights are damaged")
        return logits.cpu().numpy()

    def keep(self, rows: list[int]) -> None:
        """Forget all sequences but these."""
        index = torch.tensor(rows, device=self.model.device)
        self.cache.reorder_cache(index)  # which every kind of cache can do, and fewer rows are fine
        self.mask = self.mask[index]


def speak(
    model: Any,
    requests: Sequence[Sequence[Tokens]],
    sampling: Sampling,
    *,
    first_index: int,
    end_tokens: Collection[int],
    progress: Callable[[int], None],
) -> list[Tokens]:
    """Write one sequence per request, forced and written tokens together (see
    ``teachers.llama_cpp.generation``).

    ``progress`` gets the number of finished sequences.

    Raises:
        SpeechError: the model keeps no key-value cache, or its logits are not finite.
        ValueError: a request without forced tokens.
    """
    speeches = [
        Speech.begin(request, sampling, first_index + index)
        for index, request in enumerate(requests)
    ]
    together = _parallel(model, sampling.max_length)
    for start in range(0, len(speeches), together):
        group = speeches[start : start + together]
        open_ones = [speech for speech in group if not speech.finished]
        for _ in _write(Decoder(model), open_ones, sampling, end_tokens):
            progress(start + sum(speech.finished for speech in group))
    return [np.array(speech.tokens, dtype=np.int32) for speech in speeches]


def _write(
    decoder: Decoder, speeches: list[Speech], sampling: Sampling, end_tokens: Collection[int]
) -> Iterator[None]:
    """Write all of ``speeches`` to their ends; yields after each step in which some ended."""
    if not speeches:
        return
    tokens, mask = _left_padded([speech.tokens for speech in speeches])
    for speech in speeches:
        speech.fed = len(speech.tokens)
    while True:
        logits = decoder.feed(tokens, mask)
        ended = _choose(speeches, logits, sampling, end_tokens)
        if ended:
            yield
        going = [row for row, speech in enumerate(speeches) if not speech.finished]
        if not going:
            return
        if 2 * len(going) <= len(
            speeches
        ):  # copying the cache costs less than carrying the ended ones
            decoder.keep(going)
            speeches = [speeches[row] for row in going]
        fed = [PADDING if speech.finished else speech.tokens[speech.fed] for speech in speeches]
        tokens, mask = torch.tensor(fed)[:, None], torch.ones(len(fed), 1, dtype=torch.int64)
        for speech in speeches:
            speech.fed += not speech.finished


def _choose(
    speeches: list[Speech],
    logits: NDArray[np.float32],
    sampling: Sampling,
    end_tokens: Collection[int],
) -> bool:
    """Give every sequence that has been fed whole its next token; returns whether one ended."""
    rows = [row for row, speech in enumerate(speeches) if speech.wants_token]
    if not rows:
        return False
    draws = np.array([speeches[row].random.random() for row in rows])
    for row, token in zip(rows, sample_rows(logits[rows], draws, sampling).tolist(), strict=True):
        speeches[row].take(token, end_tokens)
    return any(speeches[row].finished for row in rows)


def _left_padded(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens and mask, both int64 ``[S, L]``, the sequences' ends flush."""
    longest = max(len(tokens) for tokens in sequences)
    tokens = torch.full((len(sequences), longest), PADDING, dtype=torch.int64)
    mask = torch.zeros(len(sequences), longest, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        tokens[row, longest - len(sequence) :] = torch.tensor(sequence)
        mask[row, longest - len(sequence) :] = 1
    return tokens, mask


def _parallel(model: Any, max_length: int) -> int:
    """How many sequences to decode together."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    return max(1, min(PARALLEL_SEQUENCES, CACHE_BYTES // (token_bytes * max_length)))
