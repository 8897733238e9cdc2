"""A student made of somebody else's model: its weights frozen (perhaps in NF4), with LoRA, SO(8)
gates and the heads.

Letters: B batch, T tokens, V vocabulary (the teacher's), D width, L layers, N blocks. Every matrix
W of a layer becomes W + (alpha / rank) · B·A (Hu et al. 2021; over NF4: Dettmers et al. 2023), and
the output projection's input is turned by the layer's gate (``students.adapter.gated_projection``).
In the beginning B is zero and every turn the identity, so the student begins as its base.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel

from students.adapter.base_model import (
    ADAPTER,
    AdapterSettings,
    add_lora,
    check_base,
    keep_nf4_as_it_is,
    logical_numbers,
)
from students.adapter.gated_projection import TURNS, StartingGate, add_gate, turn
from students.model import so8
from students.model.heads import DEFAULT_THRESHOLDS, DEFAULT_TRUST, SafetyHead, VerificationHead
from students.model.interface import SO8TOutput, Student
from students.model.shape import GROUP

ROTATION_INIT_STD = 0.05  # radians, as SO8TConfig has it
LORA_A, LORA_B, GATES, SAFETY, VERIFICATION, BASE = KINDS = (
    "LoRA A",
    "LoRA B",
    "gates",
    "safety head",
    "verification head",
    "base",
)


@dataclass
class AdapterFacts:
    """An adapted student's ``StudentFacts``."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    safety_head: bool
    verification_head: bool
    decision_thresholds: list[float] = field(default_factory=lambda: list(DEFAULT_THRESHOLDS))
    trust: float = DEFAULT_TRUST


class AdaptedStudent(Student):
    """A frozen causal language model with what is trained in its place; made by ``adapt``."""

    config: AdapterFacts

    def __init__(
        self, base: PreTrainedModel, settings: AdapterSettings, config: AdapterFacts
    ) -> None:
        super().__init__()
        self.base: Any = base
        self.settings = settings
        self.config = config

    @property
    def device(self) -> torch.device:
        """Where the decoder is."""
        return self.gates()[0].safety.device

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        with_logits: bool = True,
        logits_to_keep: int = 0,
        layers_to_keep: Collection[int] = (),
    ) -> SO8TOutput:
        """See ``Student.forward``; with ``use_cache`` the output has ``past_key_values`` for the
        next call."""
        rotations = self.rotations()
        turns = turn(rotations, torch.stack([gate.start for gate in self.gates()]))
        kept: dict[int, Tensor] = {}

        def keep(number: int) -> Any:
            def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
                kept[number] = output[0] if isinstance(output, tuple) else output

            return hook

        hooks = [
            self.layers()[number].register_forward_hook(keep(number)) for number in layers_to_keep
        ]
        try:
            output = self.base.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **{TURNS: turns.unbind()},
            )
        finally:
            for hook in hooks:
                hook.remove()
        x = output.last_hidden_state
        told = x[:, -logits_to_keep:] if logits_to_keep else x
        return SO8TOutput(
            logits=F.linear(told, self.output_matrix()) if with_logits else None,
            past_key_values=output.past_key_values,
            last_hidden_state=x,
            rotations=rotations,
            layer_states=kept or None,
        )

    def output_matrix(self) -> Tensor:
        """The language-model head's weight ``[V, D]``: the base may have more rows, which no
        token has."""
        weight: Tensor = self.base.get_output_embeddings().weight
        return weight[: self.config.vocab_size]

    def gates(self) -> list[StartingGate]:
        """The gate of every layer, in order."""
        layers: Any = self.layers()
        return [layer.self_attn.gate for layer in layers]

    def rotations(self) -> Tensor:
        """The rotations as the parameters stand now, ``[L, 2, N, 8, 8]``: R_safe (0) and R_cmd
        (1)."""
        return so8.rotation(
            torch.stack([torch.stack((gate.safety, gate.command)) for gate in self.gates()])
        )

    def layers(self) -> nn.ModuleList:
        """The base's layers, in order."""
        layers: nn.ModuleList = self.base.model.layers
        return layers

    def own_weights(self) -> dict[str, Tensor]:
        """LoRA, gates (with where they began) and heads by name, nothing of the base; detached,
        not copied."""
        weights = {
            name: parameter.detach()
            for kind, named in self.parameters_by_kind().items()
            if kind != BASE
            for name, parameter in named.items()
        }
        for number, gate in enumerate(self.gates()):
            weights[f"model.layers.{number}.self_attn.gate.start"] = gate.start
        return weights

    def parameters_by_kind(self) -> dict[str, dict[str, nn.Parameter]]:
        """Every parameter by its kind (``KINDS``, those that there are), then by its name in
        ``own_weights``."""
        found: dict[str, dict[str, nn.Parameter]] = {kind: {} for kind in KINDS}
        for name, parameter in self.named_parameters():
            found[_kind(name)][_short(name)] = parameter
        return {kind: named for kind, named in found.items() if named}

    def parameter_count(self) -> int:
        """Numbers that it is made of once LoRA and gates are merged: those of its base and its
        heads."""
        kinds = self.parameters_by_kind()
        heads = [one for kind in (SAFETY, VERIFICATION) for one in kinds.get(kind, {}).values()]
        return self.base_parameters() + sum(one.numel() for one in heads)

    def trainable_parameters(self) -> int:
        """Numbers that training may change."""
        kinds = self.parameters_by_kind()
        return sum(
            one.numel() for kind, named in kinds.items() if kind != BASE for one in named.values()
        )

    def base_parameters(self) -> int:
        """Numbers of the frozen base; two of NF4 share a byte and count as two."""
        return sum(logical_numbers(one) for one in self.parameters_by_kind()[BASE].values())

    def activation_checkpointing_enable(self, kwargs: Mapping[str, Any] | None = None) -> None:
        """Compute every layer's activations again in the backward pass instead of keeping them.

        Raises:
            ValueError: reentrant checkpointing is asked for, which would lose the gradients.
        """
        if kwargs is not None and kwargs.get("use_reentrant", False):
            raise ValueError(
                "use_reentrant=True loses the gradients of a frozen base's adapters; use "
                "use_reentrant=False"
            )
        settings = {**(kwargs or {}), "use_reentrant": False}
        self.activation_checkpointing_disable()
        # Older transformers (for Python 3.10) know it by its older name.
        enable = getattr(self.base, "activation_checkpointing_enable", None)
        (enable or self.base.gradient_checkpointing_enable)(settings)

    def activation_checkpointing_disable(self) -> None:
        """Keep activations again."""
        disable = getattr(self.base, "activation_checkpointing_disable", None)
        (disable or self.base.gradient_checkpointing_disable)()
        self.base.disable_input_require_grads()

    gradient_checkpointing_enable = activation_checkpointing_enable
    gradient_checkpointing_disable = activation_checkpointing_disable


