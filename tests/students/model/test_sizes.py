"""Sizes as users write them; parameters counted; which width and depth a budget becomes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from distill.config.loading import load_config
from distill.config.schema import RunConfig
from distill.errors import UserError
from distill.initialization.shape import describe_parameters, student_shape, student_size
from students.model.build import build_student, student_config
from students.model.config import SO8TConfig
from students.model.fold import to_llama
from students.model.shape import (
    Budget,
    ChosenShape,
    Share,
    StudentSize,
    TeacherLikeness,
    parse_request,
)
from students.model.sizes import choose_size, decoder_parameters, layer_parameters
from teachers.base import TeacherInfo, TeacherShape
from tests.support.references import case
from tests.support.teachers import BigramTeacher


def test_sizes_as_users_write_them() -> None:
    """Width and layers, a share, a number."""
    for text, expected in (
        ("512x4", StudentSize(512, 4)),
        (" 512 × 4 ", StudentSize(512, 4)),
        ("25%", Share(0.25)),
        ("0.5 %", Share(0.005)),
        ("12.5%", Share(0.125)),
        ("50M", Budget(50_000_000)),
        ("1.2B", Budget(1_200_000_000)),
        ("800K", Budget(800_000)),
        ("800k", Budget(800_000)),
        ("0.0015M", Budget(1500)),
    ):
        assert parse_request(text) == expected, text
        assert load_config(None, {"student.size": text}, []).student.size == text


NO_SHARES = ("0%", "100%", "150%", "-5%", "%", "25%%", "25%x4", "nan%")
NO_NUMBERS = ("0M", "-5M", "50MB", "1e9", "1e9B", ".5B", "1,2B", "9999B", "0.0001K", "٣M")
NEITHER = ("512", "x4", "", "50000000", "M")


def test_what_is_no_size_is_refused_in_one_line() -> None:
    """Named, with what would be one."""
    for text in (*NO_SHARES, *NO_NUMBERS, *NEITHER):
        with case(text):
            with pytest.raises(UserError) as caught:
                load_config(None, {"student.size": text}, [])
            message = str(caught.value)
            assert f"student size {text!r}" in message and "\n" not in message
            right = ("512x4, 25% or 50M", "for example 25%", "1 to 1000B parameters")
            assert any(example in message for example in right)


# --- counting


def configs() -> list[SO8TConfig]:
    """Tied, untied and grouped students, with narrow and wide heads, odd feed-forwards."""
    like = TeacherLikeness(64, 8, 2, 16, 100, 1e6, 1e-6)
    chosen = (
        ChosenShape(),
        ChosenShape(kv_heads=1),
        ChosenShape(heads=8, head_width=20),
        ChosenShape(heads=4, kv_heads=2, head_width=2),
        ChosenShape(ffn_width=37),
    )
    return [
        student_config(
            size, vocab_size=97, context_length=64, tie_embeddings=tied, like=like, chosen=one
        )
        for one in chosen
        for tied in (True, False)
        for size in (StudentSize(64, 3), StudentSize(8, 1))
        if size.width == 64 or one.kv_heads != 1
    ]


def test_the_closed_form_counts_every_tensor() -> None:
    """Against the tensors of a real student, gates and all, and of the Llama that is exported."""
    for config in configs():
        with case(config):
            student = build_student(config, 0)
            decoder = {
                id(p): p.numel()
                for name, p in student.named_parameters()
                if name.startswith(("model.", "lm_head."))
            }
            assert decoder_parameters(config, gates=True) == sum(decoder.values())
            llama = to_llama(student)
            assert decoder_parameters(config) == llama.num_parameters()
            layer = sum(p.numel() for p in llama.model.layers[0].parameters())
            assert layer_parameters(config) == layer < layer_parameters(config, gates=True)


# --- choosing


def info(width: int, layers: int, parameters: int, vocab_size: int, *shape: float) -> TeacherInfo:
    """Facts about a teacher that nobody loads."""
    known = replace(BigramTeacher(8, 8).info, shape=TeacherShape(*shape))  # type: ignore[arg-type]
    known = replace(known, width=width, layers=layers)
    return replace(known, parameters=parameters, vocab_size=vocab_size)


PHI = info(3072, 32, 3_821_079_552, 32064, 32, 32, 96, 8192, 1e4, 1e-5)
QWEN = info(896, 24, 494_032_768, 151936, 14, 2, 64, 4864, 1e6, 1e-6)
SMALL = info(256, 6, 4_787_456, 1024, 4, 4, 64, 640, 1e4, 1e-5)


def widths_tried(limit: int) -> list[int]:
    """The rule, written out another way; and the teacher's own width."""
    result = [
        width
        for width in range(8, limit + 1, 8)
        if width < 128 or (width < 512 and width % 64 == 0) or width % 256 == 0
    ]
    return [*result, limit] if limit not in result else result


def sized(text: str, *settings: str) -> RunConfig:
    """The settings of a student of a size."""
    return load_config(None, {"student.size": text}, list(settings))


