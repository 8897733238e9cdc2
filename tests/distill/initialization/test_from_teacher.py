"""A student made from its teacher's weights: equal where it can be, near where it cannot."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.initialization.from_teacher import (
    UnusableTeacher,
    require_usable_weights,
    student_from_teacher,
)
from distill.initialization.shape import likeness
from distill.initialization.teacher_trace import logits
from students.model.build import build_student, student_config
from students.model.config import SO8TConfig
from students.model.decoder import SO8TForCausalLM
from students.model.fold import to_llama
from students.model.shape import StudentSize
from teachers.base import GenerationRequest, Sampling, Tokens
from teachers.gguf.file import GGUFFile, read_gguf
from teachers.gguf.llama_weights import LlamaWeights, NotALlama
from teachers.llama_cpp.teacher import GGUFTeacher
from tests.support.real import real_teacher
from tests.support.teachers import shared_file
from tests.support.tiny_models import VOCABULARY, Tiny, canonical, stored, write_tiny


def quiet(done: int, message: str) -> None:
    """Progress that nobody watches."""


def shape(tiny: Tiny, config: Mapping[str, Any] | None = None, **changes: Any) -> SO8TConfig:
    """A student with a teacher's own shape, but for some changes of that and of the settings."""
    tiny = replace(tiny, **changes)
    usual = {
        "vocab_size": VOCABULARY,
        "hidden_size": tiny.width,
        "num_hidden_layers": tiny.layers,
        "num_attention_heads": tiny.heads,
        "num_key_value_heads": tiny.kv_heads,
        "head_dim": tiny.head_width,
        "intermediate_size": tiny.feed_forward,
        "rope_theta": tiny.rope_theta,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tiny.tied,
    }
    return SO8TConfig(**usual | (config or {}))


def text(count: int = 24, length: int = 40, seed: int = 0) -> list[Tokens]:
    draw = np.random.default_rng(seed)
    return [draw.integers(3, VOCABULARY, length).astype(np.int32) for _ in range(count)]


@torch.no_grad()
def answers(student: SO8TForCausalLM, sequences: Sequence[Tokens]) -> Tensor:
    """All logits but those of each sequence's last token, ``[N, V]``."""
    rows = [torch.from_numpy(tokens.astype(np.int64))[None] for tokens in sequences]
    return torch.cat([student.eval()(row).logits[0, :-1] for row in rows])


def teacher_logits(file: GGUFFile, sequences: Sequence[Tokens]) -> Tensor:
    """A teacher's logits, ``[N, V]``."""
    return torch.from_numpy(logits(LlamaWeights(file), sequences))


def initialized(
    file: GGUFFile, config: SO8TConfig, count: int = 24, length: int = 40
) -> SO8TForCausalLM:
    """A student initialized from a teacher's weights on so much text."""
    return student_from_teacher(config, file, text(count, length), 0, quiet)


def off_by(student: SO8TForCausalLM, file: GGUFFile) -> tuple[float, float]:
    """How far logits are from the teacher's on other text, also as a share of the largest."""
    other = text(3, 30, seed=8)
    expected = teacher_logits(file, other)
    most = float((answers(student, other) - expected).abs().max())
    return most, most / float(expected.abs().max())


