"""SO(8): layout of the parameters, exactness of the rotations, their gradient, and how they are applied."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from students import so8

Matrix = NDArray[np.float64]


def drawn(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Seeded float64 rotation parameters ``[*shape, 28]``."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, 28, generator=generator, dtype=torch.float64)


def reference_skew(parameters: NDArray[np.float64]) -> Matrix:
    """Lay 28 numbers out row by row above the diagonal, with opposite sign below it."""
    matrix = np.zeros((8, 8))
    place = 0
    for row in range(8):
        for column in range(row + 1, 8):
            matrix[row, column] = parameters[place]
            matrix[column, row] = -parameters[place]
            place += 1
    return matrix


def taylor_exponential(matrix: Matrix) -> Matrix:
    """Σ Aⁿ / n! summed term by term; for matrices of moderate norm."""
    total, term = np.eye(8), np.eye(8)
    for order in range(1, 120):
        term = term @ matrix / order
        total = total + term
    return total


def spectral_exponential(matrix: Matrix) -> Matrix:
    """exp(A) from the eigenvalues of the Hermitian matrix iA; for matrices of any norm."""
    values, vectors = np.linalg.eigh(1j * matrix)
    return (vectors @ np.diag(np.exp(-1j * values)) @ vectors.conj().T).real


def test_skew_layout_row_by_row() -> None:
    """The 28 parameters fill the strict upper triangle row by row; the rest follows from A = -Aᵀ."""
    parameters = torch.arange(1.0, 29.0, dtype=torch.float64)
    matrix = so8.skew_symmetric(parameters).numpy()
    assert matrix[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert matrix[1].tolist() == [-1, 0, 8, 9, 10, 11, 12, 13]
    assert matrix[6, 7] == 28 and matrix[7, 6] == -28
    np.testing.assert_array_equal(matrix, reference_skew(parameters.numpy()))


def test_skew_keeps_leading_dimensions() -> None:
    """Each parameter vector of a batch becomes its own matrix, in place."""
    parameters = drawn(2, 3)
    matrices = so8.skew_symmetric(parameters)
    assert matrices.shape == (2, 3, 8, 8)
    for outer in range(2):
        for inner in range(3):
            expected = reference_skew(parameters[outer, inner].numpy())
            np.testing.assert_array_equal(matrices[outer, inner].numpy(), expected)


def test_the_two_references_agree() -> None:
    """Taylor series and spectral form are the same function, so either may judge the implementation."""
    matrix = reference_skew(drawn().numpy())
    np.testing.assert_allclose(taylor_exponential(matrix), spectral_exponential(matrix), atol=1e-12)


@pytest.mark.parametrize("scale", [1e-4, 0.05, 1.0])
def test_rotation_is_the_exponential(scale: float) -> None:
    """R = Σ Aⁿ / n!, to float64 precision."""
    parameters = drawn(4, scale=scale)
    rotations = so8.rotation(parameters)
    assert rotations.dtype == torch.float64
    for block in range(4):
        expected = taylor_exponential(reference_skew(parameters[block].numpy()))
        np.testing.assert_allclose(rotations[block].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_rotation_is_the_exponential_far_out(scale: float) -> None:
    """Angles of many turns give the same matrix as the eigenvalues of iA do."""
    parameters = drawn(4, scale=scale, seed=1)
    for block in range(4):
        expected = spectral_exponential(reference_skew(parameters[block].numpy()))
        np.testing.assert_allclose(so8.rotation(parameters)[block].numpy(), expected, atol=1e-10)


def test_zero_parameters_are_the_identity() -> None:
    """exp(0) = I exactly."""
    torch.testing.assert_close(so8.rotation(torch.zeros(3, 28)), torch.eye(8).expand(3, 8, 8), rtol=0, atol=0)


def test_one_plane_turns_counter_to_its_sign() -> None:
    """A single angle a in plane (0, 1) gives [[cos a, sin a], [-sin a, cos a]] there and I elsewhere."""
    parameters = torch.zeros(28, dtype=torch.float64)
    parameters[0] = 0.3
    expected = np.eye(8)
    expected[:2, :2] = [[np.cos(0.3), np.sin(0.3)], [-np.sin(0.3), np.cos(0.3)]]
    np.testing.assert_allclose(so8.rotation(parameters).numpy(), expected, atol=1e-15)


def worst_errors(rotations: Tensor) -> tuple[float, float]:
    """Largest ‖RᵀR − I‖ and |det R − 1| of a batch, in float64 numpy."""
    matrices = list(rotations.double().numpy())
    orthogonality = max(float(np.linalg.norm(matrix.T @ matrix - np.eye(8))) for matrix in matrices)
    return orthogonality, max(abs(float(np.linalg.det(matrix)) - 1.0) for matrix in matrices)


@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0])
def test_float32_rotations_are_orthogonal_with_determinant_one(scale: float) -> None:
    """‖RᵀR − I‖ ≤ 1e-5 and |det R − 1| ≤ 1e-5 in float32, up to angles of a radian."""
    rotations = so8.rotation(drawn(64, scale=scale, seed=2).float())
    assert rotations.dtype == torch.float32
    assert max(worst_errors(rotations)) <= 1e-5


@pytest.mark.parametrize("scale", [3.0, 10.0, 100.0])
def test_wide_angles_stay_rotations(scale: float) -> None:
    """Large angles: float32 rounding grows with the angle, 1e-5 for each radian; float64 stays exact."""
    parameters = drawn(64, scale=scale, seed=2)
    assert max(worst_errors(so8.rotation(parameters.float()))) <= 1e-5 * scale
    assert max(worst_errors(so8.rotation(parameters))) <= 1e-11


@pytest.mark.parametrize("scale", [3.0, 10.0, 100.0])
def test_wide_angles_keep_the_absolute_bound(scale: float) -> None:
    """The design's ‖RᵀR − I‖ ≤ 1e-5 for every A, in float32."""
    assert max(worst_errors(so8.rotation(drawn(64, scale=scale, seed=2).float()))) <= 1e-5


