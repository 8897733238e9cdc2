"""The objective: the only place for weights, T², the label shift and the one division by valid tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill import regularisers
from distill.config import LossConfig
from distill.fused import Scratch, Weights, kl_and_cross_entropy
from distill.head_loss import chunked_head_loss
from students.model import SO8TForCausalLM
from teachers.records import Targets


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right, with the teacher's answer at every valid position.

    Attributes:
        tokens: ``[B, T]`` token ids; padding is 0 and never looked at.
        lengths: ``[B]`` real tokens of each sequence.
        targets: soft targets of all valid positions in row order, ``[n, …]``. Position t of a sequence of n
            tokens is valid for t < n − 1: it predicts token t + 1.
    """

    tokens: Tensor
    lengths: Tensor
    targets: Targets

    @property
    def valid(self) -> Tensor:
        """``[B, T]``: the positions that predict a token of their own sequence."""
        steps = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return steps[None, :] < (self.lengths - 1)[:, None]

    @property
    def labels(self) -> Tensor:
        """The token that follows each valid position, ``[n]``, in row order."""
        return self.tokens[:, 1:][self.valid[:, :-1]]

    def count(self) -> int:
        """Number of valid positions."""
        return int((self.lengths - 1).sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(self.tokens.to(device), self.lengths.to(device), self.targets.to(device))


class Objective:
    """α·T²·KL + β·CE + λ_so8t·(PET + inertia + non-commutation), divided once by the step's valid tokens.

    T is the run's temperature first and the final one for the rest of training (see ``LossConfig``).
    The moving average of the rotations belongs here, not to the student.
    """

    def __init__(self, config: LossConfig) -> None:
        self.config = config
        self.average: Tensor | None = None

    def __call__(
        self, student: torch.nn.Module, batch: Batch, *, total: int, share: float, fraction: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one micro-batch of an optimizer step.

        Args:
            student: called as ``student(tokens, with_logits=False)`` (possibly wrapped for several devices).
            batch: the micro-batch.
            total: valid positions of the whole optimizer step, over all micro-batches.
            share: this micro-batch's share of the step, for terms that are not sums over positions.
            fraction: how much of training is done, 0 to 1.

        Returns:
            The loss, and each part's weighted contribution to the step's loss (detached).
        """
        config = self.config
        output = student(batch.tokens, with_logits=False)
        model = _unwrap(student)
        parts: dict[str, Tensor] = {}
        labels = batch.labels
        temperature = temperature_at(config, fraction)

        weights = Weights(config.alpha * temperature**2 / total, config.beta / total, temperature)

        scratch = Scratch()

        def distillation(logits: Tensor, span: slice) -> tuple[Tensor, Tensor]:
            """Weighted KL and CE of one chunk of positions with their gradient, ``[C, V]``."""
            result = kl_and_cross_entropy(logits, batch.targets.select(span), labels[span], weights, scratch)
            for name, weight, value in (("kl", weights.kl, result.kl), ("ce", weights.ce, result.ce)):
                if weight:
                    parts[name] = parts.get(name, torch.zeros_like(value)) + weight * value
            return weights.kl * result.kl + weights.ce * result.ce, result.gradient

        states = output.last_hidden_state[batch.valid]  # [n, D]
        loss = chunked_head_loss(states, model.lm_head.weight, distillation)
        if config.lambda_so8t:
            terms = self._so8t(output, batch, total, share, fraction)
            weighted = {name: config.lambda_so8t * term for name, term in terms.items()}
            loss = torch.stack([loss, *weighted.values()]).sum()
            parts |= {name: part.detach() for name, part in weighted.items()}
        return loss, parts

    def _so8t(
        self, output: object, batch: Batch, total: int, share: float, fraction: float
    ) -> dict[str, Tensor]:
        config = self.config
        rotations: Tensor = output.rotations  # type: ignore[attr-defined]
        terms: dict[str, Tensor] = {}
        if weight := regularisers.pet_weight(config.pet, fraction):
            bend = regularisers.second_difference(output.last_hidden_state, batch.lengths)  # type: ignore[attr-defined]
            terms["pet"] = weight * bend / total
        if config.inertia and self.average is not None:
            terms["inertia"] = config.inertia * share * regularisers.inertia(rotations, self.average)
        if config.commutator_margin:
            shortfall = regularisers.non_commutation(rotations, config.commutator_margin)
            terms["non_commutation"] = share * shortfall
        return terms

    @torch.no_grad()
    def after_step(self, student: SO8TForCausalLM) -> None:
        """Move the rotations' average towards where the optimizer step has put them."""
        rotations = student.rotations()
        if self.average is None:
            self.average = rotations.clone()
        else:
            self.average.lerp_(rotations, 1.0 - self.config.inertia_decay)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep."""
        return {} if self.average is None else {"rotation_average": self.average}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``state``."""
        self.average = state.get("rotation_average")


def temperature_at(config: LossConfig, fraction: float) -> float:
    """The temperature at ``fraction`` ∈ [0, 1] of training."""
    return config.temperature if fraction < config.final_from else config.final_temperature


def _unwrap(student: torch.nn.Module) -> SO8TForCausalLM:
    inner = getattr(student, "module", student)
    assert isinstance(inner, SO8TForCausalLM)
    return inner