def divergence(theirs: Tensor, ours: Tensor) -> float:
    """Mean KL from a teacher's to a student's logits."""
    theirs, ours = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def wikitext(teacher: GGUFTeacher) -> tuple[list[Tokens], list[Tokens]]:
    """Two sequences to compare on, and 32 to fit to."""
    lines = shared_file("text/wikitext2-valid.txt").read_text(encoding="utf-8").splitlines()
    chosen = [line for line in lines if len(line) > 400][:34]
    ids = teacher.tokenize(chosen, add_special=True, parse_special=False)
    return [row[:64] for row in ids[:2]], [row[:128] for row in ids[2:]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("from_teacher")


def written(base: Path, tiny: Tiny) -> GGUFFile:
    path = base / f"{abs(hash(tiny))}.gguf"
    return read_gguf(path if path.exists() else write_tiny(path, tiny))


SAME = {
    "llama": Tiny(),
    "llama, tied": Tiny(tied=True, seed=1),
    "llama, heads wider than the stream": Tiny(heads=6, kv_heads=3, seed=2),
    "phi3": Tiny("phi3", width=64, seed=3),
    "scaled rotary embedding": Tiny(attention_factor=1.2, seed=4),
}


def test_a_student_of_the_teachers_shape_is_the_teacher(base: Path) -> None:
    """Whatever the rotations of its gates, which are random, and folded as well; float32 rounds by
    the size of the logits, 13 to 32 here."""
    for name, tiny in SAME.items():
        file = written(base, tiny)
        student = initialized(file, shape(tiny, {"rotation_init_std": 0.7}))
        assert off_by(student, file)[1] < 5e-6, name
        rotations = student.rotations()
        assert (rotations[:, 1] @ rotations[:, 0] - torch.eye(8)).abs().max() > 0.5, name
        assert off_by(to_llama(student), file)[1] < 5e-6, name


def test_a_larger_student_is_the_teacher_too(base: Path) -> None:
    """Surplus layers, units, heads and directions are there, and silent.

    Rotary pairs of twice as wide heads turn as fast as the teacher's; every other one is free.
    """
    tiny = Tiny(tied=True, seed=1)
    file = written(base, tiny)
    for changes in (
        {"layers": 5},
        {"feed_forward": 120},
        {"width": 72},
        {"head_width": 32},
        {"heads": 8, "kv_heads": 4},
        {"heads": 8},
        {"kv_heads": 4},
        {"tied": False},
        {"width": 56, "feed_forward": 96, "layers": 4, "heads": 8},
    ):
        student = initialized(file, shape(tiny, **changes))
        assert off_by(student, file)[1] < 2e-4, changes
        for name, value in student.state_dict().items():
            assert torch.isfinite(value).all(), (changes, name)


def test_layers_that_do_nothing_are_the_ones_dropped(base: Path) -> None:
    """Half as many layers are the teacher, where the others add nothing to its stream."""
    tiny = Tiny(seed=3, layers=6)
    idle = {
        f"blk.{layer}.{name}.weight": np.zeros_like(stored(tiny)[f"blk.{layer}.{name}.weight"])
        for layer in (2, 3, 5)
        for name in ("attn_output", "ffn_down")
    }
    file = read_gguf(write_tiny(base / "idle.gguf", tiny, idle))
    for width in (tiny.width, tiny.width + 16):
        student = initialized(file, shape(tiny, layers=3, width=width))
        assert off_by(student, file)[1] < 1e-4, width


def test_norms_put_out_coordinates_of_one_size(base: Path) -> None:
    """Where the teacher's have one that is thirty times as large, one that is silent and one that
    nearly is; the student is the teacher all the same."""
    tiny = Tiny(tied=True, seed=5)
    changes = {}
    for name in ("blk.0.attn_norm.weight", "blk.1.ffn_norm.weight"):
        gain = stored(tiny)[name].copy()
        gain[3], gain[5], gain[7] = 30.0, 0.0, 1e-3
        changes[name] = gain
    file = read_gguf(write_tiny(base / "uneven.gguf", tiny, changes))
    student = initialized(file, shape(tiny))
    assert off_by(student, file)[1] < 1e-4
    found: dict[str, Tensor] = {}
    for name, norm in student.named_modules():
        if name.endswith("layernorm"):
            norm.register_forward_hook(
                lambda _, __, output, name=name: found.update({name: output.detach()[0]})
            )
    student(torch.from_numpy(np.concatenate(text()).astype(np.int64))[None])
    assert len(found) == 2 * tiny.layers
    for name, output in found.items():
        sizes = output.square().mean(dim=0).sqrt()
        assert sizes.max() < 1.5 * sizes.median(), name


def test_one_matrix_of_two_is_the_outputs(base: Path) -> None:
    """A tied student of a teacher with two matrices gets the outputs'."""
    tiny = Tiny(seed=13)
    rows, tied = canonical(tiny)["embed"], shape(tiny, tied=True)
    same = read_gguf(write_tiny(base / "threefold.gguf", tiny, {"output.weight": 3.0 * rows}))
    assert off_by(initialized(same, tied), same)[1] < 1e-4
    other = LlamaWeights(written(base, tiny))
    table = initialized(other.file, tied).lm_head.weight.detach()
    output = torch.from_numpy(other.output_rows(0, VOCABULARY))
    assert (table / table.std() - output / output.std()).abs().max() < 1e-3


def test_surplus_can_learn(base: Path) -> None:
    """A silent unit between two zero matrices would stay silent for ever."""
    tiny = Tiny(tied=True, seed=1)
    student = initialized(written(base, tiny), shape(tiny, width=72, feed_forward=120, layers=4))
    row = torch.from_numpy(text(1)[0].astype(np.int64))[None]
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    for _ in range(2):  # after the first step the directions beyond the teacher's are in use
        optimizer.zero_grad()
        student(row).logits.square().mean().backward()
        optimizer.step()
    for name, parameter in student.named_parameters():
        if name.endswith("_proj.weight"):
            assert parameter.grad is not None, name
            for axis in (0, 1):
                assert (parameter.grad.abs().amax(dim=axis) > 0).all(), (name, axis)


def test_a_stream_of_few_directions_fits_a_narrow_student(base: Path) -> None:
    """A teacher that uses 36 of 64 directions: 40 hold all, whatever the gains of its norms."""
    tiny = Tiny(width=64, rank=36, seed=11)
    file = written(base, tiny)
    assert off_by(initialized(file, shape(tiny, width=40)), file)[1] < 2e-3


SMALLER: dict[str, tuple[Tiny, dict[str, int]]] = {
    "fewer layers": (Tiny(seed=7, layers=4), {"layers": 2}),
    "fewer units": (Tiny(seed=7), {"feed_forward": 40}),
    "fewer heads": (Tiny(seed=7), {"heads": 2, "kv_heads": 1}),
    "narrower": (Tiny(seed=7, width=64, rank=48), {"width": 40}),
    "narrower, tied": (Tiny(seed=7, width=64, tied=True, rank=48), {"width": 40}),
    "narrower heads": (Tiny(seed=7), {"head_width": 8}),
    "grouped heads": (Tiny(seed=7, kv_heads=4), {"kv_heads": 2}),
    "biases": (Tiny("qwen2", width=64, biases=True, seed=7), {}),
    "normalized heads": (Tiny("qwen3", seed=7), {}),
    "Gemma": (Tiny("gemma", tied=True, seed=7), {}),
    "Gemma 2": (Tiny("gemma2", tied=True, window=16, caps=(20.0, 20.0), seed=7, layers=2), {}),
    "Gemma 3": (Tiny("gemma3", tied=True, window=16, seed=7, width=64, rank=44), {"width": 48}),
    "all of it": (
        Tiny("qwen3", width=64, layers=4, heads=8, kv_heads=2, seed=7, rank=44, rope_theta=1e6),
        {"width": 40, "layers": 2, "heads": 2, "kv_heads": 1},
    ),
}


def test_a_smaller_student_starts_nearer_than_a_random_one(base: Path) -> None:
    """On other text than it looked at; the teacher is random, the hardest to compress."""
    other = text(6, 30, seed=9)
    for name, (tiny, changes) in SMALLER.items():
        file, config = written(base, tiny), shape(tiny, **changes)
        little = initialized(file, config, 1, 9)  # too little text for any correction
        students = (initialized(file, config, 60), build_student(config, 0), little)
        expected = teacher_logits(file, other)
        near, random, plain = (divergence(expected, answers(one, other)) for one in students)
        assert near < 0.85 * random, name
        assert near < plain, name


def test_negative_gains_are_kept(base: Path) -> None:
    """A narrow tied student whose final gain turns the same directions round as its teacher's."""
    tiny, nears = Tiny(width=64, rank=36, tied=True, seed=11), []
    other, config = text(6, 30, seed=9), shape(tiny, width=48)
    gain = np.abs(canonical(tiny)["norm"])
    for count in (0, 4):
        gain[:count] *= -1
        file = write_tiny(base / f"{count} negative.gguf", tiny, {"output_norm.weight": gain})
        student = initialized(read_gguf(file), config, 60)
        nears.append(divergence(teacher_logits(read_gguf(file), other), answers(student, other)))
        assert (student.model.norm.weight < 0).sum() == count
    assert nears[1] < 1.5 * nears[0]


@pytest.mark.needs_gguf
def test_a_real_teacher_is_kept_in_part(example_gguf: GGUFTeacher) -> None:
    """On the example teacher's own text: with less depth, or half of both, far below random."""
    beginnings = [[np.array([example_gguf.info.bos], dtype=np.int32)]] * 96
    spoken = example_gguf.generate(GenerationRequest(beginnings, Sampling(max_length=96, seed=1)))
    other, seen = spoken[:8], [tokens for tokens in spoken[8:] if len(tokens) > 1]
    expected = torch.from_numpy(example_gguf.logits(other))
    for width, layers, share in ((256, 4, 0.05), (128, 3, 0.25)):
        config = SO8TConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            intermediate_size=width * 5 // 2,
            rms_norm_eps=1e-5,
        )
        students = (
            student_from_teacher(config, example_gguf.file, seen, 0, quiet),
            build_student(config, 0),
        )
        near, random = (divergence(expected, answers(one, other)) for one in students)
        assert near < share * random, width


