"""The rules by which a student's shape follows its teacher's, and what a user may choose instead."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distill.config import load_config
from distill.errors import UserError
from distill.new_student import student_shape
from students.builder import student_config
from students.config import SO8TConfig
from students.shape import ChosenShape, StudentSize, TeacherLikeness, attention_shape
from teachers.base import TeacherShape
from tests.conftest import BigramTeacher

# As Qwen3 0.6B has them: heads that are wider together than the residual stream.
QWEN = TeacherLikeness(1024, 16, 8, 128, 3072, 1e6, 1e-6)


def shape(width: int, like: TeacherLikeness = QWEN, **chosen: int) -> SO8TConfig:
    """The settings of a student with three layers."""
    return student_config(
        StudentSize(width, 3), vocab_size=50, context_length=64, like=like, chosen=ChosenShape(**chosen)
    )


def numbers(config: SO8TConfig) -> tuple[int, int, int, int]:
    """Heads, key/value heads, head width, feed-forward width."""
    return (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.intermediate_size,
    )


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (1024, (8, 4, 128, 3072)),  # the teacher's head width, its two heads to one, its feed-forward
        (512, (4, 2, 128, 1536)),
        (256, (2, 1, 128, 768)),  # two heads are enough where they are the teacher's
        (384, (3, 3, 128, 1280)),  # 2 does not divide 3; 3 · 384 lies between 1024 and 1280: the larger
        (320, (5, 5, 64, 1024)),  # 128 does not divide 320, so the widest with four heads
        (128, (4, 2, 32, 384)),  # one head of 128 is not enough; below 256 exactly three times
        (8, (1, 1, 8, 24)),
    ],
)
def test_a_student_follows_its_teacher(width: int, expected: tuple[int, int, int, int]) -> None:
    """Head width, sharing of key/value heads and feed-forward, each by its rule; written out."""
    config = shape(width)
    assert numbers(config) == expected
    assert (config.rope_theta, config.rms_norm_eps) == (1e6, 1e-6)
    assert (config.hidden_size, config.num_hidden_layers) == (width, 3)


def test_a_teacher_without_grouping_gives_none() -> None:
    """As many key/value heads as heads in the teacher: the same in the student, where half would be the default."""
    like = replace(QWEN, kv_heads=16)
    assert numbers(shape(1024, like))[:2] == (8, 8)
    assert numbers(shape(1024, replace(QWEN, kv_heads=None)))[:2] == (8, 4)
    assert numbers(shape(1024, replace(QWEN, heads=14, kv_heads=2)))[:2] == (8, 4)  # seven to one cannot be
    assert numbers(shape(1024, replace(QWEN, heads=8, kv_heads=3)))[:2] == (8, 4)  # nor can 8/3
    assert numbers(shape(1024, replace(QWEN, heads=16, kv_heads=2)))[:2] == (8, 1)


@pytest.mark.parametrize("head_width", [None, 7, 2048, 1024])
def test_a_head_width_that_cannot_be_is_not_followed(head_width: int | None) -> None:
    """Unknown, odd, wider than the student, or all of it."""
    assert shape(1024, replace(QWEN, head_width=head_width)).head_dim == 64
    assert shape(56, replace(QWEN, head_width=7)).head_dim == 8


def test_an_unknown_teacher_gives_the_defaults() -> None:
    """No teacher's shape: heads of 64 at most, at least four, two to one from eight on; 3 × the width."""
    for width, expected in (
        (64, (4, 4, 16, 192)),
        (128, (4, 4, 32, 384)),
        (512, (8, 4, 64, 1536)),
        (768, (12, 6, 64, 2304)),
        (320, (5, 5, 64, 1024)),
    ):
        config = shape(width, TeacherLikeness())
        assert numbers(config) == expected
        assert (config.rope_theta, config.rms_norm_eps) == (10000.0, 1e-5)


@pytest.mark.parametrize("width", range(256, 2049, 8))
def test_feed_forwards_suit_k_quants(width: int) -> None:
    """A multiple of 256, no other one nearer to three times the width."""
    found = shape(width, TeacherLikeness()).intermediate_size
    assert found % 256 == 0 and abs(found - 3 * width) <= 128


