"""The objective: the only place for weights, T², the label shift and the one division by valid
tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill.config.schema import LossConfig
from distill.losses import so8t_regularizers
from distill.losses.auxiliary_heads import VerificationTargets, safety_loss, verification_loss
from distill.losses.batch import VERIFICATION_STRIDE, Batch
from distill.losses.chunked_lm_head import chunked_head_loss
from distill.losses.divergences import Divergence
from distill.losses.fused import Scratch, Weights, divergence_and_cross_entropy
from distill.losses.hidden_states import HiddenStateLoss, pair_layers
from distill.losses.vocabulary_sample import VocabularySample
from students.model import so8
from students.model.interface import SO8TOutput, Student
from teachers.store.store import SoftTargetStore
from teachers.targets.distributions import CompactTargets


class Objective(nn.Module):
    """α·T²·KL + β·CE + γ·hidden + λ_so8t·(PET + inertia + non-commutation) + λ_safety·safety
    + λ_verification·verification, divided once by the step's valid tokens (safety: by its prompts).

    KL stands for the configured divergence. T may change once while training (see ``LossConfig``).
    The moving average of the rotations and the projectors of the hidden-state loss belong here, not
    to the student.
    """

    def __init__(self, config: LossConfig, hidden: HiddenStateLoss | None = None) -> None:
        super().__init__()
        self.config = config
        self.hidden = hidden
        self.divergence = Divergence(config.divergence, config.js_mixing, config.skew)
        self.average: Tensor | None = None
        self._rotations: Tensor | None = None  # of the newest forward pass
        self._scratch = Scratch()

    def forward(
        self,
        student: nn.Module,
        batch: Batch,
        *,
        total: int,
        share: float,
        fraction: float,
        sample: VocabularySample | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one micro-batch of an optimizer step.

        Args:
            student: a ``Student``.
            batch: the micro-batch.
            total: valid positions of the whole optimizer step, over all micro-batches and
                processes.
            share: this micro-batch's share of the step, for terms that are not sums over positions.
            fraction: how much of training is done, 0 to 1.
            sample: the tokens that stand for the vocabulary in this step; ``None``: all of them.

        Returns:
            The loss, and each part's weighted contribution to the step's loss (detached); beside
            them the mean squared ``second_difference`` per token, unweighted.
        """
        config = self.config
        kept = self.hidden.student_layers if self.hidden is not None else set()
        output: SO8TOutput = batch.run(student, with_logits=False, layers_to_keep=kept)
        assert output.last_hidden_state is not None and output.rotations is not None
        assert isinstance(student, Student)
        states = batch.at_valid(output.last_hidden_state)  # [n, D]
        verified = None
        if config.lambda_verification and student.config.verification_head:
            verified = VerificationTargets.of(batch, states, student.output_matrix())
        loss, parts = self._distillation(
            states, student.output_matrix(), batch, total, fraction, sample
        )
        others: dict[str, Tensor] = {}
        if self.hidden is not None:
            assert output.layer_states is not None
            layers = {layer: batch.at_valid(one) for layer, one in output.layer_states.items()}
            others["hidden"] = config.gamma * self.hidden(layers, batch.layers) / total
        if config.lambda_so8t:
            terms, unweighted = self._so8t(output, batch, total, share, fraction)
            parts |= unweighted
            others |= {name: config.lambda_so8t * term for name, term in terms.items()}
        if verified is not None:
            term = verification_loss(student.verification_head, states, verified)
            others["verification"] = config.lambda_verification * VERIFICATION_STRIDE * term / total
        if student.config.safety_head and config.lambda_safety:
            others["safety"] = config.lambda_safety * safety_loss(student, batch.prompts)
        if others:
            loss = torch.stack([loss, *others.values()]).sum()
            parts |= {name: part.detach() for name, part in others.items()}
        self._rotations = output.rotations.detach()
        return loss, parts

    def _distillation(
        self,
        states: Tensor,
        matrix: Tensor,
        batch: Batch,
        total: int,
        fraction: float,
        sample: VocabularySample | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted divergence and cross-entropy of ``states [n, D]`` under the output matrix ``[V,
        D]``."""
        config, targets, labels, log_tokens = self.config, batch.targets, batch.labels, None
        if sample is not None:
            assert isinstance(targets, CompactTargets)
            targets, labels = sample.of_targets(targets), sample.of_labels(labels)
            matrix, log_tokens = matrix.index_select(0, sample.ids), sample.log_weights
        temperature = temperature_at(config, fraction)
        weights = Weights(
            kd=config.alpha * temperature**2 / total,
            ce=config.beta / total,
            temperature=temperature,
            divergence=self.divergence,
            log_tokens=log_tokens,
        )
        parts: dict[str, Tensor] = {}

        def chunk(logits: Tensor, span: slice) -> Tensor:
            """Both terms of one chunk of positions, whose logits become their gradient."""
            result = divergence_and_cross_entropy(
                logits, targets.select(span), labels[span], weights, self._scratch
            )
            terms = (("kd", weights.kd, result.kd), ("ce", weights.ce, result.ce))
            for name, weight, value in terms:
                if weight:
                    parts[name] = parts.get(name, torch.zeros_like(value)) + weight * value
            return weights.kd * result.kd + weights.ce * result.ce

        return chunked_head_loss(states, matrix, chunk), parts

    def _so8t(
        self, output: SO8TOutput, batch: Batch, total: int, share: float, fraction: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms of the group structure, and what PET acts on, unweighted."""
        config, rotations, hidden = self.config, output.rotations, output.last_hidden_state
        assert rotations is not None and hidden is not None
        terms: dict[str, Tensor] = {}
        unweighted: dict[str, Tensor] = {}
        if any(config.pet):
            weight = so8t_regularizers.pet_weight(config.pet, fraction)
            with torch.set_grad_enabled(weight > 0):
                bend = so8t_regularizers.second_difference(hidden, batch.layout.bends) / total
            unweighted["second_difference"] = bend.detach()
            terms["pet"] = weight * bend
        if config.inertia and self.average is not None:
            drift = so8t_regularizers.inertia(rotations, self.average)
            terms["inertia"] = config.inertia * share * drift
        if config.commutator_margin:
            shortfall = so8t_regularizers.non_commutation(rotations, config.commutator_margin)
            terms["non_commutation"] = share * shortfall
        return terms, unweighted

    @torch.no_grad()
    def rotation_stats(self) -> dict[str, float]:
        """The distance of the newest forward pass's rotations from the group, from commuting and
        from their moving average (mean squared, 0 before there is one)."""
        assert self._rotations is not None
        rotations = self._rotations
        commutators = so8.commutator_norm(rotations[:, 1], rotations[:, 0])
        drift = rotations.new_zeros(())
        if self.average is not None:
            drift = so8t_regularizers.inertia(rotations, self.average)
        error = so8.orthogonality_error(rotations).max()
        values = torch.stack([error, commutators.min(), commutators.mean(), drift]).tolist()
        names = ("rotation_error", "min_commutator", "mean_commutator", "rotation_drift")
        return dict(zip(names, values, strict=True))

    @torch.no_grad()
    def worst_rotation(self) -> str | None:
        """The gate whose rotations of the newest forward pass are farthest from the group."""
        if self._rotations is None:
            return None
        errors = so8.orthogonality_error(self._rotations).flatten(1).amax(dim=1)
        layer = int(errors.nan_to_num(nan=torch.inf).argmax())
        return f"model.layers.{layer}.self_attn.gate"

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the rotations' average towards those that the step just taken started from."""
        assert self._rotations is not None
        if self.average is None:
            self.average = self._rotations.clone()
        else:
            self.average.lerp_(self._rotations, 1.0 - self.config.inertia_decay)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep besides the projectors."""
        return {} if self.average is None else {"rotation_average": self.average}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``state``."""
        self.average = state.get("rotation_average")


def build_objective(
    config: LossConfig, store: SoftTargetStore, student: Student, teacher_layers: int
) -> Objective:
    """The objective for a store: with the hidden-state loss where γ > 0 and the store holds hidden
    states.

    Raises:
        UserError: ``loss.layer_map`` names a layer that does not exist.
    """
    layers = store.manifest.recipe.layers
    pairs = pair_layers(config.layer_map, layers, student.config.num_hidden_layers, teacher_layers)
    if not pairs or not config.gamma:
        return Objective(config)
    return Objective(config, HiddenStateLoss.for_store(store, pairs, student))


def temperature_at(config: LossConfig, fraction: float) -> float:
    """The temperature at ``fraction`` ∈ [0, 1] of training."""
    if config.final_temperature is None or fraction < config.final_from:
        return config.temperature
    return config.final_temperature