@pytest.mark.slow
@pytest.mark.needs_gguf
def test_gemma_3_is_kept_in_part() -> None:
    """At most half as far away as random layers, at a seventh of its layers and a fifth of its
    width; 262,144 tokens are not held more often than needed."""
    with GGUFTeacher(real_teacher("gemma3"), threads=1) as teacher:
        other, seen = wikitext(teacher)
        like, size = likeness(teacher.info), StudentSize(128, 3)
        config = student_config(size, vocab_size=262_144, context_length=128, like=like)
        expected = torch.from_numpy(teacher.logits(other))
        students = (
            student_from_teacher(config, teacher.file, seen, 0, quiet),
            build_student(config, 0),
        )
    near, random = (divergence(expected, answers(one, other)) for one in students)
    assert near < 0.5 * random


@pytest.mark.slow
@pytest.mark.needs_gguf
def test_a_narrow_smollm2_is_kept_in_part() -> None:
    """Two of its final norm's gains are negative, and carry half of the stream."""
    with GGUFTeacher(real_teacher("smollm2"), threads=1) as teacher:
        other, seen = wikitext(teacher)
        like, size = likeness(teacher.info), StudentSize(512, 6)
        config = student_config(size, vocab_size=49_152, context_length=128, like=like)
        expected = torch.from_numpy(teacher.logits(other))
        student = student_from_teacher(config, teacher.file, seen, 0, quiet)
    assert divergence(expected, answers(student, other)) < 3.0  # 7.5 with gains' signs left out


