"""Attention within packed sequences, against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from students.model import decoder, packing
from students.model.packing import (
    BLOCK,
    KEPT_NARROW,
    PackedRow,
    attend_packed,
    attend_side_by_side,
)
from tests.support.students import grouped_student, make_student


def reference(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """Σ_j softmax_j(q_i · k_j / √W) v_j over j ≤ i of the same sequence, ``[N, H, W]``, float64."""
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    order = torch.arange(len(sequence))
    seen = (sequence[:, None] == sequence) & (order[:, None] >= order)
    mixed = []
    for head in range(query.shape[1]):
        other = head * key.shape[1] // query.shape[1]
        scores = query[:, head].double() @ key[:, other].double().T / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        mixed.append(weights @ value[:, other].double())
    return torch.stack(mixed, dim=1)


def test_attention_is_that_of_each_sequence() -> None:
    """Output and gradients, in both ways, for any lengths and grouping of heads."""
    torch.manual_seed(0)
    layouts = ([1], [1, 1, 1], [5, 5, 5], [3, 9, 1, 7, 7, 2], [2 * BLOCK + 40, 3, BLOCK, 1, 40, 40])
    for lengths in layouts:
        row = PackedRow(torch.tensor(lengths))
        steps = np.concatenate([np.arange(length) for length in lengths])
        assert row.positions()[0].tolist() == steps.tolist(), lengths
        for heads, others in ((4, 4), (4, 2), (3, 1)):
            parts = [
                torch.randn(sum(lengths), count, 8, requires_grad=True)
                for count in (heads, others, others)
            ]
            grad = torch.randn(sum(lengths), heads, 8)
            wanted = reference(*parts, lengths)
            slopes = torch.autograd.grad(wanted, parts, grad.double())
            in_row = attend_packed(*(part.transpose(0, 1)[None] for part in parts), row)
            for got in (in_row[0].transpose(0, 1), attend_side_by_side(*parts, row)):
                torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
                found = torch.autograd.grad(got, parts, grad)
                for mine, theirs in zip(found, slopes, strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_bfloat16_attention_where_a_processor_has_its_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Output and gradients from bfloat16 products, in a row and side by side: within a few of its
    roundings of the definition, for one block, several, and more than are kept."""
    for module in (decoder, packing):
        monkeypatch.setattr(module, "has_bfloat16_products", lambda: True)
    torch.manual_seed(0)
    for length, heads, others in ((5, 4, 2), (BLOCK + 40, 3, 3), (KEPT_NARROW + 70, 2, 1)):
        parts = [
            torch.randn(2 * length, count, 16).bfloat16().requires_grad_()
            for count in (heads, others, others)
        ]
        grad = torch.randn(2 * length, heads, 16).bfloat16()
        wanted = reference(*parts, [length, length])
        slopes = torch.autograd.grad(wanted, parts, grad.double())
        apart = [part.unflatten(0, (2, length)).transpose(1, 2) for part in parts]
        beside = decoder.attend(apart[0], apart[1], apart[2], None, True, heads != others)
        row = PackedRow(torch.tensor([length, length]))
        in_row = attend_packed(*(part.transpose(0, 1)[None] for part in parts), row)
        for got in (beside.transpose(1, 2).flatten(0, 1), in_row[0].transpose(0, 1)):
            assert got.dtype == torch.bfloat16
            found = torch.autograd.grad(got, parts, grad)
            for mine, theirs in zip((got, *found), (wanted, *slopes), strict=True):
                error = (mine - theirs).detach().norm() / theirs.detach().norm()
                assert float(error) < 0.01, (length, float(error))


@pytest.mark.parametrize("make", [make_student, grouped_student])
def test_packed_sequences_do_not_see_one_another(make: type) -> None:
    """Each has the states it has alone, also with compiled layers."""
    student = make()
    rows = [torch.randint(1, 40, (length,)) for length in (4, 11, 1, 6, 6)]
    alone = [student(row[None]).last_hidden_state[0] for row in rows]
    lengths = torch.tensor([len(row) for row in rows])
    for compiled in (False, True):
        if compiled:
            torch._dynamo.reset()
            student.model.layers[0].compile(backend="aot_eager")
        packed = student(torch.cat(rows)[None], lengths=lengths).last_hidden_state[0]
        torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)
