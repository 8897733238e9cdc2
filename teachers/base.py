"""What the rest of the project may ask of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from teachers.targets.distributions import Arrays
    from teachers.targets.recipe import Recipe
    from teachers.targets.state_codec import Basis


Tokens = NDArray[np.int32]
Floats = NDArray[np.float32]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Sampling:
    """How the teacher picks tokens: temperature and nucleus (``top_p`` 1 keeps everything)."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_length: int = 256
    seed: int = 0


MOST = 1 << 20  # heads or widths that a real model may have
ROTARY_BASES = (1.0, 1e12)
NORM_EPSILONS = (1e-30, 0.1)


@dataclass(frozen=True)
class TeacherShape:
    """The proportions of a teacher's layers, all of which have the same; ``None`` where they are
    not known."""

    heads: int | None = None
    kv_heads: int | None = None
    head_width: int | None = None
    ffn_width: int | None = None
    rope_theta: float | None = None
    rms_norm_eps: float | None = None

    @classmethod
    def believed(
        cls,
        *,
        heads: object = None,
        kv_heads: object = None,
        head_width: object = None,
        ffn_width: object = None,
        rope_theta: object = None,
        rms_norm_eps: object = None,
    ) -> TeacherShape:
        """A shape from values of an untrusted file; what no model has (or has per layer) counts
        as not known."""
        return cls(
            heads=_count(heads),
            kv_heads=_count(kv_heads),
            head_width=_count(head_width),
            ffn_width=_count(ffn_width),
            rope_theta=_within(rope_theta, ROTARY_BASES),
            rms_norm_eps=_within(rms_norm_eps, NORM_EPSILONS),
        )


def _count(value: object) -> int | None:
    return value if type(value) is int and 1 <= value <= MOST else None


def _within(value: object, bounds: tuple[float, float]) -> float | None:
    if type(value) not in (int, float):  # a bool is an int to isinstance
        return None
    assert isinstance(value, (int, float))
    return float(value) if bounds[0] <= value <= bounds[1] else None


@dataclass(frozen=True)
class TeacherInfo:
    """Facts about a teacher; token ids it does not have are ``None``.

    ``end_tokens``: the tokens with which it ends its turn. ``shape``: of its layers, as far as it
    is known.
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
    """Texts and the ids the teacher's own tokenizer gives them (control tokens parsed, BOS as it
    wants)."""

    texts: list[str]
    tokens: list[Tokens]


Self = TypeVar("Self")


class Teacher(Protocol):
    """A language model that can tokenise, speak, and say how probable every next token is.

    Letters: N positions over all sequences together (a sequence of n tokens has n − 1), V
    vocabulary.
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

    def speak(
        self,
        requests: Sequence[Sequence[Tokens]],
        sampling: Sampling,
        *,
        first_index: int = 0,
        progress: Progress = ...,
    ) -> list[Tokens]:
        """Write one sequence per request (see ``teachers.llama_cpp.generation``); progress
        counts finished sequences."""
        ...

    def speak_and_score(
        self,
        requests: Sequence[Sequence[Tokens]],
        sampling: Sampling,
        recipe: Recipe,
        bases: Mapping[str, Basis],
        *,
        first_index: int = 0,
        progress: Progress = ...,
    ) -> tuple[list[Tokens], Arrays]:
        """``speak`` and ``score`` of what is said, in one pass where the teacher can."""
        ...

    def score(
        self,
        sequences: Sequence[Tokens],
        recipe: Recipe,
        bases: Mapping[str, Basis],
        progress: Progress = ...,
    ) -> Arrays:
        """What ``recipe`` keeps of all positions, as the arrays a store keeps, ``[N, …]``.

        ``bases``: how hidden states are encoded, ``final`` and ``layer<i>``, where the recipe needs
        them.
        """
        ...

    def states(
        self, sequences: Sequence[Tokens], layers: Sequence[int] = ()
    ) -> Mapping[str, Floats]:
        """Hidden states of all positions, ``[N, D]`` each: ``final`` (after the last norm) and
        ``layer<i>``."""
        ...

    def output_rows(self, start: int, stop: int) -> Floats:
        """Rows of the output matrix, ``[stop − start, D]``: logits are final states times its
        transpose.

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

    def __enter__(self: Self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def speak_then_score(
    teacher: Teacher,
    requests: Sequence[Sequence[Tokens]],
    sampling: Sampling,
    recipe: Recipe,
    bases: Mapping[str, Basis],
    *,
    first_index: int = 0,
    progress: Progress,
) -> tuple[list[Tokens], Arrays]:
    """``Teacher.speak_and_score`` in two passes; ``progress`` counts sequences, each half for
    either pass."""
    said = teacher.speak(
        requests, sampling, first_index=first_index, progress=lambda done: progress(done // 2)
    )
    total, count = sum(len(tokens) - 1 for tokens in said), len(said)

    def scored(positions: int) -> None:
        progress(count // 2 + (count - count // 2) * positions // max(1, total))

    return said, teacher.score(said, recipe, bases, scored)


@dataclass(frozen=True)
class Share:
    """Which shards this process writes: those whose number leaves ``rank`` when divided by
    ``world``."""

    rank: int = 0
    world: int = 1


WHOLE = Share()
