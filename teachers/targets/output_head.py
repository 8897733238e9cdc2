"""What turns a teacher's coordinates into logits.

Letters: N positions, V vocabulary, R stored coordinates of the final hidden state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class OutputHead:
    """What turns stored coordinates into logits: z = ``coordinates @ matrix.T + bias``, softly
    capped to ``cap · tanh(z / cap)`` where there is a ``cap`` (0: none).

    ``matrix [V, R]`` and ``bias [V]``, float32: the teacher's output matrix with its logit scale,
    or its projection on the directions a code keeps. The matrix may be narrower: then so is the
    product. Logits without a cap are defined up to a constant of the position.
    """

    matrix: Tensor
    bias: Tensor
    cap: float = 0.0

    def logits(self, coordinates: Tensor) -> Tensor:
        """``[..., R]`` → ``[..., V]``, in the type of the bias."""
        if self.matrix.dtype != self.bias.dtype:
            return self.completed_(self.products(coordinates).to(self.bias.dtype))
        whole = torch.nn.functional.linear(coordinates, self.matrix, self.bias)
        return soft_capped(whole, self.cap)

    def products(self, coordinates: Tensor) -> Tensor:
        """``[..., R]`` → ``[..., V]`` in the matrix's type, which ``completed_`` makes logits."""
        return coordinates.to(self.matrix.dtype) @ self.matrix.T

    def completed_(self, products: Tensor) -> Tensor:
        """Logits of products ``[..., V]`` that are already of the bias's type, in place."""
        return soft_capped(products.add_(self.bias), self.cap)

    def only(self, kept: Tensor) -> OutputHead:
        """The head of those coordinates alone that are set in ``kept [R]``."""
        return replace(self, matrix=self.matrix[:, kept].contiguous())

    def of_tokens(self, ids: Tensor) -> OutputHead:
        """The head that gives the logits of the tokens ``ids`` alone."""
        matrix, bias = self.matrix.index_select(0, ids), self.bias.index_select(0, ids)
        return replace(self, matrix=matrix, bias=bias)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> OutputHead:
        """The same head on another device, with its matrix in ``dtype``."""
        matrix, bias = self.matrix.to(device, dtype), self.bias.to(device)
        return self if matrix is self.matrix else replace(self, matrix=matrix, bias=bias)


def soft_capped(logits: Tensor, cap: float) -> Tensor:
    """``cap · tanh(logits / cap)`` in place, or nothing where the cap is 0."""
    return logits.div_(cap).tanh_().mul_(cap) if cap else logits
