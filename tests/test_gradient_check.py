"""The check before training: sound students pass without a trace, each fault is named."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.gradient_check import GradientsDoNotFlow, check_gradients, gradient_table
from students.adapter import KINDS, AdaptedStudent, adapt
from students.adapter_base import AdapterSettings
from students.heads import certainty
from tests.test_adapter import (
    VOCAB,
    base_of,
    disturb,
    drawn,
    every_base,
    every_quant,
    loss_of,
    make_adapted,
    make_base,
)


def weights_of(student: AdaptedStudent) -> dict[str, bytes]:
    tensors = student.state_dict(keep_vars=True) | student.own_weights()
    return {
        name: one.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, one in tensors.items()
    }


def noisy(student: AdaptedStudent) -> Tensor:
    """A loss that uses up random numbers of every kind."""
    random.random()
    np.random.rand()
    return loss_of(student) + 0.0 * torch.rand(1).sum()


def refused(student: AdaptedStudent, loss: Callable[[], Tensor], words: str) -> None:
    """The check refuses with these words, and leaves the student as it was."""
    before, modes = weights_of(student), [module.training for module in student.modules()]
    with pytest.raises(GradientsDoNotFlow, match=words):
        check_gradients(student, loss)
    assert weights_of(student) == before
    assert [module.training for module in student.modules()] == modes
    assert all(one.grad is None for one in student.parameters())


@every_base
@every_quant
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_sound_student_passes_without_a_trace(
    kind: str, quant: str, checkpointing: bool, tmp_path: Path
) -> None:
    student = make_adapted(base_of(kind, quant, tmp_path))
    if checkpointing:
        student.activation_checkpointing_enable()
    student.train()
    student.layers()[0].eval()
    before, modes = weights_of(student), [module.training for module in student.modules()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    report = check_gradients(student, lambda: noisy(student))
    assert weights_of(student) == before
    assert [module.training for module in student.modules()] == modes
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(one.grad is None for one in student.parameters())
    assert tuple(row.kind for row in report.kinds) == KINDS
    for row in report.kinds[:-1]:
        assert row.with_gradient == row.tensors > 0
        assert 0 < row.least <= row.largest < math.inf
    base = report.kinds[-1]
    assert base.with_gradient == 0 and base.tensors > 10 and math.isnan(base.least)


def test_the_norms_are_the_gradients() -> None:
    """Of everything but LoRA's A, from a backward pass by hand; A's is zero there and is not in the report."""
    student = make_adapted()
    report = {row.kind: row for row in check_gradients(student, lambda: loss_of(student)).kinds}
    loss_of(student.train()).backward()
    for kind, named in student.parameters_by_kind().items():
        norms = [float(one.grad.norm()) for one in named.values() if one.grad is not None]
        if kind == "LoRA A":
            assert max(norms) == 0.0 < report[kind].least
        elif kind != "base":
            assert (report[kind].least, report[kind].largest) == pytest.approx(
                (min(norms), max(norms)), rel=1e-5
            )


def test_the_table() -> None:
    """A row for each kind, also of a student without heads."""
    student = adapt(make_base(), AdapterSettings(rank=2), VOCAB, seed=0)
    report = check_gradients(student, lambda: student(drawn()).logits.square().mean())
    table = gradient_table(report)
    assert table.row_count == 4
    assert list(table.columns[0].cells) == ["LoRA A", "LoRA B", "gates", "base"]
    assert list(table.columns[1].cells) == ["14", "14", "4", "21"]
    assert list(table.columns[2].cells) == ["14", "14", "4", "0"]
    assert list(table.columns[3].cells)[-1] == "–"


def freeze(student: AdaptedStudent, part: str) -> None:
    for name, one in student.named_parameters():
        if part in name:
            one.requires_grad_(False)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (
            "0.mlp.up_proj.lora_A",
            r"LoRA A: 1 without requires_grad \(model\.layers\.0\.mlp\.up_proj\.lora_A\.weight\)",
        ),
        ("lora_B", r"LoRA B: 14 without requires_grad \(.*, .*, .* and 11 more\)"),
        (
            "1.self_attn.gate.command",
            r"gates: 1 without requires_grad \(model\.layers\.1\.self_attn\.gate\.command\)",
        ),
        (
            "safety_head",
            r"safety head: 2 without requires_grad \(safety_head\.linear\.weight, safety_head\.linear\.bias",
        ),
    ],
)
def test_frozen_weights(part: str, words: str) -> None:
    student = make_adapted()
    freeze(student, part)
    refused(student, lambda: loss_of(student), words)


def test_a_detached_head() -> None:
    """A head left out of the loss, one behind a detach, and one that is multiplied by nothing."""
    student = make_adapted()

    def loss(weight: float | None, detached: bool = False) -> Tensor:
        output = student(drawn())
        states = output.last_hidden_state
        agreed = student.verification_head(states, certainty(output.logits))
        total = output.logits.square().mean() + agreed.mean()
        told = student.safety_head(states)[..., 0].mean()
        told = told.detach() if detached else told
        return total if weight is None else total + weight * told

    missing = r"safety head: 2 without a gradient \(safety_head\.linear\.weight"
    refused(student, lambda: loss(None), missing)
    refused(student, lambda: loss(1.0, detached=True), missing)
    refused(student, lambda: loss(0.0), r"safety head: 2 with a gradient of zero")
    refused(student, lambda: loss(1.0).detach(), "the loss depends on no trainable weight")


def test_a_base_that_would_be_trained() -> None:
    student = make_adapted()
    student.base.model.norm.weight.requires_grad_(True)
    refused(student, lambda: loss_of(student), r"base: 1 with requires_grad \(model\.norm\.weight\)")
    student.base.model.norm.weight.requires_grad_(False)

    def thaws() -> Tensor:
        norm = student.base.model.norm.weight.requires_grad_(True)
        return loss_of(student) + norm.sum()

    with pytest.raises(GradientsDoNotFlow, match=r"base: 1 with a gradient \(model\.norm\.weight\)"):
        check_gradients(student, thaws)


class Spoilt(torch.autograd.Function):
    """Hands the value on and spoils its gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * torch.nan


