"""SO(8): layout of the parameters, exactness of rotations, their gradient and application."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from students.adapter.gated_projection import StartingGate, rotate, turn
from students.model import so8
from tests.support.pretended_gpu import DEVICE, on_gpu, watch
from tests.support.pretended_gpu.arithmetic import rounded_products, without_float64
from tests.support.references import Matrix, reference_skew, spectral_exponential


def drawn(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Seeded float64 rotation parameters ``[*shape, 28]``."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, 28, generator=generator, dtype=torch.float64)


def taylor_exponential(matrix: Matrix) -> Matrix:
    """Σ Aⁿ / n! summed term by term; for matrices of moderate norm."""
    total, term = np.eye(8), np.eye(8)
    for order in range(1, 120):
        term = term @ matrix / order
        total = total + term
    return total


def test_skew_layout_row_by_row() -> None:
    """28 parameters fill the strict upper triangle row by row; the rest follows from A = -Aᵀ."""
    parameters = torch.arange(1.0, 29.0, dtype=torch.float64)
    matrix = so8.skew_symmetric(parameters).numpy()
    assert matrix[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert matrix[1].tolist() == [-1, 0, 8, 9, 10, 11, 12, 13]
    assert matrix[6, 7] == 28 and matrix[7, 6] == -28
    np.testing.assert_array_equal(matrix, reference_skew(parameters.numpy()))
    batch = drawn(2, 3)
    expected = np.apply_along_axis(reference_skew, -1, batch.numpy())
    assert expected.shape == (2, 3, 8, 8)
    np.testing.assert_array_equal(so8.skew_symmetric(batch).numpy(), expected)


def test_a_gpu_has_the_same_rotations_without_a_wait() -> None:
    """Values and gradients to float64's precision, for angles of many turns and of none."""
    so8.rotation(on_gpu(drawn()))  # makes constants
    for scale in (0.0, 1e-6, 1e-3, 0.1, 1.0, 3.0, 20.0):
        here, there = drawn(3, 5, scale=scale), on_gpu(drawn(3, 5, scale=scale))
        weight = torch.randn(3, 5, 8, 8, dtype=torch.float64)
        on_device = on_gpu(weight)
        with watch() as seen:
            (so8.rotation(there.requires_grad_()) * on_device).sum().backward()
        (so8.rotation(here.requires_grad_()) * weight).sum().backward()
        assert not seen.syncs and there.grad is not None and here.grad is not None
        expected, found = so8.rotation(here.detach()), so8.rotation(there.detach()).cpu()
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-12)
        torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=1e-10, atol=1e-10)


def test_rotation_is_the_exponential() -> None:
    """R = Σ Aⁿ / n! to float64 precision; for angles of many turns, from the eigenvalues of iA."""
    matrix = reference_skew(drawn().numpy())
    np.testing.assert_allclose(taylor_exponential(matrix), spectral_exponential(matrix), atol=1e-12)
    for scale, reference, atol in (
        (1e-4, taylor_exponential, 1e-12),
        (0.05, taylor_exponential, 1e-12),
        (1.0, taylor_exponential, 1e-12),
        (10.0, spectral_exponential, 1e-10),
        (100.0, spectral_exponential, 1e-10),
    ):
        parameters = drawn(4, scale=scale, seed=0 if scale <= 1.0 else 1)
        rotations = so8.rotation(parameters)
        assert rotations.dtype == torch.float64
        expected = [reference(reference_skew(row)) for row in parameters.numpy()]
        np.testing.assert_allclose(rotations.numpy(), expected, atol=atol, err_msg=f"{scale}")
    identity = so8.rotation(torch.zeros(3, 28))
    torch.testing.assert_close(identity, torch.eye(8).expand(3, 8, 8), rtol=0, atol=0)


def test_one_bad_rotation_does_not_spoil_the_others() -> None:
    """Whatever is not finite stays in its block, large angles beside it are still right; and what a
    forward pass without gradients has made serves a later training."""
    parameters = drawn(3, scale=10.0, seed=1)
    expected = so8.rotation(parameters)
    for bad in (torch.nan, torch.inf):
        spoilt = parameters.clone()
        spoilt[1, 5] = bad
        found = so8.rotation(spoilt)
        torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-10)
        assert not found[1].isfinite().all()
    assert so8.rotation(torch.full((1, 28), 1e308, dtype=torch.float64)).shape == (1, 8, 8)
    so8._coefficients.cache_clear()
    with torch.inference_mode():
        so8.rotation(drawn(1))
    so8.rotation(drawn(1).requires_grad_()).sum().backward()


def test_rotations_are_orthogonal_with_determinant_one() -> None:
    """‖RᵀR − I‖ ≤ 1e-5 and |det R − 1| ≤ 1e-5 in float32 for every angle; float64 is exact."""
    for scale in (0.05, 0.3, 1.0, 3.0, 10.0, 100.0):
        parameters = drawn(64, scale=scale, seed=2)
        for dtype, most in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
            rotations = so8.rotation(parameters.to(dtype))
            assert rotations.dtype == dtype
            r = rotations.double().numpy()
            off = np.linalg.norm(r.transpose(0, 2, 1) @ r - np.eye(8), axis=(1, 2))
            assert off.max() <= most, (scale, dtype)
            assert np.abs(np.linalg.det(r) - 1.0).max() <= most, (scale, dtype)


