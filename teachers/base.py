"""What the rest of the project may ask of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from teachers.targets.distributions import Arrays
    from teachers.targets.recipe import Recipe
    from teachers.targets.state_codec import Basis


Tokens = NDArray[np.int32]
Floats = NDArray[np.float32]
Keep = NDArray[np.bool_]
"""Which predictions of a sequence of n tokens are wanted, ``[n − 1]``: number t is that of token
t + 1. What lies beyond the end of a shorter one is wanted."""
Progress = Callable[[float], None]


def no_progress(done: float) -> None:
    """Progress that nobody watches."""


def whole_masks(sequences: Sequence[Tokens], keep: Sequence[Keep] | None) -> list[Keep]:
    """A mask over all n − 1 predictions of each sequence; ``None``: all are wanted."""
    masks = [np.ones(len(tokens) - 1, dtype=np.bool_) for tokens in sequences]
    for mask, begun in zip(masks, keep or (), strict=keep is not None):
        mask[: len(begun)] = begun[: len(mask)]
    return masks


def last_predictions(sequences: Sequence[Tokens], count: int) -> list[Keep]:
    """Masks of at most ``count`` predictions of each sequence, those at its end."""
    return [np.arange(len(tokens) - 1) >= len(tokens) - 1 - count for tokens in sequences]


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
    the seed, so it does not depend on what it is batched with. ``keep``: of each prompt's first
    segment; what is written after it is wanted (where the sequences are scored, too).
    """

    prompts: Sequence[Sequence[Tokens]]
    sampling: Sampling
    first_index: int = 0
    keep: Sequence[Keep] | None = None


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
    """Facts about a teacher; token ids it does not have are ``None``. A server that says nothing of
    its weights leaves ``parameters``, ``width``, ``layers`` and ``file_bytes`` at 0.

    ``end_tokens``: those with which it ends its turn. ``shape``: of its layers, if known.
    ``tool_template``: chat template of conversations with tools, if that is another.
    ``template_variables``: what both were given of their own (``with_variables``).
    ``special_tokens``: texts of further tokens by the names that templates use (``unk_token``, …).
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
    tool_template: str | None = None
    template_variables: Mapping[str, Any] = field(default_factory=dict, hash=False)
    special_tokens: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class TokenizedLines:
    """Texts and the teacher's own ids for them (control tokens parsed, BOS as it wants)."""

    texts: list[str]
    tokens: list[Tokens]


Self = TypeVar("Self", bound="Teacher")


class Teacher(Protocol):
    """A language model that tokenizes, generates, and gives the probability of every next token.

    Letters: N positions over all sequences together (a sequence of n tokens has n − 1, of which
    those count that ``keep`` wants, where it is given), V vocabulary, D width.
    """

    info: TeacherInfo

    @property
    def runtime(self) -> str:
        """What computes the answers, as far as these depend on it by more than their last bits:
        not the machine, its number of threads or GPUs."""
        ...

    @property
    def truncation(self) -> str:
        """What its soft targets lack of its distributions, in words; empty: nothing."""
        return ""

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

        return sequences, self.score(sequences, recipe, bases, scored, request.keep)

    def score(
        self,
        sequences: Sequence[Tokens],
        recipe: Recipe,
        bases: Mapping[str, Basis],
        progress: Progress = no_progress,
        keep: Sequence[Keep] | None = None,
    ) -> Arrays:
        """What ``recipe`` keeps of all positions, as the arrays of a store, ``[N, …]``.

        ``bases``: how hidden states are encoded, ``final`` and ``layer<i>``, where the recipe needs
        them.
        """
        ...

    def states(
        self,
        sequences: Sequence[Tokens],
        layers: Sequence[int] = (),
        *,
        keep: Sequence[Keep] | None = None,
    ) -> Mapping[str, Floats]:
        """Hidden states ``[N, D]``: ``final`` (after the last norm) and ``layer<i>``."""
        ...

    def output_rows(self, start: int, stop: int) -> Floats:
        """Rows ``[stop − start, D]`` of the matrix whose transpose turns final states into logits.

        Raises:
            ValueError: the teacher's output is not one matrix.
        """
        ...

    def logits(
        self,
        sequences: Sequence[Tokens],
        *,
        exact: bool = False,
        keep: Sequence[Keep] | None = None,
    ) -> Floats:
        """Every logit of all positions, ``[N, V]``; for evaluation and proof on little text."""
        ...

    def product_logits(self, sequences: Sequence[Tokens]) -> Floats:
        """Logits ``[N, V]`` as they follow from final states and ``output_rows``, where what the
        teacher says is more than that."""
        return self.logits(sequences)

    def speed(self, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
        """Prompt and generation speed of one sequence, tokens per second."""
        ...

    def close(self) -> None:
        """Free everything; safe to call twice."""
        ...

    def memory(self) -> int:
        """Bytes of main memory that the teacher's process takes at present."""
        ...

    def logit_rules(self) -> Sequence[LogitRule]:
        """What may follow the product with the output matrix; a measurement decides among them."""
        return (LogitRule(),)

    def rounded_states(self, states: Floats) -> Floats:
        """Final states ``[N, D]`` as they are rounded for that product."""
        return states

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LogitRule(NamedTuple):
    """How logits follow from z, the product of output matrix and final state: ``scale · z``, softly
    capped to ``cap · tanh(scale · z / cap)`` where there is a ``cap`` (0: none)."""

    scale: float = 1.0
    cap: float = 0.0

    @classmethod
    def candidates(cls, scale: object, cap: object) -> list[LogitRule]:
        """What a file's ``scale`` and ``cap`` may mean, each of them also nothing: one architecture
        multiplies by its scale, another divides. What no model has counts as not there."""
        one, two = (
            float(value) if type(value) in (int, float) and 1e-6 < value < 1e6 else nothing  # type: ignore[operator,arg-type]
            for value, nothing in ((scale, 1.0), (cap, 0.0))
        )
        scales, caps = dict.fromkeys((1.0, one, 1.0 / one)), dict.fromkeys((0.0, two))
        return [cls(factor, limit) for factor in scales for limit in caps]


@dataclass(frozen=True)
class ProcessRank:
    """This process's place in a launch."""

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
