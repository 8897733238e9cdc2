"""SO(8) mathematics: rotations from their Lie algebra, and measures of how exact they are.

Letters: N blocks, G = 8 (block width), P = 28 = G(G-1)/2 free parameters of one rotation.
Everything here is float32 (or float64 when given float64), also under autocast and where TF32 is
switched on: bfloat16 would leave the rotation group by 1e-2, TF32 by 1e-3.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from stability.precision import float64, full_precision
from students.model.shape import GROUP, PARAMETERS_PER_BLOCK


def skew_symmetric(parameters: Tensor) -> Tensor:
    """Lay free parameters ``[..., 28]`` out as skew-symmetric matrices A = -Aᵀ ``[..., 8, 8]``.

    The parameters fill the strict upper triangle row by row.

    Raises:
        ValueError: the last dimension is not 28.
    """
    if parameters.shape[-1] != PARAMETERS_PER_BLOCK:
        raise ValueError(
            f"an SO(8) rotation has {PARAMETERS_PER_BLOCK} parameters, got {parameters.shape[-1]}"
        )
    rows, columns = torch.triu_indices(GROUP, GROUP, offset=1, device=parameters.device)
    upper = parameters.new_zeros(*parameters.shape[:-1], GROUP, GROUP)
    upper[..., rows, columns] = parameters
    return upper - upper.mT


def rotation(parameters: Tensor) -> Tensor:
    """Rotations R = exp(A) in SO(8), ``[..., 28]`` → ``[..., 8, 8]``, float32 or wider.

    The exponential of a skew-symmetric matrix is orthogonal with determinant +1 for every A, so the
    parameters need no constraint and the map is differentiable everywhere.
    """
    with full_precision(parameters):
        # In float64 and rounded once: float32 arithmetic drifts off the group as the parameters
        # grow (‖RᵀR − I‖ reaches 1e-5 at a spread of 3 radians).
        exact = exponential(skew_symmetric(float64(parameters)))
        wide = torch.promote_types(parameters.dtype, torch.float32)
        return exact.to(parameters.device, wide)


# Of ``exponential``, exact to 1e-12: matrices are halved until their 1-norm is at most ``SMALL``,
# for which the 11th power is the last that counts; ``HALVINGS`` times where the norms are not to be
# looked at, which is enough for norms of up to 256.
SMALL, TERMS, HALVINGS = 0.25, 12, 10


def exponential(matrices: Tensor) -> Tensor:
    """exp of ``[..., G, G]``, differentiable: all are halved and squared alike (Higham 2005).

    PyTorch's sorts the matrices by ranges of norms, in every layer, forward and backward, which
    takes longer than the products, and waits for a GPU five times.
    """
    halvings = _halvings(matrices)
    x = matrices * 0.5**halvings
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand_as(x)
    square = x @ x
    fourth = square @ square
    powers = torch.stack((identity, x, square, square @ x), dim=-3).flatten(-2)
    sums = (_coefficients(x.dtype, x.device) @ powers).unflatten(-1, x.shape[-2:])
    first, second, third = sums.unbind(dim=-3)
    result = first + fourth @ (second + fourth @ third)
    for _ in range(halvings):
        result = result @ result
    return result


def _halvings(matrices: Tensor) -> int:
    """How often the largest of ``matrices`` has to be halved. A GPU would be waited for, a compiler
    cannot know, and one that is not finite is not to spoil the others."""
    if matrices.device.type != "cpu" or torch.compiler.is_compiling() or not matrices.numel():
        return HALVINGS
    norm = float(matrices.detach().abs().sum(dim=-2).amax())
    if not math.isfinite(norm):
        return HALVINGS
    return max(0, math.ceil(math.log2(norm) - math.log2(SMALL))) if norm > SMALL else 0


@cache
def _coefficients(dtype: torch.dtype, device: torch.device) -> Tensor:
    """1 / k! of the Taylor series in rows of four; made once, as a GPU waits for them."""
    values = [1.0 / math.factorial(power) for power in range(TERMS)]
    with torch.inference_mode(False):  # a later training uses them, too
        return torch.tensor(values, dtype=dtype, device=device).view(-1, 4)


def rotate_columns(weight: Tensor, rotations: Tensor) -> Tensor:
    """``weight · blockdiag(rotations)``: ``[O, 8N]``, ``[N, 8, 8]`` → ``[O, 8N]``.

    In float32 or wider. It costs O·8N·8 once per step, and nothing per token.

    Raises:
        ValueError: the weight's columns are not 8 × the number of blocks.
    """
    blocks = rotations.shape[0]
    if weight.shape[-1] != blocks * GROUP:
        raise ValueError(
            f"weight has {weight.shape[-1]} columns; {blocks} rotations need {blocks * GROUP}"
        )
    with full_precision(weight):
        wide = weight.to(rotations.dtype)
        columns = wide.view(weight.shape[0], blocks, GROUP).transpose(0, 1)  # [N, O, 8]
        return torch.bmm(columns, rotations).transpose(0, 1).reshape(weight.shape)


def orthogonality_error(rotations: Tensor) -> Tensor:
    """‖RᵀR − I‖ (Frobenius) of each rotation: ``[..., 8, 8]`` → ``[...]``; 0 where it is exact."""
    identity = torch.eye(GROUP, dtype=rotations.dtype, device=rotations.device)
    with full_precision(rotations):
        return torch.linalg.matrix_norm(rotations.mT @ rotations - identity)


def determinant_error(rotations: Tensor) -> Tensor:
    """|det R − 1| of each rotation: ``[..., 8, 8]`` → ``[...]``; 2 for a reflection."""
    with full_precision(rotations):
        return (torch.linalg.det(rotations) - 1.0).abs()


def commutator_norm(command: Tensor, safety: Tensor) -> Tensor:
    """‖R_cmd R_safe − R_safe R_cmd‖ (Frobenius) per block: ``[..., 8, 8]`` twice → ``[...]``.

    0 where the order of the two rotations makes no difference.
    """
    with full_precision(command):
        return torch.linalg.matrix_norm(command @ safety - safety @ command)
