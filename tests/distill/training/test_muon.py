"""Muon against its definition, and when it is chosen."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distill.config.schema import TrainConfig
from distill.training.optimizer import (
    BYTES_TOGETHER,
    Muon,
    build_optimizer,
    choose_optimizer,
    orthogonalized,
    takes_orthogonal_steps,
    tokens_of_a_step,
)
from tests.support.students import make_student

MUON = TrainConfig(optimizer="muon", weight_decay=0.1)


def test_orthogonalized_against_singular_values() -> None:
    """Directions are those of the decomposition, and values that were 300 apart are within 0.15
    and 1.9; zeros stay zeros, a scale or matrices beside it change nothing; bfloat16 differs by its
    rounding."""
    draw = torch.Generator().manual_seed(0)
    for rows, columns in ((8, 8), (24, 8), (8, 40), (64, 171), (1, 5)):
        u, _, v = torch.linalg.svd(
            torch.randn(rows, columns, generator=draw, dtype=torch.float64), full_matrices=False
        )
        values = torch.logspace(0, -2.5, len(v), dtype=torch.float64)
        matrix = (u * values) @ v
        single = matrix.float()[None]
        result = orthogonalized(single)[0].double()
        moved = u.T @ result @ v.T
        assert torch.allclose(moved, moved.diag().diag(), atol=1e-3), (rows, columns)
        assert moved.diag().min() > 0.15 and moved.diag().max() < 1.9, (rows, columns)
        beside = torch.cat((torch.zeros_like(single), 1e-6 * single, single))
        zero, same, other = orthogonalized(beside).double()
        assert not zero.any() and torch.allclose(other, result, atol=1e-5), (rows, columns)
        assert torch.allclose(same, result, atol=1e-3), (rows, columns)
        narrow = orthogonalized(single.bfloat16())[0].double()
        assert (narrow - result).norm() < 0.2 * result.norm(), (rows, columns)


@pytest.mark.parametrize("together", [1, BYTES_TOGETHER])
def test_steps_of_muon_and_of_adamw(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of each parameter from the definitions: matrices by momentum of the gradient made
    orthogonal, at the size that is said, one by one and side by side; all others as AdamW alone
    would."""
    monkeypatch.setattr("distill.training.optimizer.BYTES_TOGETHER", together)
    student, alone = make_student(16, 1, 48), make_student(16, 1, 48)
    ours, adamw = build_optimizer(student, MUON, 16), build_optimizer(alone, TrainConfig(), 16)
    assert isinstance(ours, Muon) and not isinstance(adamw, Muon)
    rate, expected, momenta = 0.5 / 16, {}, {}
    before = {name: one.detach().double() for name, one in student.named_parameters()}
    for step in range(2):
        draw = torch.Generator().manual_seed(step)
        for (name, one), other in zip(student.named_parameters(), alone.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=draw)
            other.grad = one.grad.clone()
            if takes_orthogonal_steps(name, one):
                gradient = one.grad.double()
                momentum = 0.95 * momenta.get(name, 0.0) + 0.05 * gradient
                momenta[name] = momentum
                ahead = 0.05 * gradient + 0.95 * momentum
                ahead = orthogonalized(ahead.float()[None])[0].double()
                weight = expected.get(name, before[name])
                size = 0.6 * math.sqrt(max(one.shape))
                expected[name] = weight * (1 - rate * 0.1) - rate * size * ahead
        ours.step()
        adamw.step()
    assert len(expected) == 7
    others = dict(alone.named_parameters())
    for name, one in student.named_parameters():
        if name in expected:
            torch.testing.assert_close(one.detach().double(), expected[name], rtol=1e-4, atol=1e-5)
            moved = (expected[name] - before[name]).square().mean().sqrt()
            assert 0.3 * rate < moved < 2 * rate, name
        else:
            assert torch.equal(one, others[name]), name
    again = build_optimizer(student, MUON, 16)
    again.load_state_dict(ours.state_dict())
    for one in student.parameters():
        assert all(
            torch.equal(again.state[one][key], ours.state[one][key]) for key in ours.state[one]
        )


def test_muon_is_chosen_where_it_pays() -> None:
    """By the tokens of a step; never for a student without matrices of its own."""
    student = make_student(64, 2, 512)
    for tokens, config, expected in (
        (0.0, TrainConfig(), "adamw"),
        (16.0, TrainConfig(), "adamw"),
        (4096.0, TrainConfig(), "muon"),
        (4096.0, TrainConfig(optimizer="adamw"), "adamw"),
        (0.0, MUON, "muon"),
    ):
        assert choose_optimizer(student, config, tokens) == expected, (tokens, config.optimizer)
    for share, expected in ((0.58, "muon"), (0.62, "adamw")):  # of the other products of a step
        own, others = 0.0, 2.0 * student.lm_head.weight.numel()  # for each token and direction
        for name, one in student.model.layers.named_parameters():
            if one.ndim == 2 and name.endswith("_proj.weight"):
                few, many = sorted(one.shape)
                # X Xᵀ, its square, and that times X: of 2 operations each, three times.
                own += 3 * (2 * few * few * many + 2 * few**3 + 2 * few * few * many)
                others += 2.0 * one.numel()
        tokens = own / (share * 3 * others)
        assert choose_optimizer(student, TrainConfig(), tokens) == expected, share
    for parameter in student.model.layers.parameters():
        parameter.requires_grad_(False)
    assert choose_optimizer(student, TrainConfig(), 4096.0) == "adamw"
    lengths = np.array([3, 5, 7], dtype=np.int32)
    assert tokens_of_a_step(lengths, [[0, 1], [2]]) == 7.5