def test_equal_arguments_give_equal_bytes(base: Path) -> None:
    """And leave PyTorch's and NumPy's random state alone."""
    tiny = Tiny(seed=7, width=64)
    file, config = written(base, tiny), shape(tiny, width=40, layers=2)
    state = torch.get_rng_state()
    reported: list[int] = []
    first = student_from_teacher(
        config, file, text(), 3, lambda done, message: reported.append(done)
    )
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    second = student_from_teacher(config, file, copy.deepcopy(text()), 3, quiet)
    for name, values in first.state_dict().items():
        assert torch.equal(values, second.state_dict()[name]), name
    assert reported == sorted(reported) and reported[-1] == 2


def test_unusable_teachers_are_refused(base: Path) -> None:
    """Another rotary base, too few tokens, another architecture, no text."""
    file = written(base, Tiny())
    for config, reason in (
        (shape(Tiny(), rope_theta=1e6), "rotary base"),
        (shape(Tiny(), {"vocab_size": 1000}), "1024 tokens"),
    ):
        with pytest.raises(UnusableTeacher, match=reason):
            require_usable_weights(config, file)
        with pytest.raises(UnusableTeacher, match=reason):
            initialized(file, config)
    path = write_tiny(base / "other.gguf", Tiny(), architecture="falcon")
    with pytest.raises(NotALlama, match="falcon"):
        initialized(read_gguf(path), shape(Tiny()))
    with pytest.raises(UnusableTeacher, match="text"):
        student_from_teacher(shape(Tiny()), file, [], 0, quiet)


# -- the parts -----------------------------------------------------------------------------------


def test_short_text_is_enough_to_run(base: Path) -> None:
    """One token."""
    tiny = Tiny(layers=2)
    for name, value in (
        initialized(written(base, tiny), shape(tiny, width=40), 1, 1).state_dict().items()
    ):
        assert torch.isfinite(value).all(), name
