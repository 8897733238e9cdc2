"""Statistics of any module and optimizer: cheap ones around every step, others on request.

The monitor only measures; ``stability.guard`` decides what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stability.measures.spectrum import effective_rank, fast_singular_values
from stability.measures.tensors import norms
from stability.measures.updates import UpdateSample
from stability.precision import float64

NORM_INTERVAL = 4  # steps between two readings of the same weight's norm
EXACT = 1 << 18  # largest matrix, in elements, whose rank is computed in float64
# The eigenvalues of N × N take about as long as so many · N³ products of a training (two cores of
# an Intel Xeon with AMX: 20 of 512 × 512 in small steps, 60 of 320 × 320 in those of 4,096 tokens).
EIGENVALUES = 60

ClipGroups = Mapping[str, Sequence[nn.Parameter]]


@dataclass(frozen=True)
class GradientReading:
    """Statistics after the backward pass and before the optimizer's step.

    ``totals``: gradient norm of each clip group; ``gradients``: of each weight; ``weights``: norms
    of every fourth weight, by index; ``rates``: learning rate of each parameter group.
    """

    loss: float
    totals: dict[str, float]
    gradients: list[float]
    weights: dict[int, float]
    rates: list[float]


class Monitor:
    """Measures a module and its optimizer.

    ``clip_groups``: parameters whose gradients are clipped together, by name (default: ``all``).
    ``rename``: turns a weight's name in the module into its name in reports.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_groups: ClipGroups | None = None,
        rename: Callable[[str], str] = str,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        named = [(rename(name), one) for name, one in model.named_parameters() if one.requires_grad]
        self.names = [name for name, _ in named]
        self.weights = [one for _, one in named]
        self.clip_groups = clip_groups or {"all": self.weights}
        indices = {id(one): index for index, one in enumerate(self.weights)}
        self._members = {
            name: [indices[id(one)] for one in group if id(one) in indices]
            for name, group in self.clip_groups.items()
        }
        numbered = enumerate(optimizer.param_groups)
        groups = {id(one): number for number, group in numbered for one in group["params"]}
        self._groups = [groups.get(id(one)) for one in self.weights]
        self.sharded = any(hasattr(one, "full_tensor") for one in self.weights)  # by FSDP
        self._sample = UpdateSample(self.weights)
        self.readings = 0  # decides which weights' norms come next
        self.totals: dict[str, Tensor] = {}  # gradient norms of the clip groups, on the device

    @torch.no_grad()
    def before(self, loss: Tensor | float) -> GradientReading:
        """Read loss, gradients and weights before a step, with one transfer from the device."""
        each = norms([weight.grad for weight in self.weights])
        self.totals = {
            name: _sharded_norm(group) if self.sharded else self._total(name, each)
            for name, group in self.clip_groups.items()
        }
        due = range(self.readings % NORM_INTERVAL, len(self.weights), NORM_INTERVAL)
        self.readings += 1
        of_weights = norms([self.weights[index] for index in due]).to(each.device)
        first = torch.as_tensor(loss, dtype=torch.float32, device=each.device).detach().reshape(1)
        totals = torch.stack([total.float() for total in self.totals.values()])
        values = torch.cat([first, totals, each, of_weights]).tolist()
        start, end = 1 + len(totals), 1 + len(totals) + len(self.weights)
        self._sample.before()
        return GradientReading(
            loss=values[0],
            totals=dict(zip(self.clip_groups, values[1:start], strict=True)),
            gradients=values[start:end],
            weights=dict(zip(due, values[end:], strict=True)),
            rates=[float(group["lr"]) for group in self.optimizer.param_groups],
        )

    def _total(self, group: str, each: Tensor) -> Tensor:
        """What ``get_total_norm`` computes for a group, from the norms of its gradients."""
        members = (index for index in self._members[group] if self.weights[index].grad is not None)
        values = [each[index] for index in members] or [each.new_zeros(())]
        return torch.linalg.vector_norm(torch.stack(values))

    @torch.no_grad()
    def after(self) -> list[float]:
        """Update-to-weight ratio of each weight in the step just taken (see ``UpdateSample``)."""
        return self._sample.ratios().tolist()

    def reset(self) -> None:
        """Tell that something else than the optimizer has changed weights."""
        self._sample.reset()

    def rates(self, of_groups: Sequence[float]) -> list[float]:
        """The learning rate of each weight from those of the groups; 0 for one in no group."""
        return [0.0 if group is None else of_groups[group] for group in self._groups]

    @torch.no_grad()
    def weight_norms(self) -> list[float]:
        return norms(self.weights).tolist()

    @property
    def weigh_products(self) -> float:
        """About how many floating-point operations of a training take as long as ``weigh``."""
        sides = [sorted(one.shape) for one in self.weights if one.dim() == 2]
        return float(sum(2 * n * n * m + EIGENVALUES * n**3 for n, m in sides))

    @torch.no_grad()
    def weigh(self, whole: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> dict[str, float]:
        """``norm:NAME`` and ``spread:NAME`` (standard deviation) of each weight.

        ``rank:NAME``, the effective rank, of each matrix. ``whole``: gathers a sharded weight.
        """
        stats: dict[str, float] = {}
        for name, weight in zip(self.names, self.weights, strict=True):
            values = whole(weight.detach())
            stats[f"norm:{name}"] = float(torch.linalg.vector_norm(values.float()))
            stats[f"spread:{name}"] = float(values.float().std(correction=0))
            if values.dim() == 2 and min(values.shape) > 1:
                exact = float64(values) if values.numel() <= EXACT else values
                stats[f"rank:{name}"] = float(effective_rank(fast_singular_values(exact)))
        return stats


def _sharded_norm(group: Sequence[nn.Parameter]) -> Tensor:
    """The norm of gradients that FSDP has sharded, over all processes."""
    total = torch.nn.utils.get_total_norm([one.grad for one in group if one.grad is not None])
    return total.full_tensor() if hasattr(total, "full_tensor") else total
