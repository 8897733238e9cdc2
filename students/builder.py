"""From a size such as ``512x4`` to a student with random weights."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from students.config import SO8TConfig
from students.model import SO8TForCausalLM
from students.so8 import GROUP

MIN_HEADS = 4
HEAD_WIDTHS = (64, 32, 16, 8)
MAX_WIDTH = 1 << 16
MAX_LAYERS = 1 << 10


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
            f"student size {text!r} is out of range: width {GROUP} to {MAX_WIDTH}, layers 1 to {MAX_LAYERS}"
        )
    if width % GROUP:
        below = width // GROUP * GROUP
        raise ValueError(
            f"student width {width} is not divisible by {GROUP} (the SO(8) gates work on blocks of {GROUP}); "
            f"use {below}x{layers} or {below + GROUP}x{layers}"
        )
    return StudentSize(width, layers)


def default_size(teacher_width: int, teacher_layers: int) -> StudentSize:
    """Half the teacher's width (in multiples of 64 where it is that wide) and half its depth."""
    step = 64 if teacher_width >= 128 else GROUP
    return StudentSize(max(step, teacher_width // 2 // step * step), max(1, teacher_layers // 2))


def student_config(
    size: StudentSize,
    *,
    vocab_size: int,
    context_length: int,
    tie_embeddings: bool = True,
    bos: int | None = None,
    eos: int | None = None,
) -> SO8TConfig:
    """Derive every setting of a student from its size.

    Heads are as wide as possible (64 at most) while there are at least four; from eight heads on, two query
    heads share a key/value head; the feed-forward is three times the width, which keeps the multiples of 256
    that K-quants need.
    """
    fitting = [width for width in HEAD_WIDTHS if size.width % width == 0]
    head_width = next((width for width in fitting if size.width // width >= MIN_HEADS), fitting[-1])
    heads = size.width // head_width
    return SO8TConfig(
        vocab_size=vocab_size,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads >= 8 and heads % 2 == 0 else heads,
        intermediate_size=3 * size.width,
        max_position_embeddings=context_length,
        tie_word_embeddings=tie_embeddings,
        bos_token_id=bos,
        eos_token_id=eos,
    )


def count_parameters(config: SO8TConfig) -> int:
    """Number of parameters of a student, without allocating one; tied matrices count once."""
    with torch.device("meta"):
        return SO8TForCausalLM(config).num_parameters()


def build_student(config: SO8TConfig, seed: int) -> SO8TForCausalLM:
    """A student with random float32 weights; the same seed gives the same weights.

    PyTorch's global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SO8TForCausalLM(config)
