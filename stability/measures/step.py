"""Pure measures of a training step, for any module and optimizer. N stands for the number of weights watched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

SAMPLED = 1024  # elements of each weight that stand for all of it


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """Euclidean norm over all gradients together (before clipping), a scalar on the gradients' device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def non_finite(values: dict[str, Tensor]) -> list[str]:
    """Names of the values that hold a NaN or an infinity, decided on the device and read back once."""
    flags = torch.stack([torch.isfinite(value).all() for value in values.values()])
    return [name for name, finite in zip(values, flags.tolist(), strict=True) if not finite]


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, unless FSDP has spread it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def norms(tensors: Sequence[Tensor | None]) -> Tensor:
    """Euclidean norm of each tensor (of what this process holds of it), ``[N]`` float32; 0 where there is none."""
    present = [place for place, tensor in enumerate(tensors) if tensor is not None]
    if not present:
        return torch.zeros(len(tensors))
    values = torch._foreach_norm([_dense(t) for t in tensors if t is not None], 2, torch.float32)
    found = torch.stack([value.float().to(values[0].device) for value in values])
    if len(present) == len(tensors):
        return found
    everything = found.new_zeros(len(tensors))
    everything[torch.tensor(present, device=found.device)] = found
    return everything


def _stride(number: int, shape: torch.Size) -> int:
    """Steps between sampled elements: as even as can be, and not in step with the rows, else some columns alone would
    stand for all."""
    stride = max(1, number // SAMPLED)
    while shape and math.gcd(stride, shape[-1]) > 1:
        stride -= 1
    return stride


def _dense(tensor: Tensor) -> Tensor:
    """The values of a tensor, of a sparse one those that are there."""
    mine = local(tensor.detach())
    return mine.coalesce().values() if mine.is_sparse else mine


class UpdateSample:
    """How much one optimizer step changes each weight, seen on at most 1,024 of its elements, evenly spread.

    Reading a whole weight twice per step would cost what the optimizer itself costs; the relative size of a change is
    known to about 1/√1024 = 3 % from so many. For the same reason what was read after a step is what the next one
    begins from, unless ``forget`` says that the weights have changed meanwhile.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        flat = [local(weight.detach()).reshape(-1) for weight in weights]
        width = max((min(SAMPLED, one.numel()) for one in flat), default=0)
        device = flat[0].device if flat else torch.device("cpu")
        self._weights = list(weights)
        self._strides = [
            _stride(one.numel(), weight.shape) for one, weight in zip(flat, weights, strict=True)
        ]
        self._counts = [min(SAMPLED, one.numel()) for one in flat]
        self._before = torch.zeros(len(flat), width, device=device)
        self._after = torch.zeros(len(flat), width, device=device)
        self._places: list[int] = []
        self._sources: list[Tensor] = []
        self._known = False

    def before(self) -> None:
        """Remember the weights as they are before the step."""
        if not self._known:
            self._read(self._before)
            self._known = True

    def forget(self) -> None:
        """The weights have changed, and not by a step."""
        self._known = False

    def ratios(self) -> Tensor:
        """‖change‖ / ‖weight before‖ of each weight since ``before``, ``[N]``; 0 where that was all zeros, which has no
        size to compare with; not finite where the weight now is not."""
        self._read(self._after)
        change = torch.linalg.vector_norm(self._after - self._before, dim=1)
        size = torch.linalg.vector_norm(self._before, dim=1)
        self._before, self._after = self._after, self._before
        return torch.where((size == 0) & change.isfinite(), 0.0, change / size)

    def _read(self, rows: Tensor) -> None:
        flat = [local(weight.detach()) for weight in self._weights]
        places = [weight.data_ptr() for weight in flat]
        if places != self._places:  # seen for the first time, or moved
            views = all(one.is_contiguous() for one in flat)
            self._places = places if views else []
            self._sources = [
                one.reshape(-1)[: stride * count : stride]
                for one, stride, count in zip(flat, self._strides, self._counts, strict=True)
            ]
        targets = [rows[place, :count] for place, count in enumerate(self._counts)]
        if targets:
            torch._foreach_copy_(targets, self._sources)


def output_figures(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Information and entropy of the output, in nats, from ``logits [n, V]``.

    Entropy is the mean of that of the n distributions: 0 for certainty, log V for none. Information is how much the
    output says about its input: entropy of the mean distribution minus the mean entropy. 0 for a model that says the
    same at every position, whatever that is; at most log n. (It is the Jensen–Shannon divergence of the n
    distributions: Lin 1991.)
    """
    logs = torch.log_softmax(logits.double(), dim=-1)
    shares = logs.exp()
    entropy = -(shares * logs).sum(dim=-1).mean()
    mean = shares.mean(dim=0)
    return -torch.special.xlogy(mean, mean).sum() - entropy, entropy


def attention_entropy(probabilities: Tensor) -> Tensor:
    """Mean entropy of attention rows ``[..., T, S]``, each as a share of the most its visible keys allow: 0 where every
    query looks at one key, 1 where it looks at all alike. Rows that see a single key say nothing and do not count."""
    wide = probabilities.double()
    entropies = -torch.special.xlogy(wide, wide).sum(dim=-1)
    visible = (wide > 0).sum(dim=-1)
    counted = visible > 1
    shares = entropies / visible.clamp(min=2).double().log()
    return (shares * counted).sum() / counted.sum().clamp(min=1)


def dead_units(activations: Tensor, threshold: float = 1e-6) -> Tensor:
    """Share of the units of ``activations [n, U]`` that never exceed ``threshold`` of the largest activation."""
    magnitude = activations.abs().amax(dim=0)
    return (magnitude <= threshold * magnitude.max()).double().mean()
