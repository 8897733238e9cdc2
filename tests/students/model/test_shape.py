"""How a student's shape follows its teacher's, and what a user may choose instead."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from distill.config.loading import load_config
from distill.errors import UserError
from distill.initialization.shape import student_shape
from students.model.build import student_config
from students.model.config import SO8TConfig
from students.model.shape import ChosenShape, StudentSize, TeacherLikeness, attention_shape
from teachers.base import TeacherShape
from tests.support.references import case
from tests.support.teachers import BigramTeacher

# As Qwen3 0.6B has them: heads that are wider together than the residual stream.
QWEN = TeacherLikeness(1024, 16, 8, 128, 3072, 1e6, 1e-6)


def shape(width: int, like: TeacherLikeness = QWEN, **chosen: int) -> SO8TConfig:
    """The settings of a student with three layers."""
    size, wanted = StudentSize(width, 3), ChosenShape(**chosen)
    return student_config(size, vocab_size=50, context_length=64, like=like, chosen=wanted)


def numbers(config: SO8TConfig) -> tuple[int, int, int, int]:
    """Heads, key/value heads, head width, feed-forward width."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return heads, kv_heads, config.head_dim, config.intermediate_size


def test_a_student_follows_its_teacher() -> None:
    """Head width, sharing of key/value heads and feed-forward, each by its rule; written out."""
    rows: tuple[tuple[int, dict[str, int | None], tuple[int, int, int, int]], ...] = (
        (1024, {}, (8, 4, 128, 3072)),  # head width, two heads to one, feed-forward
        (512, {}, (4, 2, 128, 1536)),
        (256, {}, (2, 1, 128, 768)),  # two heads are enough where they are the teacher's
        (384, {}, (3, 3, 128, 1280)),  # 2 does not divide 3; 3 · 384 lies between 1024 and 1280
        (320, {}, (5, 5, 64, 1024)),  # 128 does not divide 320, so the widest with four heads
        (128, {}, (4, 2, 32, 384)),  # one head of 128 is not enough; below 256 exactly three times
        (8, {}, (1, 1, 8, 24)),
        (1024, {"kv_heads": 16}, (8, 8, 128, 3072)),
        (1024, {"kv_heads": None}, (8, 4, 128, 3072)),
        (1024, {"heads": 14, "kv_heads": 2}, (8, 4, 128, 3072)),  # seven to one cannot be
        (1024, {"heads": 8, "kv_heads": 3}, (8, 4, 128, 3072)),  # nor can 8/3
        (1024, {"heads": 16, "kv_heads": 2}, (8, 1, 128, 3072)),
        (1024, {"head_width": None}, (16, 8, 64, 3072)),
        (1024, {"head_width": 7}, (16, 8, 64, 3072)),
        (1024, {"head_width": 2048}, (16, 8, 64, 3072)),
        (1024, {"head_width": 1024}, (16, 8, 64, 3072)),
        (56, {"head_width": 7}, (7, 7, 8, 168)),
        (1024, {"ffn_width": 2816}, (8, 4, 128, 2816)),  # whatever it is, at its own width
        (768, {"ffn_width": 2816}, (6, 3, 128, 2304)),
        (1024, {"ffn_width": None}, (8, 4, 128, 3072)),
    )
    for width, changes, expected in rows:
        config = shape(width, replace(QWEN, **changes))  # type: ignore[arg-type]
        assert numbers(config) == expected, (width, changes)
        assert (config.rope_theta, config.rms_norm_eps) == (1e6, 1e-6)
        assert (config.hidden_size, config.num_hidden_layers) == (width, 3)


def test_an_unknown_teacher_gives_the_defaults() -> None:
    """Heads of 64 at most, at least four, two to one from eight on; 3 × the width."""
    for width, expected in (
        (64, (4, 4, 16, 192)),
        (128, (4, 4, 32, 384)),
        (512, (8, 4, 64, 1536)),
        (768, (12, 6, 64, 2304)),
        (320, (5, 5, 64, 1024)),
    ):
        config = shape(width, TeacherLikeness())
        assert numbers(config) == expected, width
        assert (config.rope_theta, config.rms_norm_eps) == (10000.0, 1e-5)
    for width in range(256, 2049, 8):  # feed-forwards of K-quants: multiples of 256, the nearest
        result = shape(width, TeacherLikeness()).intermediate_size
        assert result % 256 == 0 and abs(result - 3 * width) <= 128, width


