"""What the rest of the project may ask of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from teachers.soft_targets import Arrays

Tokens = NDArray[np.int32]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Sampling:
    """How the teacher picks tokens: temperature and nucleus (``top_p`` 1 keeps everything)."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_length: int = 256
    seed: int = 0


@dataclass(frozen=True)
class TeacherInfo:
    """Facts about a teacher; token ids it does not have are ``None``.

    ``end_tokens``: the tokens with which it ends its turn.
    """

    name: str
    architecture: str
    parameters: int
    file_bytes: int
    vocab_size: int
    width: int
    layers: int
    context_length: int
    bos: int | None
    eos: int | None
    end_tokens: tuple[int, ...]
    add_bos: bool
    chat_template: str | None
    sha256: str
    tokenizer_sha256: str


class Teacher(Protocol):
    """A language model that can tokenise, speak, and say how probable every next token is.

    Letters: N positions over all sequences together (a sequence of n tokens has n − 1), V vocabulary.
    """

    info: TeacherInfo

    def tokenize(self, texts: Sequence[str], *, add_special: bool, parse_special: bool) -> list[Tokens]:
        """Token ids of each text."""
        ...

    def detokenize(self, sequences: Sequence[Tokens]) -> list[str]:
        """The text of each token sequence, control tokens written out."""
        ...

    def speak(
        self,
        requests: Sequence[Sequence[Tokens]],
        sampling: Sampling,
        *,
        first_index: int = 0,
        progress: Progress = ...,
    ) -> list[Tokens]:
        """Write one sequence per request (see ``teachers.speak``); progress counts finished sequences."""
        ...

    def score(
        self, sequences: Sequence[Tokens], num_topk: int, nodes: tuple[float, ...], progress: Progress = ...
    ) -> Arrays:
        """Compact soft targets of all positions, as the arrays a store keeps, ``[N, …]``."""
        ...

    def logits(self, sequences: Sequence[Tokens], *, exact: bool = False) -> NDArray[np.float32]:
        """Every logit of all positions, ``[N, V]``; for evaluation and proof on little text."""
        ...

    def speed(self, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
        """Prompt and generation speed of one sequence, tokens per second."""
        ...

    def close(self) -> None:
        """Free everything; safe to call twice."""
        ...
