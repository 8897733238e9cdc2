"""A student made of a frozen base model (perhaps in NF4), with LoRA, SO(8) gates and the heads.

Letters: B batch, T tokens, V vocabulary (the teacher's), D width, L layers, N blocks. Every matrix
W of a layer becomes W + (alpha / rank) · B·A (Hu et al. 2021; over NF4: Dettmers et al. 2023), and
the output projection's input is turned by the layer's gate (``students.adapter.gated_projection``).
Initially B is zero and every turn the identity: the student starts as its base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

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
from students.model.heads import DEFAULT_TRUST, VerificationHead
from students.model.interface import Outputs, SO8TOutput, Student
from students.model.safety_head import SafetyHead
from students.model.shape import GROUP

if TYPE_CHECKING:
    from typing_extensions import Unpack

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
    trust: float = DEFAULT_TRUST
    safety_shape: dict[str, Any] | None = None
    decision_thresholds: list[float] | None = None


class AdaptedStudent(Student):
    """A frozen causal language model with trained adapters, gates and heads; made by ``adapt``."""

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
        return self.gates()[0].safety.device

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        **outputs: Unpack[Outputs],
    ) -> SO8TOutput:
        rotations = self.rotations()
        turns = turn(rotations, torch.stack([gate.start for gate in self.gates()]))
        kept: dict[int, Tensor] = {}

        def keep(number: int, layer: nn.Module, inputs: Any, output: Any) -> None:
            kept[number] = output[0] if isinstance(output, tuple) else output

        hooks = [
            self.layers()[number].register_forward_hook(partial(keep, number))
            for number in outputs.get("layers_to_keep", ())
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
        x, with_logits = output.last_hidden_state, outputs.get("with_logits", True)
        last = x[:, -logits_to_keep:]  # all of them for 0
        return SO8TOutput(
            logits=F.linear(last, self.output_matrix()) if with_logits else None,
            past_key_values=output.past_key_values,
            last_hidden_state=x,
            rotations=rotations,
            layer_states=kept or None,
        )

    def output_matrix(self) -> Tensor:
        """The language-model head's weight ``[V, D]``, without the base's rows of no token."""
        weight: Tensor = self.base.get_output_embeddings().weight
        return weight[: self.config.vocab_size]

    def gates(self) -> list[StartingGate]:
        layers: Any = self.layers()
        return [layer.self_attn.gate for layer in layers]

    def rotations(self) -> Tensor:
        parameters = [torch.stack((gate.safety, gate.command)) for gate in self.gates()]
        return so8.rotation(torch.stack(parameters))

    def layers(self) -> nn.ModuleList:
        layers: nn.ModuleList = self.base.model.layers
        return layers

    def own_weights(self) -> dict[str, Tensor]:
        """LoRA, gates (with their start) and heads by name; detached, not copied."""
        weights = {
            name: parameter.detach()
            for kind, named in self.parameters_by_kind().items()
            if kind != BASE
            for name, parameter in named.items()
        }
        for number, gate in enumerate(self.gates()):
            weights[f"model.layers.{number}.self_attn.gate.start"] = gate.start
        if self.config.safety_head and self.safety_head.runs is not None:
            weights["safety_head.runs"] = self.safety_head.runs
        return weights

    def parameters_by_kind(self) -> dict[str, dict[str, nn.Parameter]]:
        """Every parameter by its kind (of ``KINDS``), then by its name in ``own_weights``."""
        named: dict[str, dict[str, nn.Parameter]] = {kind: {} for kind in KINDS}
        for name, parameter in self.named_parameters():
            named[_kind(name)][_short(name)] = parameter
        return {kind: parameters for kind, parameters in named.items() if parameters}

    def parameter_count(self) -> int:
        """Parameters of the base and the heads: LoRA and gates are merged in the end."""
        return self.base_parameters() + self._count(SAFETY, VERIFICATION)

    def trainable_parameters(self) -> int:
        """Number of parameters that training may change."""
        return self._count(*(kind for kind in KINDS if kind != BASE))

    def base_parameters(self) -> int:
        """Number of parameters of the frozen base; two of NF4 share a byte and count as two."""
        return self._count(BASE)

    def _count(self, *kinds: str) -> int:
        named = self.parameters_by_kind()
        return sum(logical_numbers(one) for kind in kinds for one in named.get(kind, {}).values())

    def activation_checkpointing_enable(self, kwargs: Mapping[str, Any] | None = None) -> None:
        """Recompute every layer's activations in the backward pass.

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
    """Freeze ``base`` and put LoRA, gates and heads, drawn from ``seed``, into it, in place.

    ``vocab_size``: the teacher's tokens; the base may have more rows.

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
            device = layer.self_attn.o_proj.lora_A[ADAPTER].weight.device
            add_gate(layer.self_attn, StartingGate(width // GROUP, ROTATION_INIT_STD).to(device))
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