def test_gradients_that_are_not_finite() -> None:
    """NaN in one head's gradient names that head alone; in the states, everything."""
    student = make_adapted()

    def loss() -> Tensor:
        states = student(drawn()).last_hidden_state.detach()
        return loss_of(student) + Spoilt.apply(student.safety_head(states)).sum()

    refused(
        student, loss, r"gradients do not flow; safety head: 2 with a gradient that is not finite \([^;]*$"
    )
    words = r"LoRA A: 14 with .* not finite .*; LoRA B: 14 with .* not finite .*; gates: 4 with .* not finite"
    refused(student, lambda: Spoilt.apply(loss_of(student)), words)


def test_a_closed_path_that_only_b_shows() -> None:
    """A's gradient is always zero at the start; the second pass tells a sound A from one that is cut off."""
    student = make_adapted()
    layer = student.layers()[1].mlp.down_proj

    class Cut(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.weight = inner, inner.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).detach() + 0.0 * F.linear(x, self.weight)

    layer.lora_A["default"] = Cut(layer.lora_A["default"])
    refused(
        student,
        lambda: loss_of(student),
        r"LoRA A: 1 with a gradient of zero \(model\.layers\.1\.mlp\.down_proj",
    )


def test_after_training_too() -> None:
    """B need not be zero, and is put back bit by bit, also where a value is a negative zero."""
    student = make_adapted()
    disturb(student)
    with torch.no_grad():
        next(iter(student.parameters_by_kind()["LoRA B"].values()))[0, 0] = -0.0
    before = weights_of(student)
    check_gradients(student, lambda: loss_of(student))
    assert weights_of(student) == before
