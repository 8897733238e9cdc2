"""LM head and loss in one autograd function: never a [N, V] tensor of all positions, forward or backward.

Letters: N positions, C positions of one chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LOGITS_BYTES = 32 << 20  # one chunk's float32 logits: about what a CPU's last-level cache holds

ChunkLoss = Callable[[Tensor, slice], Tensor]
"""Sum of the losses of some positions: float32 logits ``[C, V]`` and which positions they are → scalar."""


def chunk_size(vocab_size: int) -> int:
    """Positions per chunk, so that a chunk's logits stay below ``LOGITS_BYTES``."""
    return max(16, LOGITS_BYTES // (4 * vocab_size))


def chunked_head_loss(
    hidden: Tensor, weight: Tensor, chunk_loss: ChunkLoss, chunk: int | None = None
) -> Tensor:
    """Sum of ``chunk_loss`` over all positions: ``hidden [N, D]`` and output matrix ``weight [V, D]`` → scalar.

    Equal to ``chunk_loss(hidden @ weight.T, slice(0, N))`` in value and gradient for every chunk size, as
    long as the loss is a sum over positions. The gradients are computed together with the loss, chunk by
    chunk, so the logits are needed only once. Matrix products follow autocast; the loss is float32.
    """
    result: Tensor = _ChunkedHeadLoss.apply(hidden, weight, chunk_loss, chunk or chunk_size(weight.shape[0]))
    return result


class _ChunkedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, chunk_loss: ChunkLoss, chunk: int) -> Tensor:
        device = hidden.device.type
        narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        states, matrix = hidden.to(narrow), weight.to(narrow)
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            span = slice(start, min(start + chunk, len(hidden)))
            logits = (states[span] @ matrix.T).float().requires_grad_()
            with torch.enable_grad(), torch.autocast(device, enabled=False):
                loss = chunk_loss(logits, span)
            (grad,) = torch.autograd.grad(loss, logits)
            total += loss.detach()
            narrow_grad = grad.to(narrow)
            grad_hidden[span] = narrow_grad @ matrix
            grad_weight += narrow_grad.T @ states[span]
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad * grad_hidden, grad * grad_weight, None, None