@cache
def shape_of(width: int, teacher: TeacherInfo) -> SO8TConfig:
    """The shape of a student of that width, whatever its depth."""
    return student_shape(sized(f"{width}x1"), teacher)


def counted(size: StudentSize, teacher: TeacherInfo) -> int:
    """Parameters of a student as it is exported, from the sizes of its matrices."""
    width, shape = size.width, shape_of(size.width, teacher)
    heads, keys = shape.num_attention_heads, shape.num_key_value_heads
    attention = width * shape.head_dim * (heads + keys + keys + heads)
    layer = attention + 3 * width * shape.intermediate_size + 2 * width
    return teacher.vocab_size * width + size.layers * layer + width


@pytest.mark.parametrize("teacher", [PHI, QWEN, SMALL], ids=["phi", "qwen", "small"])
def test_the_nearest_proportions_within_five_percent(teacher: TeacherInfo) -> None:
    """Against a search over everything that may be tried."""
    counts = {
        size: counted(size, teacher)
        for width in widths_tried(teacher.width)
        for size in (StudentSize(width, layers) for layers in range(1, teacher.layers + 1))
    }

    def unlike(size: StudentSize) -> float:
        ratio = size.width / size.layers * teacher.layers / teacher.width
        return max(ratio, 1 / ratio)

    for share in (60, 25, 10, 3, 1):
        wanted = share / 100 * teacher.parameters
        chosen = student_size(sized(f"{share}%"), teacher)
        assert chosen.width <= teacher.width and chosen.layers <= teacher.layers, share
        near = [size for size, count in counts.items() if 0.95 <= count / wanted <= 1.05]
        if near:
            assert chosen in near, share
            assert unlike(chosen) == pytest.approx(min(map(unlike, near))), share
        else:
            off = {size: max(count / wanted, wanted / count) for size, count in counts.items()}
            assert off[chosen] == pytest.approx(min(off.values())), share


def test_choices_written_out() -> None:
    """What the rules come to for well-known teachers."""
    for teacher, text, expected in (
        (PHI, "25%", "1792x21"),
        (PHI, "50M", "512x10"),
        (QWEN, "25%", "512x14"),
        (QWEN, "494M", "896x24"),  # its own width, though no multiple of 256
        (SMALL, "25%", "128x5"),
        (SMALL, "50M", "768x6"),  # wider than the teacher: nothing else comes near; never deeper
    ):
        assert str(student_size(sized(text), teacher)) == expected
        assert str(student_size(sized(expected), teacher)) == expected


def test_untied_students_have_room_for_two_matrices() -> None:
    """The second matrix counts: the same budget gives a smaller decoder."""
    tied = student_size(sized("50M"), PHI)
    untied = student_size(sized("50M", "student.tie_embeddings=false"), PHI)
    assert untied != tied and untied.width <= tied.width


def test_a_budget_below_the_smallest_student_names_it() -> None:
    """The vocabulary alone is more than that; the size that is proposed is accepted."""
    with pytest.raises(UserError) as caught:
        student_size(sized("800K"), QWEN)
    message, smallest = str(caught.value), counted(StudentSize(8, 1), QWEN)
    assert all(word in message for word in ("800K", "8x1", f"{smallest:,}")) and "\n" not in message
    assert student_size(sized(f"{smallest / 1e6:.3f}M"), QWEN) == StudentSize(8, 1)
    with pytest.raises(UserError, match=r"0\.1%.*the smallest"):
        student_size(sized("0.1%"), QWEN)


def test_chosen_heads_narrow_what_is_tried() -> None:
    """Widths that they do not divide are skipped; without any left, the reason is reported."""
    assert student_size(sized("25%", "student.heads=6"), SMALL).width % 12 == 0
    with pytest.raises(UserError, match=r"student size 25%: 4 heads .* 4095 .*; 4 would fit"):
        student_size(sized("25%", "student.kv_heads=4095"), SMALL)


def test_odd_teachers() -> None:
    """Narrower than any student, of one layer, or of more layers than any student has."""

    def shape(size: StudentSize) -> SO8TConfig:
        return student_config(size, vocab_size=16, context_length=8)

    assert choose_size(10_000, StudentSize(4, 1), shape).layers == 1
    assert choose_size(10_000, StudentSize(1, 10**9), shape).layers <= 1024
    assert choose_size(10**6, StudentSize(10**9, 3), shape).layers <= 3


def test_both_counts_are_said_where_they_differ() -> None:
    """Gates are a good part of a narrow student in training, and next to nothing of a wide one."""

    def message(size: str, teacher: TeacherInfo) -> str:
        return describe_parameters(student_shape(sized(size), teacher), teacher)

    narrow, wide = message("8x5", info(64, 5, 260_032, 512)), message("512x4", PHI)
    assert "in training" in narrow and "of the teacher's" in narrow
    assert "in training" not in wide
    share = counted(StudentSize(512, 4), PHI) / PHI.parameters
    assert f"{share:.1%} of the teacher's" in wide