def test_what_is_chosen_comes_first() -> None:
    """Each on its own and all together; the rest follows the rules."""
    choices: tuple[tuple[dict[str, int], tuple[int, int, int, int]], ...] = (
        ({"heads": 16}, (16, 8, 64, 3072)),
        ({"head_width": 32}, (32, 16, 32, 3072)),
        ({"heads": 16, "head_width": 128}, (16, 8, 128, 3072)),  # 2048 wide, as in the teacher
        ({"heads": 4, "head_width": 2}, (4, 2, 2, 3072)),
        ({"kv_heads": 1}, (8, 1, 128, 3072)),
        ({"kv_heads": 8}, (8, 8, 128, 3072)),
        ({"ffn_width": 100}, (8, 4, 128, 100)),
        ({"heads": 2, "kv_heads": 2, "head_width": 100, "ffn_width": 7}, (2, 2, 100, 7)),
    )
    for chosen, expected in choices:
        assert numbers(shape(1024, **chosen)) == expected, chosen


def test_what_does_not_fit_says_what_would() -> None:
    """And what is proposed does fit."""
    refused: tuple[tuple[str, dict[str, int], str], ...] = (
        ("heads", {"heads": 7}, r"width 512 .* 7 heads of even width; 4 or 8 heads would fit"),
        ("heads", {"heads": 300}, r"does not split into 300 heads .*; 256 heads would fit"),
        ("head_width", {"head_width": 100}, r"512 .* heads of width 100; width 64 or 128 would"),
        ("head_width", {"head_width": 1024}, r"heads of width 1024; width 512 would fit"),
        ("heads", {"heads": 3, "head_width": 10}, r"3 heads of width 10 .* 512: .*; 4 heads would"),
        ("heads", {"heads": 5, "head_width": 12}, r"multiple of 8 .*; 4 or 8 heads would fit"),
        ("heads", {"heads": 6, "head_width": 8}, r"heads has to divide .*; 4 or 8 heads would fit"),
        ("kv_heads", {"kv_heads": 3, "heads": 8}, r"8 heads .* 3 key/value .*; 2 or 4 would fit"),
        ("kv_heads", {"kv_heads": 16}, r"4 heads .* 16 key/value heads evenly; 4 would fit"),
    )
    for key, chosen, message in refused:
        with case(chosen):
            with pytest.raises(ValueError, match=message) as caught:
                shape(512, **chosen)
            proposal = str(caught.value).split(";")[-1].split("would fit")[0]
            proposed = [int(word) for word in proposal.split() if word.isdigit()]
            assert proposed
            for number in proposed:
                shape(512, **{**chosen, key: number})


def test_every_choice_is_a_model_or_a_reason() -> None:
    """No choice of heads gets past the rules and fails in the model's own checks."""
    for width, heads, head_width in product((8, 56, 64, 320), range(1, 40), (None, 2, 6, 8, 20)):
        given = {"heads": heads} | ({"head_width": head_width} if head_width else {})
        wide, chosen = heads * head_width if head_width else width, ChosenShape(**given)
        with case(width, chosen):
            if width % heads == 0 and wide % 8 == 0 and wide // heads % 2 == 0:
                assert attention_shape(width, QWEN, chosen).heads == heads
                assert shape(width, **given)
            else:
                with pytest.raises(ValueError, match="would"):
                    attention_shape(width, QWEN, chosen)


# --- as settings


def test_wrong_choices_are_refused_before_a_teacher_is_loaded() -> None:
    """What can be known from the settings alone is refused with them."""
    for settings, texts in (
        (["student.size=512x4", "student.heads=7"], ["student", "4 or 8 heads would fit"]),
        (["student.size=512x4", "student.heads=8", "student.kv_heads=3"], ["2 or 4 would fit"]),
        (["student.heads=0"], ["student.heads", "0"]),
        (["student.heads=1.5"], ["student.heads", "1.5"]),
        (["student.head_width=9"], ["student.head_width", "9"]),
        (["student.kv_heads=-1"], ["student.kv_heads"]),
        (["student.ffn_width=99999999"], ["student.ffn_width"]),
    ):
        with case(settings), pytest.raises(UserError) as caught:
            load_config(None, {}, settings)
        message = str(caught.value)
        assert all(text in message for text in texts) and "\n" not in message, (settings, message)


def test_settings_reach_the_student() -> None:
    """Facts about the teacher and choices of the user meet; what cannot be is refused by name."""
    facts = TeacherShape(8, 2, 16, 300, rope_theta=5e5, rms_norm_eps=1e-6)
    info = replace(BigramTeacher(100, 128, layers=6).info, shape=facts)

    def student(size: str, *settings: str) -> SO8TConfig:
        return student_shape(load_config(None, {"student.size": size}, list(settings)), info)

    result = student("64x2")
    assert numbers(result) == (4, 1, 16, 192)
    assert result.rope_theta == 5e5 and result.rms_norm_eps == 1e-6
    chosen = student("128x2", "student.kv_heads=4", "student.ffn_width=64")
    assert numbers(chosen) == (8, 4, 16, 64)
    with pytest.raises(UserError, match=r"student 64x2: 4 heads .* 3 .*; 2 or 4 would fit"):
        student("64x2", "student.kv_heads=3")
