"""Measures of a training step, for any module and optimizer. N: number of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

SAMPLED = 1024  # elements read of each weight


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, a scalar on their device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def non_finite(values: dict[str, Tensor]) -> list[str]:
    """Names of the values with a NaN or an infinity; one transfer from the device."""
    flags = torch.stack([torch.isfinite(value).all() for value in values.values()])
    return [name for name, finite in zip(values, flags.tolist(), strict=True) if not finite]


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, unless FSDP has sharded it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def norms(tensors: Sequence[Tensor | None]) -> Tensor:
    """Euclidean norm of each tensor's local part, ``[N]`` float32; 0 where there is no tensor."""
    present = [index for index, tensor in enumerate(tensors) if tensor is not None]
    if not present:
        return torch.zeros(len(tensors))
    values = torch._foreach_norm([_dense(t) for t in tensors if t is not None], 2, torch.float32)
    known = torch.stack([value.float().to(values[0].device) for value in values])
    if len(present) == len(tensors):
        return known
    result = known.new_zeros(len(tensors))
    result[torch.tensor(present, device=known.device)] = known
    return result


def _stride(number: int, shape: torch.Size) -> int:
    """Distance of sampled elements, coprime to the row length: else few columns are sampled."""
    stride = max(1, number // SAMPLED)
    while shape and math.gcd(stride, shape[-1]) > 1:
        stride -= 1
    return stride


def _dense(tensor: Tensor) -> Tensor:
    part = local(tensor.detach())
    return part.coalesce().values() if part.is_sparse else part


class UpdateSample:
    """How much one optimizer step changes each weight, from at most 1,024 evenly spaced elements.

    Reading whole weights twice per step would cost as much as the optimizer. From 1,024 elements
    the relative size of a change is known to about 1/√1024 = 3 %. For the same reason the values
    after one step serve as those before the next, until ``reset``.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        flat = [local(weight.detach()).reshape(-1) for weight in weights]
        width = max((min(SAMPLED, one.numel()) for one in flat), default=0)
        device = flat[0].device if flat else torch.device("cpu")
        self._weights = list(weights)
        pairs = zip(flat, weights, strict=True)
        self._strides = [_stride(one.numel(), weight.shape) for one, weight in pairs]
        self._counts = [min(SAMPLED, one.numel()) for one in flat]
        self._before = torch.zeros(len(flat), width, device=device)
        self._after = torch.zeros(len(flat), width, device=device)
        self._addresses: list[int] = []
        self._sources: list[Tensor] = []
        self._known = False

    def before(self) -> None:
        if not self._known:
            self._read(self._before)
            self._known = True

    def reset(self) -> None:
        self._known = False

    def ratios(self) -> Tensor:
        """‖change‖ / ‖weight before‖ of each weight since ``before``, ``[N]``.

        0 for a weight that was all zeros; not finite for a weight that is not finite now.
        """
        self._read(self._after)
        change = torch.linalg.vector_norm(self._after - self._before, dim=1)
        size = torch.linalg.vector_norm(self._before, dim=1)
        self._before, self._after = self._after, self._before
        return torch.where((size == 0) & change.isfinite(), 0.0, change / size)

    def _read(self, rows: Tensor) -> None:
        flat = [local(weight.detach()) for weight in self._weights]
        addresses = [weight.data_ptr() for weight in flat]
        if addresses != self._addresses:  # seen for the first time, or moved
            views = all(one.is_contiguous() for one in flat)
            self._addresses = addresses if views else []
            self._sources = [
                one.reshape(-1)[: stride * count : stride]
                for one, stride, count in zip(flat, self._strides, self._counts, strict=True)
            ]
        targets = [rows[index, :count] for index, count in enumerate(self._counts)]
        if targets:
            torch._foreach_copy_(targets, self._sources)


def output_stats(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Information and entropy of the output, in nats, from ``logits [n, V]``.

    Entropy: mean over the n distributions, from 0 (certain) to log V. Information: entropy of the
    mean distribution minus the mean entropy, i.e. the Jensen–Shannon divergence of the n
    distributions (Lin 1991). It is 0 for a model that predicts the same everywhere, at most log n.
    """
    logs = torch.log_softmax(logits.double(), dim=-1)
    shares = logs.exp()
    entropy = -(shares * logs).sum(dim=-1).mean()
    mean = shares.mean(dim=0)
    return -torch.special.xlogy(mean, mean).sum() - entropy, entropy


def attention_entropy(probabilities: Tensor) -> Tensor:
    """Mean entropy of attention rows ``[..., T, S]``, each divided by its maximum.

    0: every query attends to one key; 1: to all visible keys alike. Rows with one key do not count.
    """
    wide = probabilities.double()
    entropies = -torch.special.xlogy(wide, wide).sum(dim=-1)
    visible = (wide > 0).sum(dim=-1)
    counted = visible > 1
    shares = entropies / visible.clamp(min=2).double().log()
    return (shares * counted).sum() / counted.sum().clamp(min=1)


def dead_units(activations: Tensor, threshold: float = 1e-6) -> Tensor:
    """Share of units in ``activations [n, U]`` that stay below ``threshold`` × the largest one."""
    magnitude = activations.abs().amax(dim=0)
    return (magnitude <= threshold * magnitude.max()).double().mean()
