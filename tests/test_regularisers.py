"""PET, inertia and non-commutation against loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.regularisers import inertia, non_commutation, pet_weight, second_difference
from students import so8


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Seeded float64 numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn_rotations(layers: int = 2, blocks: int = 3, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Seeded rotations ``[L, 2, N, 8, 8]`` in float64."""
    return so8.rotation(scale * drawn(layers, 2, blocks, 28, seed=seed))


def reference_bend(hidden: Tensor, lengths: list[int]) -> float:
    """Σ over sequences and inner tokens of the mean over D of (h[t+1] − 2 h[t] + h[t−1])²."""
    values, total = hidden.detach().double().numpy(), 0.0
    for row, length in enumerate(lengths):
        for t in range(1, length - 1):
            bend = values[row, t + 1] - 2 * values[row, t] + values[row, t - 1]
            total += sum(float(b) ** 2 for b in bend) / len(bend)
    return total


def reference_inertia(rotations: Tensor, average: Tensor) -> float:
    """Mean over layers, both rotations and blocks of Σ_ij (R_ij − M_ij)²."""
    pairs = zip(rotations.double().reshape(-1, 64), average.double().reshape(-1, 64), strict=True)
    return float(np.mean([((r - m).numpy() ** 2).sum() for r, m in pairs]))


def reference_shortfall(rotations: Tensor, margin: float) -> float:
    """Mean over layers and blocks of max(0, margin − ‖R_cmd R_safe − R_safe R_cmd‖)²."""
    values, shortfalls = rotations.detach().double().numpy(), []
    for layer in values:
        for safe, command in zip(layer[0], layer[1], strict=True):
            norm = np.sqrt(((command @ safe - safe @ command) ** 2).sum())
            shortfalls.append(max(0.0, margin - norm) ** 2)
    return float(np.mean(shortfalls))


@pytest.mark.parametrize("lengths", [[9, 9, 9], [9, 4, 3], [2, 1, 9], [3, 3, 3]])
def test_second_difference_against_loops(lengths: list[int]) -> None:
    """Only triples inside the real tokens count, whatever the padding holds."""
    hidden = drawn(3, 9, 5)
    got = float(second_difference(hidden, torch.tensor(lengths)))
    assert got == pytest.approx(reference_bend(hidden, lengths), rel=1e-5)
    padded = hidden.clone()
    for row, length in enumerate(lengths):
        padded[row, length:] = 1e6
    assert float(second_difference(padded, torch.tensor(lengths))) == pytest.approx(got, rel=1e-6)


def test_straight_line_has_no_bend() -> None:
    """h[t] = a + t b gives 0; a kink of height 2 in all dimensions gives 4 at its tip and 1 beside it."""
    steps = torch.arange(7.0)[None, :, None]
    line = torch.tensor([1.0, -2.0, 0.5]) + steps * torch.tensor([0.25, 3.0, -1.5])
    assert float(second_difference(line, torch.tensor([7]))) == 0.0
    kink = torch.zeros(1, 7, 3)
    kink[:, 3] = 2.0
    assert float(second_difference(kink, torch.tensor([7]))) == pytest.approx(4.0 + 16.0 + 4.0)


@pytest.mark.parametrize("tokens", [1, 2, 3, 6])
@pytest.mark.parametrize("length", [0, 1, 2])
def test_fewer_than_three_tokens_have_no_bend(tokens: int, length: int) -> None:
    """No triple, no term: 0 with a gradient of 0, however wide the batch is padded."""
    hidden = drawn(2, tokens, 4).requires_grad_()
    bend = second_difference(hidden, torch.tensor([length, 1]).clamp(max=tokens))
    bend.backward()
    assert bend.item() == 0.0
    assert hidden.grad is not None and float(hidden.grad.abs().max()) == 0.0


def test_second_difference_of_parts_equals_the_whole() -> None:
    """A sum over sequences: any division into micro-batches gives the same, and float32 is enough."""
    hidden, lengths = drawn(6, 8, 4), torch.tensor([8, 2, 5, 3, 7, 1])
    parts = [second_difference(hidden[i], lengths[i]) for i in torch.arange(6).split(2)]
    whole = second_difference(hidden, lengths)
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)
    assert second_difference(hidden.bfloat16(), lengths).dtype == torch.float32


def test_second_difference_gradient_by_finite_differences() -> None:
    """The gradient is that of the loop, and 0 on padding."""
    hidden, lengths, step = drawn(2, 6, 3), [6, 4], 1e-6
    leaf = hidden.clone().requires_grad_()
    second_difference(leaf, torch.tensor(lengths)).backward()
    assert leaf.grad is not None
    for row in range(2):
        for t in range(6):
            moved = []
            for sign in (1, -1):
                changed = hidden.clone()
                changed[row, t, 1] += sign * step
                moved.append(reference_bend(changed, lengths))
            expected = (moved[0] - moved[1]) / (2 * step)
            assert float(leaf.grad[row, t, 1]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(0.0, 0.1), (0.2999, 0.1), (0.3, 0.2), (0.5, 0.2), (0.6999, 0.2), (0.7, 0.4), (0.99, 0.4), (1.0, 0.4)],
)
def test_pet_weight_has_three_phases(fraction: float, expected: float) -> None:
    """The weight changes at 30 % and at 70 % of training, and nowhere else."""
    assert pet_weight((0.1, 0.2, 0.4), fraction) == expected


def test_inertia_against_loops() -> None:
    """Squared Frobenius distance, averaged over every single rotation; 0 at the average."""
    rotations, average = drawn_rotations(), drawn_rotations(seed=1)
    got = float(inertia(rotations, average))
    assert got == pytest.approx(reference_inertia(rotations, average), rel=1e-12)
    assert float(inertia(rotations, rotations)) == 0.0
    one = rotations.clone()
    one[0, 1, 2, 3, 4] += 1.0  # one entry of one of 2 × 2 × 3 rotations
    assert float(inertia(one, rotations)) == pytest.approx(1 / 12, rel=1e-12)


@pytest.mark.parametrize("margin", [0.01, 0.5, 5.0])
def test_non_commutation_against_loops(margin: float) -> None:
    """Squared shortfall below the margin, averaged over blocks; blocks beyond it add nothing."""
    rotations = torch.cat([drawn_rotations(1, scale=scale) for scale in (0.02, 0.3, 1.0)])
    got = float(non_commutation(rotations, margin))
    assert got == pytest.approx(reference_shortfall(rotations, margin), rel=1e-9, abs=1e-15)


def test_non_commutation_at_and_beyond_the_margin() -> None:
    """margin² for commuting rotations, 0 for rotations that are far from commuting."""
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
        moved = []
        for sign in (1, -1):
            changed = parameters.clone()
            changed[place] += sign * step
            moved.append(reference_shortfall(so8.rotation(changed), 0.5))
        expected = (moved[0] - moved[1]) / (2 * step)
        assert float(leaf.grad[place]) == pytest.approx(expected, rel=1e-4, abs=1e-8)
    assert float(non_commutation(so8.rotation(parameters - 0.01 * leaf.grad), 0.5)) < before.item()