def adapt(
    base: PreTrainedModel,
    settings: AdapterSettings,
    vocab_size: int,
    *,
    seed: int,
    safety_head: bool = False,
    verification_head: bool = False,
) -> AdaptedStudent:
    """Freeze ``base`` and put LoRA, gates and heads into it, in place; everything new is drawn from
    ``seed``.

    Args:
        vocab_size: number of tokens of the teacher; the base may have more rows.

    Raises:
        ValueError: a base of another kind, or packed for inference; an attention output that is not
            divisible by 8; too small a vocabulary.
    """
    width = check_base(base, vocab_size)
    keep_nf4_as_it_is(base)
    base.requires_grad_(False)
    config = AdapterFacts(
        hidden_size=base.config.hidden_size,
        num_hidden_layers=base.config.num_hidden_layers,
        vocab_size=vocab_size,
        max_position_embeddings=base.config.max_position_embeddings,
        tie_word_embeddings=bool(base.config.tie_word_embeddings),
        safety_head=safety_head,
        verification_head=verification_head,
    )
    student = AdaptedStudent(base, settings, config)
    with torch.random.fork_rng(devices=[]):
        # All is drawn on the CPU; torch.manual_seed would set the GPUs' generators too.
        torch.default_generator.manual_seed(seed)
        add_lora(base, settings)
        layers: Any = student.layers()
        for layer in layers:
            there = layer.self_attn.o_proj.lora_A[ADAPTER].weight.device
            add_gate(layer.self_attn, StartingGate(width // GROUP, ROTATION_INIT_STD).to(there))
        # Last, so that the other weights of a seed are the same with and without them.
        if safety_head:
            student.safety_head = SafetyHead(config.hidden_size).to(student.device)
        if verification_head:
            student.verification_head = VerificationHead(config.hidden_size).to(student.device)
    return student


def _kind(name: str) -> str:
    parts = name.split(".")
    for part, kind in (
        ("lora_A", LORA_A),
        ("lora_B", LORA_B),
        ("gate", GATES),
        ("safety_head", SAFETY),
        ("verification_head", VERIFICATION),
    ):
        if part in parts:
            return kind
    return BASE


def _short(name: str) -> str:
    """A parameter's name without what wraps it:
    ``model.layers.0.self_attn.o_proj.lora_A.weight``."""
    wrappers = ("base", "projection", "base_layer", ADAPTER)
    return ".".join(part for part in name.split(".") if part not in wrappers)