def test_float32_under_bfloat16_autocast() -> None:
    """Autocast changes no bit of rotations and turned weights; measures stay exact."""
    parameters = drawn(2, 6, scale=0.05, seed=4).float()
    rotations = so8.rotation(parameters)
    weight = torch.randn(4, 48, generator=torch.Generator().manual_seed(9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under, turned = so8.rotation(parameters), so8.rotate_columns(weight, rotations[0])
        commutators = so8.commutator_norm(rotations[0], rotations[1])
        errors = so8.orthogonality_error(rotations)
    assert under.dtype == turned.dtype == torch.float32
    assert torch.equal(under, rotations)
    assert torch.equal(turned, so8.rotate_columns(weight, rotations[0]))
    assert so8.rotation(parameters.bfloat16()).dtype == torch.float32
    expected = so8.commutator_norm(rotations[0], rotations[1])
    torch.testing.assert_close(commutators, expected)
    assert float(errors.max()) <= 1e-5


def test_exact_whatever_is_switched_on() -> None:
    """Not a bit of rotations, turned weights and measures changes, nor does R0 leave the group;
    bfloat16 inside products would be off by 1e-2."""
    parameters = drawn(2, 64, scale=0.5, seed=4).float()
    weight = torch.randn(96, 512, generator=torch.Generator().manual_seed(9))

    def everything() -> list[Tensor]:
        safety, command = rotations = so8.rotation(parameters)
        torch.manual_seed(0)
        start = StartingGate(64, 0.5).start
        turned = turn(rotations, start)
        return [
            rotations,
            start,
            turned,
            rotate(weight, turned),
            so8.rotate_columns(weight, safety),
            so8.orthogonality_error(rotations),
            so8.determinant_error(rotations),
            so8.commutator_norm(command, safety),
        ]

    plain = everything()
    with rounded_products():
        for number, (found, expected) in enumerate(zip(everything(), plain, strict=True)):
            assert torch.equal(found, expected), number
    assert float(so8.orthogonality_error(torch.cat(plain[1:3])).max()) <= 1e-5


def test_rotations_where_there_is_no_float64() -> None:
    """As exact as anywhere, with their gradient, and back on the device."""
    parameters = drawn(2, 5, scale=3.0).float()
    with without_float64():
        there = on_gpu(parameters).requires_grad_()
        found = so8.rotation(there)
        assert found.device == DEVICE and found.dtype == torch.float32
        (found * on_gpu(torch.arange(64.0).view(8, 8))).sum().backward()
    here = parameters.clone().requires_grad_()
    expected = so8.rotation(here)
    (expected * torch.arange(64.0).view(8, 8)).sum().backward()
    assert torch.equal(found.detach().cpu(), expected.detach())
    assert there.grad is not None and here.grad is not None
    assert torch.equal(there.grad.cpu(), here.grad)


def test_rotation_gradient_by_finite_differences() -> None:
    """The derivative of the exponential, in float64 at zero, near it and far from it."""
    for scale, blocks in ((0.0, 1), (0.05, 2), (2.0, 1)):
        parameters = drawn(blocks, scale=scale, seed=5).requires_grad_()
        assert torch.autograd.gradcheck(so8.rotation, (parameters,)), scale


def test_rotate_columns_is_a_block_diagonal_product() -> None:
    """W · blockdiag(R₀, R₁, R₂); neither W · blockdiag(Rᵀ) nor another order of blocks."""
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
    for other in (inverse, shuffled):
        assert np.abs(got - weight.numpy() @ other).max() > 0.1


def test_commutator_against_the_definition() -> None:
    """‖AB − BA‖ per block; 0 for a rotation with itself and for turns in separate planes."""
    rotations = so8.rotation(drawn(2, 5, seed=10))
    norms = so8.commutator_norm(rotations[0], rotations[1])
    a, b = rotations.numpy()
    expected = np.sqrt(((a @ b - b @ a) ** 2).sum(axis=(1, 2)))
    np.testing.assert_allclose(norms.numpy(), expected, rtol=1e-12)
    assert norms.shape == (5,) and float(norms.min()) > 0.1
    assert float(so8.commutator_norm(rotations, rotations).max()) == 0.0
    planes = torch.zeros(2, 28, dtype=torch.float64)
    planes[0, 0], planes[1, 27] = 0.7, 1.1  # planes (0, 1) and (6, 7) share no axis
    first, second = so8.rotation(planes)
    assert float(so8.commutator_norm(first, second)) <= 1e-15


def test_orthogonality_and_determinant_errors() -> None:
    """0 for a rotation; a reflection has determinant error 2; scaling shows in both."""
    eye = torch.eye(8, dtype=torch.float64)
    reflection = eye.clone()
    reflection[3, 3] = -1.0
    matrices = torch.stack((eye, reflection, 2.0 * eye))
    determinants, lengths = so8.determinant_error(matrices), so8.orthogonality_error(matrices)
    np.testing.assert_allclose(determinants.numpy(), [0.0, 2.0, 255.0], atol=1e-9)
    np.testing.assert_allclose(lengths.numpy(), [0.0, 0.0, 3 * 8**0.5], atol=1e-12)


@pytest.mark.parametrize(("count", "columns"), [(0, 8), (27, 15), (29, 24), (64, 15)])
def test_wrong_numbers_raise(count: int, columns: int) -> None:
    """Only 28 parameters make a rotation; two blocks need 16 columns."""
    with pytest.raises(ValueError, match="28 parameters"):
        so8.rotation(torch.zeros(2, count))
    with pytest.raises(ValueError, match="16"):
        so8.rotate_columns(torch.zeros(4, columns), torch.eye(8).expand(2, 8, 8))
