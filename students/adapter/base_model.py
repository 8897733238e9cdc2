"""What a base model must be like to become a student, and LoRA on its matrices.

The base may be plain or in NF4 (bitsandbytes); nothing here changes its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from students.gguf.architectures import ARCHITECTURES
from students.model.shape import GROUP

PROJECTIONS = {
    name.split(".")[-2]
    for architecture in ARCHITECTURES.values()
    for name in architecture.layer_names
    if name.endswith("_proj.weight")
}
ADAPTER = "default"  # peft's name for the only one


@dataclass(frozen=True)
class AdapterSettings:
    """Size of the LoRA matrices.

    Args:
        rank: rows of A and columns of B.
        alpha: B·A counts ``alpha / rank`` times.
        dropout: share of B·A's inputs set to 0 in training.

    Raises:
        ValueError: a value out of range.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank {self.rank} is not at least 1")
        if not self.alpha > 0:
            raise ValueError(f"alpha {self.alpha} is not above 0: LoRA would have no effect")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(
                f"dropout {self.dropout} is not a share from 0 up to (not including) 1"
            )


def check_base(base: Any, vocab_size: int) -> int:
    """Look at a base before it is changed; returns the width of the attention output.

    Raises:
        ValueError: it cannot be adapted.
    """
    kind = base.config.model_type
    if kind not in ARCHITECTURES:
        raise ValueError(f"a {kind} model cannot be adapted; use one of {', '.join(ARCHITECTURES)}")
    head = base.get_output_embeddings()
    if head.bias is not None or not head.weight.is_floating_point():
        raise ValueError(
            "the base's lm_head has a bias or is quantized; load it without quantizing lm_head"
        )
    if not 1 <= vocab_size <= head.weight.shape[0]:
        raise ValueError(
            f"the base has {head.weight.shape[0]} tokens, the teacher {vocab_size}; use a base "
            "with the teacher's tokenizer"
        )
    for number, layer in enumerate(base.model.layers):
        for name, module in layer.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if name.rpartition(".")[2] not in PROJECTIONS:
                raise ValueError(
                    f"layer {number} has a matrix {name}, which is not known; is it adapted "
                    "already?"
                )
            if not (module.weight.is_floating_point() or hasattr(module.weight, "quant_state")):
                raise ValueError(
                    f"layer {number}: {name} is {module.weight.dtype}; load the base in NF4 or "
                    "unquantized"
                )
    width: int = base.model.layers[0].self_attn.o_proj.in_features
    if width % GROUP:
        raise ValueError(
            f"the base's attention output is {width} wide, which is not divisible by {GROUP}: the "
            "SO(8) gates need whole blocks; use another base"
        )
    return width


def keep_nf4_as_it_is(base: nn.Module) -> None:
    """Keep bitsandbytes from repacking NF4 matrices for inference.

    It does so in the first evaluation on CPUs with AVX512-BF16; no gradient flows through them
    after that, and its way back mixes up their scales.

    Raises:
        ValueError: it has repacked one already.
    """
    for name, module in base.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                f"bitsandbytes has packed {name} for inference on this CPU; load the base anew and "
                "adapt it before anything is computed with it"
            )
        module.support_avx512bf16_for_cpu = False


def add_lora(base: PreTrainedModel, settings: AdapterSettings) -> None:
    """Put LoRA on all matrices of the layers, in place; A is random (global generator), B zero."""
    # Takes seconds, and other students do without it.
    from peft import LoraConfig, inject_adapter_in_model

    modules = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=settings.dropout,
        target_modules=sorted(PROJECTIONS & modules),
        bias="none",
    )
    inject_adapter_in_model(lora, base, ADAPTER)
    for name, parameter in base.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()  # peft gives them the dtype of the base


def logical_numbers(parameter: nn.Parameter) -> int:
    """Number of values of a parameter; two of NF4 share a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())
