"""What the rest of the project may ask of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from teachers.targets.distributions import Arrays
    from teachers.targets.recipe import Recipe
    from teachers.targets.state_codec import Basis


Tokens = NDArray[np.int32]
Floats = NDArray[np.float32]
Progress = Callable[[float], None]


def no_progress(done: float) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Sampling:
    """How the teacher picks tokens: temperature and nucleus (``top_p`` 1 keeps everything)."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_length: int = 256
    seed: int = 0


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to write per prompt, forced and generated tokens together.

    A prompt is a list of forced segments. After each one the teacher writes until it ends its turn;
    the next segment then stands in place of its end-of-turn token (a chat template's text between
    two turns carries that token itself). Sequence i draws from random stream ``first_index + i`` of
    the seed, so it does not depend on what it is batched with.
    """

    prompts: Sequence[Sequence[Tokens]]
    sampling: Sampling
    first_index: int = 0


MAX_COUNT = 1 << 20  # heads or widths that a real model may have
BOUNDS = {"rope_theta": (1.0, 1e12), "rms_norm_eps": (1e-30, 0.1)}


@dataclass(frozen=True)
class TeacherShape:
    """The proportions of a teacher's layers, the same in all of them; ``None``: not known."""

    heads: int | None = None
    kv_heads: int | None = None
    head_width: int | None = None
    ffn_width: int | None = None
    rope_theta: float | None = None
    rms_norm_eps: float | None = None

    @classmethod
    def from_untrusted(cls, **stated: object) -> TeacherShape:
        """A shape from a file's values; what no model has (or has per layer) counts as unknown."""
        return cls(**{name: _plausible(name, value) for name, value in stated.items()})


def _plausible(name: str, value: object) -> Any:
    if name not in BOUNDS:
        return value if type(value) is int and 1 <= value <= MAX_COUNT else None
    if type(value) is not int and type(value) is not float:  # a bool is an int to isinstance
        return None
    least, most = BOUNDS[name]
    return float(value) if least <= value <= most else None


@dataclass(frozen=True)
class TeacherInfo:
    """Facts about a teacher; token ids it does not have are ``None``.

    ``end_tokens``: those with which it ends its turn. ``shape``: of its layers, if known.
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
    shape: TeacherShape = TeacherShape()


@dataclass(frozen=True)
class TokenizedLines:
    """Texts and the teacher's own ids for them (control tokens parsed, BOS as it wants)."""

    texts: list[str]
    tokens: list[Tokens]


Self = TypeVar("Self", bound="Teacher")


class Teacher(Protocol):
    """A language model that tokenizes, generates, and gives the probability of every next token.

    Letters: N positions over all sequences together (a sequence of n tokens has n − 1), V
    vocabulary, D width.
    """

    info: TeacherInfo

    @property
    def runtime(self) -> str:
        """What computes the answers, as far as their last bits depend on it."""
        ...

    def tokenize(
        self, texts: Sequence[str], *, add_special: bool, parse_special: bool
    ) -> list[Tokens]:
        """Token ids of each text."""
        ...

    def detokenize(self, sequences: Sequence[Tokens]) -> list[str]:
        """The text of each token sequence, control tokens written out."""
        ...

    def generate(
        self, request: GenerationRequest, progress: Progress = no_progress
    ) -> list[Tokens]:
        """Write one sequence per prompt; ``progress`` counts sequences, an unfinished one by its
        share of ``max_length`` tokens."""
        ...

    def generate_and_score(
        self,
        request: GenerationRequest,
        recipe: Recipe,
        bases: Mapping[str, Basis],
        progress: Progress = no_progress,
    ) -> tuple[list[Tokens], Arrays]:
        """``generate``, and ``score`` of the result: here in two passes, each half of ``progress``;
        a teacher that can do both in one overrides it."""
        sequences = self.generate(request, lambda done: progress(done / 2))
        total, count = sum(len(tokens) - 1 for tokens in sequences), len(sequences)

        def scored(positions: float) -> None:
            progress(count * (1 + positions / max(1, total)) / 2)

        return sequences, self.score(sequences, recipe, bases, scored)

    def score(
        self,
        sequences: Sequence[Tokens],
        recipe: Recipe,
        bases: Mapping[str, Basis],
        progress: Progress = no_progress,
    ) -> Arrays:
        """What ``recipe`` keeps of all positions, as the arrays of a store, ``[N, …]``.

        ``bases``: how hidden states are encoded, ``final`` and ``layer<i>``, where the recipe needs
        them.
        """
        ...

    def states(
        self, sequences: Sequence[Tokens], layers: Sequence[int] = ()
    ) -> Mapping[str, Floats]:
        """Hidden states ``[N, D]``: ``final`` (after the last norm) and ``layer<i>``."""
        ...

    def output_rows(self, start: int, stop: int) -> Floats:
        """Rows ``[stop − start, D]`` of the matrix whose transpose turns final states into logits.

        Raises:
            ValueError: the teacher's output is not one matrix.
        """
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

    def memory(self) -> int:
        """Bytes of main memory that the teacher's process takes at present."""
        ...

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class ProcessRank:
    """This process's place in a launch: it writes the shards s with s mod ``world`` = ``rank``."""

    rank: int = 0
    world: int = 1


SINGLE_PROCESS = ProcessRank()


def budget_slices(sizes: Sequence[int], budget: int) -> Iterator[slice]:
    """Slices of consecutive items whose ``sizes`` sum to ``budget`` at most; one item at least."""
    start = used = 0
    for index, size in enumerate(sizes):
        if index > start and used + size > budget:
            yield slice(start, index)
            start, used = index, 0
        used += size
    if sizes:
        yield slice(start, len(sizes))