def test_rotation_stays_float32_under_bfloat16_autocast() -> None:
    """Autocast changes neither the dtype nor a single bit of a rotation."""
    parameters = drawn(4, seed=3).float()
    plain = so8.rotation(parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = so8.rotation(parameters)
    assert under.dtype == torch.float32
    assert torch.equal(under, plain)
    assert so8.rotation(parameters.bfloat16()).dtype == torch.float32


def test_measures_stay_float32_under_bfloat16_autocast() -> None:
    """Commutator and orthogonality are as exact under autocast as without it."""
    rotations = so8.rotation(drawn(2, 6, scale=0.05, seed=4).float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        commutators = so8.commutator_norm(rotations[0], rotations[1])
        errors = so8.orthogonality_error(rotations)
    torch.testing.assert_close(commutators, so8.commutator_norm(rotations[0], rotations[1]))
    assert float(errors.max()) <= 1e-5


def test_rotation_gradient_by_finite_differences() -> None:
    """The derivative of the exponential, checked in float64 at zero, near it and far from it."""
    for scale in (0.0, 0.05, 2.0):
        parameters = drawn(2, scale=scale, seed=5).requires_grad_()
        assert torch.autograd.gradcheck(so8.rotation, (parameters,))


def test_rotate_columns_is_a_block_diagonal_product() -> None:
    """W · blockdiag(R₀, R₁, R₂) written out, and neither W · blockdiag(Rᵀ) nor another order of blocks."""
    rotations = so8.rotation(drawn(3, seed=6))
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    blocks, inverse, shuffled = np.zeros((3, 24, 24))
    for block in range(3):
        span = slice(8 * block, 8 * block + 8)
        blocks[span, span] = rotations[block].numpy()
        inverse[span, span] = rotations[block].numpy().T
        shuffled[span, span] = rotations[2 - block].numpy()
    got = so8.rotate_columns(weight, rotations).numpy()
    np.testing.assert_allclose(got, weight.numpy() @ blocks, atol=1e-13)
    assert np.abs(got - weight.numpy() @ inverse).max() > 0.1
    assert np.abs(got - weight.numpy() @ shuffled).max() > 0.1


def test_rotate_columns_stays_float32_under_autocast() -> None:
    """The gated weight is made in float32 whatever the surrounding precision."""
    rotations = so8.rotation(drawn(2, seed=8).float())
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = so8.rotate_columns(weight, rotations)
    assert under.dtype == torch.float32
    assert torch.equal(under, so8.rotate_columns(weight, rotations))


def test_commutator_against_the_definition() -> None:
    """‖AB − BA‖ per block; 0 for a rotation with itself and for turns in separate planes."""
    rotations = so8.rotation(drawn(2, 5, seed=10))
    norms = so8.commutator_norm(rotations[0], rotations[1])
    assert norms.shape == (5,)
    for block in range(5):
        a, b = rotations[0, block].numpy(), rotations[1, block].numpy()
        assert float(norms[block]) == pytest.approx(np.sqrt(((a @ b - b @ a) ** 2).sum()), rel=1e-12)
        assert float(norms[block]) > 0.1
    assert float(so8.commutator_norm(rotations, rotations).max()) == 0.0
    planes = torch.zeros(2, 28, dtype=torch.float64)
    planes[0, 0], planes[1, 27] = 0.7, 1.1  # planes (0, 1) and (6, 7) share no axis
    first, second = so8.rotation(planes)
    assert float(so8.commutator_norm(first, second)) <= 1e-15


def test_orthogonality_and_determinant_errors() -> None:
    """Both 0 for a rotation; a reflection is orthogonal with determinant error 2; scaling shows in both."""
    reflection = torch.eye(8, dtype=torch.float64)
    reflection[3, 3] = -1.0
    matrices = torch.stack((torch.eye(8, dtype=torch.float64), reflection, 2.0 * torch.eye(8).double()))
    np.testing.assert_allclose(so8.determinant_error(matrices).numpy(), [0.0, 2.0, 255.0], atol=1e-9)
    np.testing.assert_allclose(so8.orthogonality_error(matrices).numpy(), [0.0, 0.0, 3 * 8**0.5], atol=1e-12)


@pytest.mark.parametrize("count", [0, 27, 29, 64])
def test_wrong_number_of_parameters_raises(count: int) -> None:
    """Only 28 parameters make a rotation."""
    with pytest.raises(ValueError, match="28 parameters"):
        so8.rotation(torch.zeros(2, count))


@pytest.mark.parametrize("columns", [8, 15, 24])
def test_wrong_number_of_columns_raises(columns: int) -> None:
    """Two blocks need 16 columns."""
    with pytest.raises(ValueError, match="16"):
        so8.rotate_columns(torch.zeros(4, columns), torch.eye(8).expand(2, 8, 8))
