"""PET, inertia and non-commutation against loops in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from distill.losses.so8t_regularizers import inertia, non_commutation, pet_weight, second_difference
from students.model import so8
from tests.support.references import reference_bend, reference_inertia, reference_shortfall


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Seeded float64 numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn_rotations(layers: int = 2, blocks: int = 3, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Seeded rotations ``[L, 2, N, 8, 8]`` in float64."""
    return so8.rotation(scale * drawn(layers, 2, blocks, 28, seed=seed))


def bend(hidden: Tensor, lengths: Tensor) -> Tensor:
    """The second difference within the first ``lengths`` tokens of each row."""
    return second_difference(hidden, torch.arange(hidden.shape[1])[None] < lengths[:, None])


def test_second_difference_against_loops() -> None:
    """Only triples inside the real tokens count, whatever the padding; a sum over sequences."""
    hidden = drawn(3, 9, 5)
    for lengths in ([9, 9, 9], [9, 4, 3], [2, 1, 9], [3, 3, 3]):
        got = float(bend(hidden, torch.tensor(lengths)))
        assert got == pytest.approx(reference_bend(hidden, lengths), rel=1e-5), lengths
        padded = hidden.clone()
        for row, length in enumerate(lengths):
            padded[row, length:] = 1e6
        found = float(bend(padded, torch.tensor(lengths)))
        assert found == pytest.approx(got, rel=1e-6), lengths
        parts = [bend(hidden[i], torch.tensor(lengths)[i]) for i in ([0, 2], [1])]
        assert float(sum(parts)) == pytest.approx(got, rel=1e-6), lengths
    assert bend(hidden.bfloat16(), torch.tensor(lengths)).dtype == torch.float32


def test_straight_line_has_no_bend() -> None:
    """A line gives 0; a kink of height 2 gives 4 at its tip and 1 beside it."""
    steps = torch.arange(7.0)[None, :, None]
    line = torch.tensor([1.0, -2.0, 0.5]) + steps * torch.tensor([0.25, 3.0, -1.5])
    assert float(bend(line, torch.tensor([7]))) == 0.0
    kink = torch.zeros(1, 7, 3)
    kink[:, 3] = 2.0
    assert float(bend(kink, torch.tensor([7]))) == pytest.approx(4.0 + 16.0 + 4.0)


def test_fewer_than_three_tokens_have_no_bend() -> None:
    """No triple, no term: 0 with a gradient of 0, however wide the batch is padded."""
    for tokens, length in product((1, 2, 3, 6), (0, 1, 2)):
        hidden = drawn(2, tokens, 4).requires_grad_()
        found = bend(hidden, torch.tensor([length, 1]).clamp(max=tokens))
        found.backward()
        assert found.item() == 0.0, (tokens, length)
        assert hidden.grad is not None and not hidden.grad.any(), (tokens, length)


def test_second_difference_gradient_by_finite_differences() -> None:
    """The gradient is that of the loop, and 0 on padding."""
    hidden, lengths, step = drawn(2, 6, 3), [6, 4], 1e-6
    leaf = hidden.clone().requires_grad_()
    bend(leaf, torch.tensor(lengths)).backward()
    assert leaf.grad is not None
    for row, t in product(range(2), range(6)):
        move = torch.zeros_like(hidden)
        move[row, t, 1] = step
        rise = reference_bend(hidden + move, lengths) - reference_bend(hidden - move, lengths)
        found = float(leaf.grad[row, t, 1])
        assert found == pytest.approx(rise / (2 * step), rel=1e-4, abs=1e-5), (row, t)


def test_pet_weight_has_three_phases() -> None:
    """The weight changes at 30 % and at 70 % of training, and nowhere else."""
    for expected, fractions in (
        (0.1, (0.0, 0.2999)),
        (0.2, (0.3, 0.5, 0.6999)),
        (0.4, (0.7, 0.99, 1)),
    ):
        for fraction in fractions:
            assert pet_weight((0.1, 0.2, 0.4), fraction) == expected, fraction


def test_inertia_against_loops() -> None:
    """Squared Frobenius distance, averaged over every single rotation; 0 at the average."""
    rotations, average = drawn_rotations(), drawn_rotations(seed=1)
    got = float(inertia(rotations, average))
    assert got == pytest.approx(reference_inertia(rotations, average), rel=1e-12)
    assert float(inertia(rotations, rotations)) == 0.0
    one = rotations.clone()
    one[0, 1, 2, 3, 4] += 1.0  # one entry of one of 2 × 2 × 3 rotations
    assert float(inertia(one, rotations)) == pytest.approx(1 / 12, rel=1e-12)


def test_non_commutation_against_loops() -> None:
    """Squared shortfall below the margin, averaged over blocks; blocks beyond it add nothing."""
    rotations = torch.cat([drawn_rotations(1, scale=scale) for scale in (0.02, 0.3, 1.0)])
    for margin in (0.01, 0.5, 5.0):
        wanted = pytest.approx(reference_shortfall(rotations, margin), rel=1e-9, abs=1e-15)
        assert float(non_commutation(rotations, margin)) == wanted, margin
    same = drawn_rotations()
    same[:, 1] = same[:, 0]
    assert float(non_commutation(same, 0.25)) == pytest.approx(0.0625, rel=1e-9)
    assert float(non_commutation(drawn_rotations(), 0.1)) == 0.0


def test_non_commutation_pushes_apart() -> None:
    """Its gradient in the rotation parameters is that of the loop, and a step against it helps."""
    parameters, step = 0.05 * drawn(1, 2, 1, 28, seed=3), 1e-6
    leaf = parameters.clone().requires_grad_()
    before = non_commutation(so8.rotation(leaf), 0.5)
    before.backward()
    assert leaf.grad is not None
    for place in ((0, 0, 0, 0), (0, 1, 0, 13), (0, 0, 0, 27)):
        move = torch.zeros_like(parameters)
        move[place] = step
        high, low = (reference_shortfall(so8.rotation(parameters + m), 0.5) for m in (move, -move))
        expected = (high - low) / (2 * step)
        assert float(leaf.grad[place]) == pytest.approx(expected, rel=1e-4, abs=1e-8), place
    assert float(non_commutation(so8.rotation(parameters - 0.01 * leaf.grad), 0.5)) < before.item()
