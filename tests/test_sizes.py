"""Sizes as users write them; parameters counted in closed form; which width and depth a budget becomes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distill.cli import main
from distill.config import load_config
from distill.errors import UserError
from distill.new_student import describe_parameters, student_shape, student_size, with_size
from students.builder import build_student, student_config
from students.config import SO8TConfig
from students.fold import to_llama
from students.shape import Budget, ChosenShape, Share, StudentSize, TeacherLikeness, parse_request
from students.sizes import choose_size, decoder_parameters, layer_parameters
from teachers.base import TeacherInfo, TeacherShape
from tests.conftest import BigramTeacher


@pytest.mark.parametrize(
    ("text", "expected"),
    [
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
    ],
)
def test_sizes_as_users_write_them(text: str, expected: object) -> None:
    """Width and layers, a share, a number."""
    assert parse_request(text) == expected
    assert load_config(None, {"student.size": text}, []).student.size == text


NO_SHARES = ("0%", "100%", "150%", "-5%", "%", "25%%", "25%x4", "nan%")
NO_NUMBERS = ("0M", "-5M", "50MB", "1e9", "1e9B", "50000000", "M", ".5B", "1,2B", "9999B", "0.0001K", "٣M")
NO_PAIRS = ("512", "x4", "")


@pytest.mark.parametrize("text", [*NO_SHARES, *NO_NUMBERS, *NO_PAIRS])
def test_what_is_no_size_is_refused_in_one_line(text: str) -> None:
    """Named, with what would be one."""
    with pytest.raises(UserError) as caught:
        load_config(None, {"student.size": text}, [])
    words = str(caught.value)
    assert f"student size {text!r}" in words and "\n" not in words
    assert any(right in words for right in ("512x4, 25% or 50M", "for example 25%", "1 to 1000B parameters"))


# --- counting


def configs() -> list[SO8TConfig]:
    """Students of every kind: tied, untied, grouped, with narrow and wide heads, odd feed-forwards."""
    like = TeacherLikeness(64, 8, 2, 16, 100, 1e6, 1e-6)
    chosen = (
        ChosenShape(),
        ChosenShape(kv_heads=1),
        ChosenShape(heads=8, head_width=20),
        ChosenShape(heads=4, kv_heads=2, head_width=2),
        ChosenShape(ffn_width=37),
    )
    return [
        student_config(size, vocab_size=97, context_length=64, tie_embeddings=tied, like=like, chosen=one)
        for one in chosen
        for tied in (True, False)
        for size in (StudentSize(64, 3), StudentSize(8, 1))
        if size.width == 64 or one.kv_heads != 1
    ]


@pytest.mark.parametrize("config", configs(), ids=lambda config: str(decoder_parameters(config)))
def test_the_closed_form_counts_every_tensor(config: SO8TConfig) -> None:
    """Against the tensors of a real student, gates and all, and of the Llama that is exported."""
    student = build_student(config, 0)
    decoder = {
        id(p): p.numel() for name, p in student.named_parameters() if name.startswith(("model.", "lm_head."))
    }
    assert decoder_parameters(config, gates=True) == sum(decoder.values())
    llama = to_llama(student)
    assert decoder_parameters(config) == llama.num_parameters()
    layer = sum(p.numel() for p in llama.model.layers[0].parameters())
    assert layer_parameters(config) == layer < layer_parameters(config, gates=True)


# --- choosing


def info(
    width: int, layers: int, parameters: int, vocab_size: int, shape: TeacherShape | None = None
) -> TeacherInfo:
    """Facts about a teacher that nobody loads."""
    known = BigramTeacher(8, 8).info
    return replace(
        known,
        width=width,
        layers=layers,
        parameters=parameters,
        vocab_size=vocab_size,
        shape=shape or TeacherShape(),
    )


PHI = info(3072, 32, 3_821_079_552, 32064, TeacherShape(32, 32, 96, 8192, 1e4, 1e-5))
QWEN = info(896, 24, 494_032_768, 151936, TeacherShape(14, 2, 64, 4864, 1e6, 1e-6))
SMALL = info(256, 6, 4_787_456, 1024, TeacherShape(4, 4, 64, 640, 1e4, 1e-5))


def widths_tried(limit: int) -> list[int]:
    """The rule, written out another way; and the teacher's own width."""
    found = [
        width
        for width in range(8, limit + 1, 8)
        if width < 128 or (width < 512 and width % 64 == 0) or width % 256 == 0
    ]
    return [*found, limit] if limit not in found else found


def counted(size: StudentSize, teacher: TeacherInfo) -> int:
    """Parameters of a student as it is exported, from the sizes of its matrices."""
    config = load_config(None, {"student.size": str(size)}, [])
    shape = student_shape(config, teacher)
    width, heads, keys = size.width, shape.num_attention_heads, shape.num_key_value_heads
    attention = width * shape.head_dim * (heads + keys + keys + heads)
    layer = attention + 3 * width * shape.intermediate_size + 2 * width
    return teacher.vocab_size * width + size.layers * layer + width


