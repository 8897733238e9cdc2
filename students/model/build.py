"""From a size such as ``512x4`` to a student with random weights."""

from __future__ import annotations

import torch

from students.model.config import SO8TConfig
from students.model.decoder import SO8TForCausalLM
from students.model.shape import (
    BY_RULE,
    UNKNOWN,
    ChosenShape,
    StudentSize,
    TeacherLikeness,
    attention_shape,
    ffn_width,
)


def student_config(
    size: StudentSize,
    *,
    vocab_size: int,
    context_length: int,
    tie_embeddings: bool = True,
    bos: int | None = None,
    eos: int | None = None,
    like: TeacherLikeness = UNKNOWN,
    chosen: ChosenShape = BY_RULE,
) -> SO8TConfig:
    """Every setting of a student from its size, its teacher's shape, and what the user chose.

    What was not chosen follows these rules:

    - head width: the teacher's, where it divides the width and leaves at least two heads; else as
      wide as possible (64 at most) with at least four heads.
    - heads: as many as fill the width. (Heads and head width both chosen need not fill it.)
    - key/value heads: as many query heads share one as in the teacher, where that divides the
      heads; else two from eight heads on.
    - feed-forward: the teacher's, where the width is the teacher's; else three times the width,
      from width 256 on to the nearest multiple of 256 (K-quants work on blocks of 256).
    - rotary base and norm epsilon: the teacher's, so that weights can be taken over; else 10000 and
      1e-5.

    Raises:
        ValueError: what was chosen does not fit together; says what would.
    """
    attention = attention_shape(size.width, like, chosen)
    return SO8TConfig(
        vocab_size=vocab_size,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=attention.heads,
        num_key_value_heads=attention.kv_heads,
        head_dim=attention.head_width,
        intermediate_size=chosen.ffn_width or ffn_width(size.width, like),
        max_position_embeddings=context_length,
        rope_theta=10000.0 if like.rope_theta is None else like.rope_theta,
        rms_norm_eps=1e-5 if like.rms_norm_eps is None else like.rms_norm_eps,
        tie_word_embeddings=tie_embeddings,
        bos_token_id=bos,
        eos_token_id=eos,
    )


def build_student(config: SO8TConfig, seed: int) -> SO8TForCausalLM:
    """A student with random float32 weights; the same seed gives the same weights.

    PyTorch's global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SO8TForCausalLM(config)
