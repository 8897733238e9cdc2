"""A student's shape, and how a user requests it: ``512x4``, ``25%``, ``50M``, heads.

Plain arithmetic without PyTorch: invalid sizes are refused before that is imported.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

GROUP = 8  # width of the blocks that the SO(8) gates rotate
PARAMETERS_PER_BLOCK = GROUP * (GROUP - 1) // 2  # of one rotation
MIN_HEADS = 4
HEAD_WIDTHS = (64, 32, 16, 8)
QUANT_BLOCK = 256  # rows that K-quants take are a multiple of this
MAX_WIDTH = 1 << 16
MAX_LAYERS = 1 << 10
UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}
MAX_BUDGET = 10**12
FORMS = (
    "write WIDTHxLAYERS, a share of the teacher's parameters or their number, for example "
    "512x4, 25% or 50M"
)


@dataclass(frozen=True)
class StudentSize:
    """Width of the residual stream and number of layers."""

    width: int
    layers: int

    def __str__(self) -> str:
        return f"{self.width}x{self.layers}"


def parse_size(text: str) -> StudentSize:
    """Read ``WIDTHxLAYERS``.

    Raises:
        ValueError: not of that form, width not divisible by 8, or beyond any sensible size.
    """
    match = re.fullmatch(r"\s*(\d{1,9})\s*[xX×]\s*(\d{1,9})\s*", text)
    if match is None:
        raise ValueError(f"student size {text!r} is not WIDTHxLAYERS; write for example 512x4")
    width, layers = int(match[1]), int(match[2])
    if not (GROUP <= width <= MAX_WIDTH and 1 <= layers <= MAX_LAYERS):
        raise ValueError(
            f"student size {text!r} is out of range: width {GROUP} to {MAX_WIDTH}, layers 1 to "
            f"{MAX_LAYERS}"
        )
    if width % GROUP:
        below = width // GROUP * GROUP
        raise ValueError(
            f"student width {width} is not divisible by {GROUP} (the SO(8) gates work on blocks of "
            f"{GROUP}); use {below}x{layers} or {below + GROUP}x{layers}"
        )
    return StudentSize(width, layers)


def default_size(teacher_width: int, teacher_layers: int) -> StudentSize:
    """Half the teacher's width (in multiples of 64 where it is that wide) and half its depth."""
    step = 64 if teacher_width >= 128 else GROUP
    return StudentSize(max(step, teacher_width // 2 // step * step), max(1, teacher_layers // 2))


def ffn_width(width: int, like: TeacherLikeness) -> int:
    """Width of the feed-forward for a residual stream of ``width``."""
    if width == like.width and like.ffn_width is not None:
        return like.ffn_width
    if width < QUANT_BLOCK:
        return 3 * width
    return (3 * width + QUANT_BLOCK // 2) // QUANT_BLOCK * QUANT_BLOCK


@dataclass(frozen=True)
class TeacherLikeness:
    """What a student can copy of its teacher's shape; ``None`` where it is not known.

    The width and the fields of ``teachers.base.TeacherShape``, which this package does not import.
    """

    width: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_width: int | None = None
    ffn_width: int | None = None
    rope_theta: float | None = None
    rms_norm_eps: float | None = None


@dataclass(frozen=True)
class ChosenShape:
    """What the user chose; ``None``: by the rules of ``students.model.build.student_config``."""

    heads: int | None = None
    kv_heads: int | None = None
    head_width: int | None = None
    ffn_width: int | None = None


UNKNOWN, BY_RULE = TeacherLikeness(), ChosenShape()


@dataclass(frozen=True)
class AttentionShape:
    """Query heads, key/value heads, and the width of each."""

    heads: int
    kv_heads: int
    head_width: int


def attention_shape(
    width: int, like: TeacherLikeness = UNKNOWN, chosen: ChosenShape = BY_RULE
) -> AttentionShape:
    """Heads of a student of ``width``, by the rules of ``students.model.build.student_config``.

    Raises:
        ValueError: what was chosen does not fit together; says what would.
    """
    heads, head_width = _heads(width, like, chosen)
    return AttentionShape(heads, _kv_heads(heads, like, chosen), head_width)


def _heads(width: int, like: TeacherLikeness, chosen: ChosenShape) -> tuple[int, int]:
    """Number and width of the query heads."""
    heads, head_width = chosen.heads, chosen.head_width
    if heads is not None and head_width is not None:
        fitting = [number for number in _divisors(width) if number * head_width % GROUP == 0]
        if heads not in fitting:
            raise ValueError(
                f"{heads} heads of width {head_width} do not fit width {width}: the number of "
                f"heads has to divide it, and all heads together be a multiple of {GROUP} wide; "
                f"{_near(heads, fitting)} heads would fit"
            )
        return heads, head_width
    if heads is not None:
        fitting = [number for number in _divisors(width) if width % (2 * number) == 0]
        if heads not in fitting:
            raise ValueError(
                f"width {width} does not split into {heads} heads of even width; "
                f"{_near(heads, fitting)} heads would fit, or another divisor of the width with a "
                "student.head_width of its own"
            )
        return heads, width // heads
    if head_width is not None:
        fitting = [number for number in _divisors(width) if number % 2 == 0]
        if head_width not in fitting:
            raise ValueError(
                f"width {width} does not split into heads of width {head_width}; width "
                f"{_near(head_width, fitting)} would fit, or any with a number of student.heads "
                "of its own"
            )
        return width // head_width, head_width
    theirs = like.head_width
    if theirs is not None and theirs % 2 == 0 and width % theirs == 0 and width // theirs >= 2:
        return width // theirs, theirs
    splitting = [number for number in HEAD_WIDTHS if width % number == 0]
    own = next((number for number in splitting if width // number >= MIN_HEADS), splitting[-1])
    return width // own, own


def _kv_heads(heads: int, like: TeacherLikeness, chosen: ChosenShape) -> int:
    """Number of key/value heads for ``heads`` query heads."""
    if chosen.kv_heads is not None:
        if heads % chosen.kv_heads:
            raise ValueError(
                f"{heads} heads cannot share {chosen.kv_heads} key/value heads evenly; "
                f"{_near(chosen.kv_heads, _divisors(heads))} would fit"
            )
        return chosen.kv_heads
    if like.heads is not None and like.kv_heads is not None and like.heads % like.kv_heads == 0:
        ratio = like.heads // like.kv_heads
        if heads % ratio == 0:
            return heads // ratio
    return heads // 2 if heads >= 8 and heads % 2 == 0 else heads


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _near(wanted: int, fitting: Sequence[int]) -> str:
    """The fitting numbers around ``wanted``, as text."""
    below = [number for number in fitting if number < wanted][-1:]
    above = [number for number in fitting if number > wanted][:1]
    return " or ".join(map(str, below + above))


@dataclass(frozen=True)
class Share:
    """A student with this share of the teacher's parameters, between 0 and 1."""

    share: float


@dataclass(frozen=True)
class Budget:
    """A student with this many parameters."""

    parameters: int


def parse_request(text: str) -> StudentSize | Share | Budget:
    """Read a size as a user writes it.

    Raises:
        ValueError: none of the three forms, or a share or number that no student can have.
    """
    match = re.fullmatch(r"\s*([0-9]{1,12}(?:\.[0-9]{1,12})?)\s*([%KMBkmb])\s*", text)
    if match is None:
        if re.fullmatch(r"\s*[0-9]+\s*[xX×]\s*[0-9]+\s*", text):
            return parse_size(text)
        raise ValueError(f"student size {text!r} is not one; {FORMS}")
    number, unit = float(match[1]), match[2].upper()
    if unit == "%":
        if not 0 < number < 100:
            raise ValueError(
                f"student size {text!r}: a share lies between 0% and 100%; write for example 25%"
            )
        return Share(number / 100)
    parameters = round(number * UNITS[unit])
    if not 1 <= parameters <= MAX_BUDGET:
        raise ValueError(
            f"student size {text!r} is out of range: 1 to {MAX_BUDGET // UNITS['B']}B parameters"
        )
    return Budget(parameters)