def test_the_teachers_feed_forward_only_at_its_width() -> None:
    """Whatever it is, at its own width; nowhere else."""
    like = replace(QWEN, ffn_width=2816)
    assert shape(1024, like).intermediate_size == 2816
    assert shape(768, like).intermediate_size == 2304
    assert shape(1024, replace(QWEN, ffn_width=None)).intermediate_size == 3072


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"heads": 16}, (16, 8, 64, 3072)),
        ({"head_width": 32}, (32, 16, 32, 3072)),
        ({"heads": 16, "head_width": 128}, (16, 8, 128, 3072)),  # 2048 wide together, as in the teacher
        ({"heads": 4, "head_width": 2}, (4, 2, 2, 3072)),
        ({"kv_heads": 1}, (8, 1, 128, 3072)),
        ({"kv_heads": 8}, (8, 8, 128, 3072)),
        ({"ffn_width": 100}, (8, 4, 128, 100)),
        ({"heads": 2, "kv_heads": 2, "head_width": 100, "ffn_width": 7}, (2, 2, 100, 7)),
    ],
)
def test_what_is_chosen_comes_first(chosen: dict[str, int], expected: tuple[int, int, int, int]) -> None:
    """Each on its own and all together; the rest follows the rules."""
    assert numbers(shape(1024, **chosen)) == expected


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"heads": 7}, r"width 512 does not split into 7 heads of even width; 4 or 8 heads would fit"),
        ({"heads": 300}, r"does not split into 300 heads .*; 256 heads would fit"),
        ({"head_width": 100}, r"width 512 does not split into heads of width 100; width 64 or 128 would fit"),
        ({"head_width": 1024}, r"heads of width 1024; width 512 would fit"),
        (
            {"heads": 3, "head_width": 10},
            r"3 heads of width 10 do not fit width 512: .*; 4 heads would fit",
        ),
        ({"heads": 5, "head_width": 12}, r"multiple of 8 .*; 4 or 8 heads would fit"),
        ({"heads": 6, "head_width": 8}, r"number of heads has to divide .*; 4 or 8 heads would fit"),
        (
            {"kv_heads": 3, "heads": 8},
            r"8 heads cannot share 3 key/value heads evenly; 2 or 4 would fit",
        ),
        ({"kv_heads": 16}, r"4 heads cannot share 16 key/value heads evenly; 4 would fit"),
    ],
)
def test_what_does_not_fit_says_what_would(chosen: dict[str, int], message: str) -> None:
    """And what is proposed does fit."""
    with pytest.raises(ValueError, match=message) as caught:
        shape(512, **chosen)
    key = "kv_heads" if "kv_heads" in chosen else "head_width" if "heads" not in chosen else "heads"
    proposal = str(caught.value).split(";")[-1].split("would fit")[0]
    proposed = [int(word) for word in proposal.split() if word.isdigit()]
    assert proposed
    for number in proposed:
        shape(512, **{**chosen, key: number})


@pytest.mark.parametrize("heads", range(1, 40))
@pytest.mark.parametrize("width", [8, 56, 64, 320])
def test_every_choice_is_a_model_or_a_reason(width: int, heads: int) -> None:
    """No choice of heads gets past the rules and fails in the model's own checks."""
    for head_width in (None, 2, 6, 8, 20):
        chosen = ChosenShape(heads=heads, head_width=head_width)
        wide = heads * head_width if head_width else width
        fits = width % heads == 0 and wide % 8 == 0 and wide // heads % 2 == 0
        if fits:
            assert attention_shape(width, QWEN, chosen).heads == heads
            assert shape(width, heads=heads, **({"head_width": head_width} if head_width else {}))
        else:
            with pytest.raises(ValueError, match="would"):
                attention_shape(width, QWEN, chosen)


# --- as settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["student.size=512x4", "student.heads=7"], ["student", "4 or 8 heads would fit"]),
        (["student.size=512x4", "student.heads=8", "student.kv_heads=3"], ["2 or 4 would fit"]),
        (["student.heads=0"], ["student.heads", "0"]),
        (["student.heads=1.5"], ["student.heads", "1.5"]),
        (["student.head_width=9"], ["student.head_width", "9"]),
        (["student.kv_heads=-1"], ["student.kv_heads"]),
        (["student.ffn_width=99999999"], ["student.ffn_width"]),
    ],
)
def test_wrong_choices_are_refused_before_a_teacher_is_loaded(settings: list[str], words: list[str]) -> None:
    """What can be known from the settings alone is refused with them."""
    with pytest.raises(UserError) as caught:
        load_config(None, {}, settings)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_reach_the_student() -> None:
    """Facts about the teacher and choices of the user meet; what depends on both is refused by name."""
    facts = TeacherShape(heads=8, kv_heads=2, head_width=16, ffn_width=300, rope_theta=5e5, rms_norm_eps=1e-6)
    info = replace(BigramTeacher(100, 128, layers=6).info, shape=facts)
    config = load_config(None, {"student.size": "64x2"}, [])
    found = student_shape(config, info)
    assert numbers(found) == (4, 1, 16, 192) and found.rope_theta == 5e5 and found.rms_norm_eps == 1e-6
    config = load_config(None, {"student.size": "128x2"}, ["student.kv_heads=4", "student.ffn_width=64"])
    assert numbers(student_shape(config, info)) == (8, 4, 16, 64)
    config = load_config(None, {"student.size": "64x2"}, ["student.kv_heads=3"])
    with pytest.raises(UserError, match=r"student 64x2: 4 heads cannot share 3 .*; 2 or 4 would fit"):
        student_shape(config, info)
