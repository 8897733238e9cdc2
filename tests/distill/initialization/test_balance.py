"""Balanced scales: the same function, gains of size 1."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from distill.initialization.balance import balance
from distill.initialization.from_teacher import student_from_teacher
from students.model.build import build_student
from students.model.config import SO8TConfig
from students.model.decoder import SO8TForCausalLM
from teachers.gguf.file import read_gguf
from tests.distill.initialization.test_from_teacher import answers, quiet, shape, text
from tests.support.tiny_models import Tiny, write_tiny


def size(x: Tensor) -> float:
    """Root mean square."""
    return float(x.square().mean().sqrt())


def gains(student: SO8TForCausalLM) -> dict[str, float]:
    return {
        name: size(value)
        for name, value in student.state_dict().items()
        if name.endswith("norm.weight")
    }


def test_scales_change_and_the_function_does_not() -> None:
    """Weights of sizes between 1e-3 and 1e3, one part silent; tied and untied, grouped heads."""
    draw = torch.Generator().manual_seed(0)
    for tied in (True, False):
        config = SO8TConfig(
            vocab_size=1024,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            initializer_range=0.2,
            rms_norm_eps=1e-12,
            tie_word_embeddings=tied,
        )
        student = build_student(config, 0)
        with torch.no_grad():
            for name, value in student.named_parameters():
                if ".gate." not in name:
                    value.mul_(10.0 ** (6.0 * float(torch.rand((), generator=draw)) - 3.0))
            student.model.layers[1].mlp.down_proj.weight.zero_()  # type: ignore[union-attr]
            student.model.norm.weight.div_(size(answers(student, text(2))))
        before = answers(student, text(2))
        balance(student)
        assert (answers(student, text(2)) - before).abs().max() < 1e-4, tied
        assert all(abs(value - 1.0) < 1e-5 for value in gains(student).values()), tied
        weights = {name: size(value) for name, value in student.state_dict().items()}
        for first, second in (
            ("self_attn.v_proj", "self_attn.o_proj"),
            ("mlp.up_proj", "mlp.down_proj"),
        ):
            one, two = (weights[f"model.layers.0.{name}.weight"] for name in (first, second))
            assert abs(one / two - 1.0) < 1e-4, (tied, first)


def test_a_fitted_student_has_gains_of_one(tmp_path: Path) -> None:
    """Gemma multiplies its embeddings by the root of its width: the final gain was a fifth."""
    tiny = Tiny("gemma3", tied=True, window=16, seed=7, width=64, rank=44)
    file = read_gguf(write_tiny(tmp_path / "gemma.gguf", tiny))
    student = student_from_teacher(shape(tiny, width=48), file, text(), 0, quiet)
    assert all(abs(value - 1.0) < 1e-4 for value in gains(student).values()), gains(student)