@pytest.mark.parametrize("text", ["60%", "25%", "10%", "3%", "1%"])
@pytest.mark.parametrize("teacher", [PHI, QWEN, SMALL], ids=["phi", "qwen", "small"])
def test_the_nearest_proportions_within_five_percent(teacher: TeacherInfo, text: str) -> None:
    """Against a search over everything that may be tried."""
    wanted = float(text[:-1]) / 100 * teacher.parameters
    chosen = student_size(load_config(None, {"student.size": text}, []), teacher)
    assert chosen.width <= teacher.width and chosen.layers <= teacher.layers
    counts = {
        StudentSize(width, layers): counted(StudentSize(width, layers), teacher)
        for width in widths_tried(teacher.width)
        for layers in range(1, teacher.layers + 1)
    }

    def unlike(size: StudentSize) -> float:
        ratio = size.width / size.layers * teacher.layers / teacher.width
        return max(ratio, 1 / ratio)

    near = [size for size, count in counts.items() if 0.95 <= count / wanted <= 1.05]
    if near:
        assert chosen in near
        assert unlike(chosen) == pytest.approx(min(map(unlike, near)))
    else:
        off = {size: max(count / wanted, wanted / count) for size, count in counts.items()}
        assert off[chosen] == pytest.approx(min(off.values()))


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
        config = load_config(None, {"student.size": text}, [])
        resolved = with_size(config, teacher)
        assert resolved.student.size == expected
        assert with_size(resolved, teacher) == resolved


def test_untied_students_have_room_for_two_matrices() -> None:
    """The second matrix counts: the same budget gives a smaller decoder."""
    tied = load_config(None, {"student.size": "50M"}, [])
    untied = load_config(None, {"student.size": "50M"}, ["student.tie_embeddings=false"])
    one, two = student_size(tied, PHI), student_size(untied, PHI)
    assert two != one and two.width <= one.width


def test_a_budget_below_the_smallest_student_names_it() -> None:
    """The vocabulary alone is more than that; the size that is proposed is accepted."""
    with pytest.raises(UserError) as caught:
        student_size(load_config(None, {"student.size": "800K"}, []), QWEN)
    words = str(caught.value)
    smallest = counted(StudentSize(8, 1), QWEN)
    assert "800K" in words and "8x1" in words and f"{smallest:,}" in words and "\n" not in words
    accepted = load_config(None, {"student.size": f"{smallest / 1e6:.3f}M"}, [])
    assert student_size(accepted, QWEN) == StudentSize(8, 1)
    with pytest.raises(UserError, match=r"0\.1%.*the smallest"):
        student_size(load_config(None, {"student.size": "0.1%"}, []), QWEN)


def test_chosen_heads_narrow_what_is_tried() -> None:
    """Widths that the chosen heads do not divide are passed over; where none is left, the reason is said."""
    config = load_config(None, {"student.size": "25%"}, ["student.heads=6"])
    assert student_size(config, SMALL).width % 12 == 0
    config = load_config(None, {"student.size": "25%"}, ["student.kv_heads=4095"])
    with pytest.raises(UserError, match=r"student size 25%: 4 heads cannot share 4095 .*; 4 would fit"):
        student_size(config, SMALL)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--student-size", "0%"], ["0%", "for example 25%"]),
        (["--student-size", "-5M"], ["-5M", "25% or 50M"]),
        (["--student-size", "50MB"], ["50MB", "25% or 50M"]),
        (["--student-size", "2K"], ["2K", "smallest", "8x1"]),
        (["--student-size", "64x1", "--set", "student.heads=3"], ["width 64", "2 or 4 heads would fit"]),
        (["--student-size", "64x1", "--set", "student.kv_heads=3"], ["4 heads", "2 or 4 would fit"]),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_the_command_says_it_in_one_line(
    command: str,
    arguments: list[str],
    words: list[str],
    tiny_teacher_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, one line, nothing written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["distill", command, "--teacher", str(tiny_teacher_path), *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and said.startswith("error:")
    for word in words:
        assert word in said
    assert not list(tmp_path.iterdir())


def test_odd_teachers() -> None:
    """Narrower than any student, of one layer, or of more layers than any student has."""

    def shape(size: StudentSize) -> SO8TConfig:
        return student_config(size, vocab_size=16, context_length=8)

    assert choose_size(10_000, StudentSize(4, 1), shape).layers == 1
    assert choose_size(10_000, StudentSize(1, 10**9), shape).layers <= 1024
    assert choose_size(10**6, StudentSize(10**9, 3), shape).layers <= 3


def test_both_counts_are_said_where_they_differ() -> None:
    """The gates of a narrow student are a good part of it in training; of a wide one next to nothing."""

    def words(size: str, teacher: TeacherInfo) -> str:
        config = load_config(None, {"student.size": size}, [])
        return describe_parameters(student_shape(config, teacher), teacher)

    narrow, wide = words("8x5", info(64, 5, 260_032, 512)), words("512x4", PHI)
    assert "in training" in narrow and "of the teacher's" in narrow
    assert "in training" not in wide
    share = counted(StudentSize(512, 4), PHI) / PHI.parameters
    assert f"{share:.1%} of the teacher's" in wide
