"""All weights of a base trained by the distillation loss: what ``tools.studies.adapter``
compares LoRA with."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel

from distill.base_models.base_model import Base, load_base
from distill.config.schema import RunConfig
from distill.errors import TrainingAborted
from distill.losses.objective import Objective
from distill.runtime.cpu import keep_freed_memory, onednn_for_float32
from distill.runtime.device import choose_precision, training_device
from distill.training.data import TrainingData, load_batch
from distill.training.distributed import TrainingModule
from distill.training.engine import Report
from distill.training.optimizer import build_optimizer, build_schedule
from distill.training.validation import validation_score
from students.adapter.adapter import AdapterFacts
from students.model.decoder import SHORT_ON_CPU
from students.model.gate import SO8Gate
from students.model.interface import SO8TOutput, Student
from students.model.shape import GROUP

NO_TERMS = {"lambda_so8t": 0.0, "lambda_safety": 0.0, "lambda_verification": 0.0}


class WholeBase(Student):
    """A base whose own weights are trained, all of them: no gates (its rotations are one
    identity), no heads."""

    rotation: Tensor

    def __init__(self, base: PreTrainedModel, vocab_size: int) -> None:
        super().__init__()
        self.base: Any = base.requires_grad_(True)
        settings = base.config
        self.config = AdapterFacts(
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.num_hidden_layers,
            vocab_size=vocab_size,
            max_position_embeddings=settings.max_position_embeddings,
            tie_word_embeddings=bool(settings.tie_word_embeddings),
            safety_head=False,
            verification_head=False,
        )
        self.register_buffer("rotation", torch.eye(GROUP)[None, None, None], persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        **outputs: Any,
    ) -> SO8TOutput:
        """See ``Student.forward``; no layer's output is handed out."""
        assert not outputs.get("layers_to_keep")
        output = self.base.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        states = output.last_hidden_state
        return SO8TOutput(
            logits=F.linear(states[:, -logits_to_keep:], self.output_matrix())
            if outputs.get("with_logits", True)
            else None,
            past_key_values=output.past_key_values,
            last_hidden_state=states,
            rotations=self.rotations(),
        )

    def output_matrix(self) -> Tensor:
        """See ``Student.output_matrix``."""
        weight: Tensor = self.base.get_output_embeddings().weight
        return weight[: self.config.vocab_size]

    def gates(self) -> list[SO8Gate]:
        """None."""
        return []

    def rotations(self) -> Tensor:
        """The identity, ``[1, 1, 1, 8, 8]``."""
        return self.rotation

    def layers(self) -> nn.ModuleList:
        """The base's layers, in order."""
        layers: nn.ModuleList = self.base.model.layers
        return layers

    def own_weights(self) -> dict[str, Tensor]:
        """All weights by name, tied ones once."""
        return {name: one.detach() for name, one in self.named_parameters()}

    def checkpoint_activations(self, wanted: bool) -> None:
        """See ``Student.checkpoint_activations``."""
        # Older transformers (for Python 3.10) know it by its older name.
        if wanted:
            enable = getattr(self.base, "activation_checkpointing_enable", None)
            (enable or self.base.gradient_checkpointing_enable)({"use_reentrant": False})
        else:
            disable = getattr(self.base, "activation_checkpointing_disable", None)
            (disable or self.base.gradient_checkpointing_disable)()


def load_whole(base: Base, vocab_size: int) -> WholeBase:
    """The base in float32, every weight of it to be trained, where this process trains."""
    model = load_base(replace(base, load_in_4bit=False), training_device(), torch.float32)
    return WholeBase(model, vocab_size).to(training_device())


def train_whole(
    student: WholeBase, data: TrainingData, config: RunConfig, report: Report
) -> tuple[float, float]:
    """Train in place, on the batches and by the schedule of ``distill.training.engine.train``:
    divergence of the soft targets and cross-entropy, AdamW, clipping.

    Returns:
        The validation KL before and after, in nats per token.

    Raises:
        TrainingAborted: a gradient is not finite.
    """
    settings, device = config.train, training_device()
    objective = Objective(config.loss.model_copy(update=NO_TERMS))
    module = TrainingModule(student, objective)
    plan = data.batches(settings.epochs, settings.batch_size)
    optimizer = build_optimizer(module, settings, student.config.hidden_size)
    schedule = build_schedule(optimizer, settings, len(plan))
    narrow = choose_precision(settings, student.config.hidden_size, device) == "bf16"
    short = device.type == "cpu" and int(max(data.store.lengths())) <= SHORT_ON_CPU
    if device.type == "cpu":
        keep_freed_memory()
    student.checkpoint_activations(bool(settings.gradient_checkpointing))
    with onednn_for_float32() if short else nullcontext():
        before = validation_score(module, data.held_out(settings.batch_size, device)).kl
        for step, indices in enumerate(plan):
            module.train()
            batch = load_batch(data.store, indices).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
                fraction = step / len(plan)
                loss, _ = objective(
                    student, batch, total=batch.count(), share=1.0, fraction=fraction
                )
            loss.backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), settings.max_grad_norm)
            if not bool(torch.isfinite(norm)):
                raise TrainingAborted(
                    f"step {step}: the gradient is not finite; try a lower learning rate"
                )
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            report(step + 1, "")
        after = validation_score(module, data.held_out(settings.batch_size, device)).kl
    student.checkpoint_activations(False)
    return before, after
