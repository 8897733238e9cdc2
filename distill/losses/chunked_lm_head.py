"""LM head and loss in one autograd function: never a [N, V] tensor of all positions, forward or
backward.

Letters: N positions, C positions of one chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LOGITS_BYTES = 32 << 20  # one chunk's float32 logits on a CPU; measured in docs/benchmarks.md
# On a GPU, whose kernels want more rows: this share of its memory, up to so many bytes. Beside them
# lie up to five more such buffers.
LOGITS_SHARE, MOST_LOGITS_BYTES = 1 / 64, 512 << 20
# Of gradients in the logits in the narrow type, gathered before they are multiplied: each product
# with them passes over a [V, D] matrix twice more.
GRADIENT_BYTES = 128 << 20
WIDENING = {"cuda"} if hasattr(torch.ops.aten.mm, "dtype") else set()  # see ``head_logits``

ChunkGradient = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""Float32 logits ``[C, V]`` of some positions, and which they are → sum of their losses (a scalar)
and its gradient in the logits ``[C, V]``. It may overwrite the logits."""


def chunk_size(vocab_size: int, room: int) -> int:
    """Positions per chunk, so that its float32 logits stay below ``room`` bytes (see
    ``logits_bytes``)."""
    return max(16, room // (4 * vocab_size))


def logits_bytes(device: torch.device) -> int:
    """How large one chunk's float32 logits may be on a device."""
    module = None if device.type == "cpu" else torch.get_device_module(device)
    if module is None or not module.is_available():
        return LOGITS_BYTES
    memory = module.get_device_properties(device).total_memory
    return max(LOGITS_BYTES, min(MOST_LOGITS_BYTES, int(LOGITS_SHARE * memory)))


def head_logits(states: Tensor, matrix: Tensor) -> Tensor:
    """Float32 logits ``[C, V]`` of ``states [C, D]`` under the output matrix ``[V, D]``.

    Of bfloat16 factors too, where the device can add up their products in float32 and keep that;
    elsewhere they are rounded on the way: a logit of 20 to eighths.
    """
    if states.device.type in WIDENING and states.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(states, matrix.T, out_dtype=torch.float32)
    return (states @ matrix.T).float()


def chunked_head_loss(
    hidden: Tensor, weight: Tensor, chunk_gradient: ChunkGradient, chunk: int | None = None
) -> Tensor:
    """Sum of a loss over all positions: ``hidden [N, D]`` and output matrix ``weight [V, D]`` →
    scalar.

    Equal to the loss of ``hidden @ weight.T`` in value and gradient for every chunk size, as long
    as the loss is a sum over positions. Gradients are computed with the loss, chunk by chunk, so
    the logits are needed only once. Matrix products follow autocast; the loss is float32.
    """
    chunk = chunk or chunk_size(weight.shape[0], logits_bytes(weight.device))
    result: Tensor = _ChunkedHeadLoss.apply(hidden, weight, chunk_gradient, chunk)
    return result


class _ChunkedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, chunk_gradient: ChunkGradient, chunk: int
    ) -> Tensor:
        device = hidden.device.type
        narrow = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        )
        states, matrix = hidden.to(narrow), weight.to(narrow)
        grad_hidden = torch.zeros_like(hidden)
        grad_weight: Tensor | None = None
        trained = ctx.needs_input_grad[1]  # the output matrix of a frozen base is not
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        room, together = None, chunk
        if narrow != weight.dtype:
            together *= max(1, GRADIENT_BYTES // (narrow.itemsize * chunk * len(matrix)))
            room = matrix.new_empty(min(together, len(hidden)), len(matrix))
        with torch.autocast(device, enabled=False):
            for first in range(0, len(hidden), together):
                last = min(first + together, len(hidden))
                for start in range(first, last, chunk):
                    span = slice(start, min(start + chunk, last))
                    loss, grad = chunk_gradient(head_logits(states[span], matrix), span)
                    total += loss
                    if room is not None:
                        room[span.start - first : span.stop - first].copy_(grad)
                span = slice(first, last)
                grad = grad.to(narrow) if room is None else room[: last - first]
                grad_hidden[span] = grad @ matrix
                if not trained:
                    continue
                if grad_weight is None:  # the first is often the only one
                    grad_weight = (grad.T @ states[span]).to(weight.dtype)
                elif narrow == weight.dtype:
                    grad_weight.addmm_(grad.T, states[span])
                else:
                    grad_weight += grad.T @ states[span]
        # Not saved for backward: whoever accumulates a gradient takes it over if nobody else holds
        # it, else copies it.
        if trained and grad_weight is None:
            grad_weight = torch.zeros_like(weight)
        ctx.gradients = (grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        # Nothing to scale: spare the copy of a [V, D] matrix.
        if grad.device.type == "cpu" and float(grad) == 1.0:
            return grad_hidden, grad_weight, None, None
        return grad * grad_hidden, None if grad_weight is None else grad * grad_weight, None, None
