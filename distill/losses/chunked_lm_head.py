"""LM head and loss in one autograd function: never a [N, V] tensor of all positions, forward or
backward.

Letters: N positions, C positions of one chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# One chunk's logits on a CPU, which become their gradient; measured in docs/benchmarks.md. Few rows
# are slow: every product of a chunk passes over a [V, D] matrix.
LOGITS_BYTES = 128 << 20
# On a GPU: this share of its memory, within these bounds. Beside them lie up to five more such
# buffers.
LOGITS_SHARE, LEAST_LOGITS_BYTES, MOST_LOGITS_BYTES = 1 / 64, 32 << 20, 512 << 20
WIDENING = {"cuda"} if hasattr(torch.ops.aten.mm, "dtype") else set()  # see ``head_logits``

ChunkLoss = Callable[[Tensor, slice], Tensor]
"""Logits ``[C, V]`` of some positions, and which they are → sum of their losses, a float32 scalar.
It overwrites the logits with its gradient in them."""


def chunk_size(vocab_size: int, room: int, itemsize: int = 4) -> int:
    """Positions per chunk, so that its logits of ``itemsize`` bytes stay below ``room`` bytes (see
    ``logits_bytes``)."""
    return max(16, room // (itemsize * vocab_size))


def logits_bytes(device: torch.device) -> int:
    """How large one chunk's logits may be on a device."""
    module = None if device.type == "cpu" else torch.get_device_module(device)
    if module is None or not module.is_available():
        return LOGITS_BYTES
    memory = module.get_device_properties(device).total_memory
    return max(LEAST_LOGITS_BYTES, min(MOST_LOGITS_BYTES, int(LOGITS_SHARE * memory)))


def head_logits(states: Tensor, matrix: Tensor) -> Tensor:
    """Logits ``[C, V]`` of ``states [C, D]`` under the output matrix ``[V, D]``, float32.

    Of bfloat16 factors too, where the device can add up their products in float32 and keep that;
    elsewhere these have the factors' type: a logit of 20 is rounded to eighths.
    """
    if states.device.type in WIDENING and states.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(states, matrix.T, out_dtype=torch.float32)
    return states @ matrix.T


def logits_in_chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Logits ``[C, V]`` of some positions of ``hidden [N, D]`` after others under the output matrix
    ``weight [V, D]``, and which they are; without a gradient."""
    states, matrix, chunk = _factors(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), chunk):
            span = slice(start, min(start + chunk, len(hidden)))
            yield span, head_logits(states[span], matrix)


def _factors(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, int]:
    """Both in the type that autocast multiplies them in, and the positions of a chunk."""
    device = hidden.device.type
    narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    itemsize = 4 if device in WIDENING else narrow.itemsize
    chunk = chunk_size(len(weight), logits_bytes(weight.device), itemsize)
    return hidden.to(narrow), weight.to(narrow), chunk


def chunked_head_loss(
    hidden: Tensor, weight: Tensor, chunk_loss: ChunkLoss, chunk: int | None = None
) -> Tensor:
    """Sum of a loss over all positions: ``hidden [N, D]`` and output matrix ``weight [V, D]`` →
    scalar.

    Equal to the loss of ``hidden @ weight.T`` in value and gradient for every chunk size, as long
    as the loss is a sum over positions. Gradients are computed with the loss, chunk by chunk, so
    the logits are needed only once. Matrix products follow autocast; the loss is float32.
    """
    result: Tensor = _ChunkedHeadLoss.apply(hidden, weight, chunk_loss, chunk)
    return result


class _ChunkedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, chunk_loss: ChunkLoss, chunk: int | None
    ) -> Tensor:
        states, matrix, usual = _factors(hidden, weight)
        narrow, chunk = matrix.dtype, chunk or usual
        grad_hidden = torch.zeros_like(hidden)
        grad_weight: Tensor | None = None
        trained = ctx.needs_input_grad[1]  # the output matrix of a frozen base is not
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                span = slice(start, min(start + chunk, len(hidden)))
                logits = head_logits(states[span], matrix)
                total += chunk_loss(logits, span)
                grad = logits.to(narrow)
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
