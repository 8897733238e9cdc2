"""Watching any module and optimizer: cheap figures around every step, deep ones when asked for.

It measures and changes nothing; what to do about the figures is decided in ``stability.guard``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stability.measures.spectrum import effective_rank, fast_singular_values
from stability.measures.step import UpdateSample, norms

TURNS = 4  # each weight's norm is taken in every fourth step
EXACT = 1 << 18  # elements of a matrix whose rank is found in float64: larger ones would take too long

ClipGroups = Mapping[str, Sequence[nn.Parameter]]


@dataclass(frozen=True)
class Before:
    """What a step looks like before the optimizer takes it. ``gradients``: norm of each weight's gradient; ``totals``:
    of each clip group's gradients together; ``weights``: norms of those weights whose turn it is, by place."""

    loss: float
    totals: dict[str, float]
    gradients: list[float]
    weights: dict[int, float]
    rates: list[float]


class Monitor:
    """Figures of a module and its optimizer.

    ``clip_groups``: whose gradients are clipped together, by name (none: all of them, as ``all``).
    ``rename``: what a weight is called in reports, from its name in the module.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip_groups: ClipGroups | None = None,
        rename: Callable[[str], str] = str,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        named = [(rename(name), one) for name, one in model.named_parameters() if one.requires_grad]
        self.names = [name for name, _ in named]
        self.weights = [one for _, one in named]
        self.clip_groups = clip_groups or {"all": self.weights}
        places = {id(one): place for place, one in enumerate(self.weights)}
        self._members = {
            name: [places[id(one)] for one in group if id(one) in places]
            for name, group in self.clip_groups.items()
        }
        groups = {
            id(one): number for number, group in enumerate(optimizer.param_groups) for one in group["params"]
        }
        self._groups = [groups.get(id(one)) for one in self.weights]
        self.spread = any(hasattr(one, "full_tensor") for one in self.weights)  # over processes, by FSDP
        self._sample = UpdateSample(self.weights)
        self.turn = 0
        self.totals: dict[str, Tensor] = {}  # norms of the clip groups as they lie on the device

    @torch.no_grad()
    def before(self, loss: Tensor | float) -> Before:
        """Figures after the backward pass and before the optimizer's step; read back from the device once."""
        gradients = [weight.grad for weight in self.weights]
        each = norms(gradients)
        self.totals = {
            name: _whole_norm(group) if self.spread else self._total(name, each)
            for name, group in self.clip_groups.items()
        }
        turn = list(range(self.turn % TURNS, len(self.weights), TURNS))
        self.turn += 1
        of_weights = norms([self.weights[place] for place in turn]).to(each.device)
        first = torch.as_tensor(loss, dtype=torch.float32, device=each.device).detach().reshape(1)
        totals = torch.stack([total.float() for total in self.totals.values()])
        values = torch.cat([first, totals, each, of_weights]).tolist()
        known = 1 + len(totals)
        self._sample.before()
        return Before(
            loss=values[0],
            totals=dict(zip(self.clip_groups, values[1:known], strict=True)),
            gradients=values[known : known + len(self.weights)],
            weights=dict(zip(turn, values[known + len(self.weights) :], strict=True)),
            rates=[float(group["lr"]) for group in self.optimizer.param_groups],
        )

    def _total(self, group: str, each: Tensor) -> Tensor:
        """The norm of a group's gradients together, from the norms of each: what ``get_total_norm`` computes."""
        members = [place for place in self._members[group] if self.weights[place].grad is not None]
        return torch.linalg.vector_norm(
            torch.stack([each[place] for place in members] or [each.new_zeros(())])
        )

    @torch.no_grad()
    def after(self) -> list[float]:
        """Update-to-weight ratio of each weight in the step just taken (estimated: see ``UpdateSample``)."""
        found: list[float] = self._sample.ratios().tolist()
        return found

    def forget(self) -> None:
        """The weights have changed, and not by the optimizer's step."""
        self._sample.forget()

    def rates(self, of_groups: Sequence[float]) -> list[float]:
        """The learning rate of each weight, from those of the optimizer's groups; 0 for one it does not have."""
        return [0.0 if group is None else of_groups[group] for group in self._groups]

    @torch.no_grad()
    def weight_norms(self) -> list[float]:
        """The norm of every weight."""
        found: list[float] = norms(self.weights).tolist()
        return found

    @torch.no_grad()
    def weigh(self, whole: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> dict[str, float]:
        """Deep figures: ``norm:NAME`` and ``spread:NAME`` (standard deviation) of each weight, and ``rank:NAME``, the
        effective rank, of each matrix. ``whole``: makes one of a weight that is spread over processes."""
        found: dict[str, float] = {}
        for name, weight in zip(self.names, self.weights, strict=True):
            values = whole(weight.detach())
            found[f"norm:{name}"] = float(torch.linalg.vector_norm(values.float()))
            found[f"spread:{name}"] = float(values.float().std(correction=0))
            if values.dim() == 2 and min(values.shape) > 1:
                exact = values.double() if values.numel() <= EXACT else values
                found[f"rank:{name}"] = float(effective_rank(fast_singular_values(exact)))
        return found


def _whole_norm(group: Sequence[nn.Parameter]) -> Tensor:
    """The norm of gradients that FSDP has spread, all parts counted."""
    total = torch.nn.utils.get_total_norm([one.grad for one in group if one.grad is not None])
    return total.full_tensor() if hasattr(total, "full_tensor") else total
