"""The check before training: sound students pass without a trace, each fault is named."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.errors import GradientsDoNotFlow
from distill.training.gradient_check import check_gradients, gradient_table
from students.adapter.adapter import KINDS, AdaptedStudent, adapt
from students.adapter.base_model import AdapterSettings
from students.model.heads import certainty
from tests.support.students import (
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
        name: one.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for name, one in tensors.items()
    }


def noisy(student: AdaptedStudent) -> Tensor:
    """A loss that uses up random numbers of every kind."""
    random.random()
    np.random.rand()
    return loss_of(student) + 0.0 * torch.rand(1).sum()


def modes_of(student: AdaptedStudent) -> list[bool]:
    return [module.training for module in student.modules()]


def refusal(student: AdaptedStudent, loss: Callable[[], Tensor]) -> str:
    """What the check says against a student, which it leaves as it was."""
    before, modes = weights_of(student), modes_of(student)
    with pytest.raises(GradientsDoNotFlow) as caught:
        check_gradients(student, loss)
    assert weights_of(student) == before and modes_of(student) == modes
    assert all(one.grad is None for one in student.parameters())
    return str(caught.value)


@every_base
@every_quant
def test_a_sound_student_passes_without_a_trace(kind: str, quant: str, tmp_path: Path) -> None:
    """Weights, modes, random numbers and gradients; with activation checkpointing too."""
    student = make_adapted(base_of(kind, quant, tmp_path))
    for checkpointing in (False, True):
        if checkpointing:
            student.activation_checkpointing_enable()
        student.train()
        student.layers()[0].eval()
        before, modes = weights_of(student), modes_of(student)
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        report = check_gradients(student, lambda: noisy(student))
        assert weights_of(student) == before and modes_of(student) == modes, checkpointing
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2], checkpointing
        assert torch.equal(torch.get_rng_state(), states[2]), checkpointing
        assert all(one.grad is None for one in student.parameters()), checkpointing
        assert tuple(row.kind for row in report) == KINDS, checkpointing
        *rows, base = report
        for row in rows:
            assert row.with_gradient == row.tensors > 0, (row, checkpointing)
            assert 0 < row.least <= row.largest < math.inf, (row, checkpointing)
        assert base.with_gradient == 0 and base.tensors > 10 and math.isnan(base.least)


def test_the_norms_are_the_gradients() -> None:
    """Of all but LoRA's A, from a backward pass by hand; A's is zero there and not reported."""
    student = make_adapted()
    report = {row.kind: row for row in check_gradients(student, lambda: loss_of(student))}
    loss_of(student.train()).backward()
    for kind, named in student.parameters_by_kind().items():
        norms = [float(one.grad.norm()) for one in named.values() if one.grad is not None]
        if kind == "LoRA A":
            assert max(norms) == 0.0 < report[kind].least
        elif kind != "base":
            found = report[kind].least, report[kind].largest
            assert found == pytest.approx((min(norms), max(norms)), rel=1e-5), kind


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


def test_frozen_weights() -> None:
    """Each kind is named, with its first three tensors and the number of others."""
    student = make_adapted()
    for part, count, names in (
        ("0.mlp.up_proj.lora_A", "LoRA A: 1", r"model\.layers\.0\.mlp\.up_proj\.lora_A\.weight\)"),
        ("lora_B", "LoRA B: 14", r".*, .*, .* and 11 more\)"),
        ("1.self_attn.gate.command", "gates: 1", r"model\.layers\.1\.self_attn\.gate\.command\)"),
        ("safety_head", "safety head: 2", r"safety_head\.linear\.weight, safety_head\.linear\.b"),
    ):
        frozen = [one for name, one in student.named_parameters() if part in name]
        for parameter in frozen:
            parameter.requires_grad_(False)
        found = refusal(student, lambda: loss_of(student))
        assert re.search(rf"{count} without requires_grad \({names}", found), (part, found)
        for parameter in frozen:
            parameter.requires_grad_(True)


def test_a_detached_head() -> None:
    """A head left out of the loss, one behind a detach, and one that is multiplied by nothing."""
    student = make_adapted()

    def loss(weight: float | None, detached: bool = False) -> Tensor:
        output = student(drawn())
        states = output.last_hidden_state
        agreed = student.verification_head(states, certainty(output.logits))
        total = output.logits.square().mean() + agreed.mean()
        decision = student.safety_head(states)[..., 0].mean()
        decision = decision.detach() if detached else decision
        return total if weight is None else total + weight * decision

    missing = "safety head: 2 without a gradient (safety_head.linear.weight"
    assert missing in refusal(student, lambda: loss(None))
    assert missing in refusal(student, lambda: loss(1.0, detached=True))
    assert "safety head: 2 with a gradient of zero" in refusal(student, lambda: loss(0.0))
    nothing = refusal(student, lambda: loss(1.0).detach())
    assert "the loss depends on no trainable weight" in nothing


def test_a_base_that_would_be_trained() -> None:
    """It is asked for before the pass, or within it."""
    student = make_adapted()
    norm = student.base.model.norm.weight
    norm.requires_grad_(True)
    found = refusal(student, lambda: loss_of(student))
    assert "base: 1 with requires_grad (model.norm.weight)" in found
    norm.requires_grad_(False)

    def thaws() -> Tensor:
        return loss_of(student) + norm.requires_grad_(True).sum()

    message = r"base: 1 with a gradient \(model\.norm\.weight\)"
    with pytest.raises(GradientsDoNotFlow, match=message):
        check_gradients(student, thaws)


class Corrupted(torch.autograd.Function):
    """Passes the value on and corrupts its gradient."""

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
        return loss_of(student) + Corrupted.apply(student.safety_head(states)).sum()

    found = refusal(student, loss)
    message = r"gradients do not flow; safety head: 2 with a gradient that is not finite \([^;]*$"
    assert re.search(message, found)
    found = refusal(student, lambda: Corrupted.apply(loss_of(student)))
    for kind in ("LoRA A: 14", "LoRA B: 14", "gates: 4"):
        assert f"{kind} with a gradient that is not finite (" in found, kind


def test_a_closed_path_that_only_b_shows() -> None:
    """A's gradient is zero at the start; the second pass tells a sound A from a cut one."""
    student = make_adapted()
    layer = student.layers()[1].mlp.down_proj

    class Cut(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.weight = inner, inner.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).detach() + 0.0 * F.linear(x, self.weight)

    layer.lora_A["default"] = Cut(layer.lora_A["default"])
    found = refusal(student, lambda: loss_of(student))
    assert "LoRA A: 1 with a gradient of zero (model.layers.1.mlp.down_proj" in found


def test_after_training_too() -> None:
    """B need not be zero, and is put back bit by bit, also where a value is a negative zero."""
    student = make_adapted()
    disturb(student)
    with torch.no_grad():
        next(iter(student.parameters_by_kind()["LoRA B"].values()))[0, 0] = -0.0
    before = weights_of(student)
    check_gradients(student, lambda: loss_of(student))
    assert weights_of(student) == before
