"""What somebody else's model must be like to become a student, and LoRA on its matrices.

The base may be plain or in NF4 (bitsandbytes); nothing here changes its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from students.model.shape import GROUP

MODEL_TYPES = ("llama", "phi3", "qwen2", "qwen3")
PROJECTIONS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
)
ADAPTER = "default"  # peft's name for the only one


@dataclass(frozen=True)
class AdapterSettings:
    """Size of the LoRA matrices.

    Args:
        rank: rows of A and columns of B.
        alpha: B·A counts ``alpha / rank`` times.
        dropout: share of B·A's inputs set to 0 in training.

    Raises:
        ValueError: a value that makes no sense.
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
    if kind not in MODEL_TYPES:
        raise ValueError(f"a {kind} model cannot be adapted; use one of {', '.join(MODEL_TYPES)}")
    head = base.get_output_embeddings()
    if head.bias is not None or not head.weight.is_floating_point():
        raise ValueError(
            "the base's lm_head has a bias or is quantised; load it without quantising lm_head"
        )
    if not 1 <= vocab_size <= head.weight.shape[0]:
        raise ValueError(
            f"the base has {head.weight.shape[0]} tokens, the teacher {vocab_size}; use a base "
            "with the teacher's "
            "tokenizer"
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
                    "unquantised"
                )
    width: int = base.model.layers[0].self_attn.o_proj.in_features
    if width % GROUP:
        raise ValueError(
            f"the base's attention output is {width} wide, which is not divisible by {GROUP}: the "
            "SO(8) gates "
            "need whole blocks; use another base"
        )
    return width


def keep_nf4_as_it_is(base: nn.Module) -> None:
    """Keep bitsandbytes from packing NF4 matrices anew for inference, which it does on CPUs with
    AVX512-BF16 in the first evaluation: no gradient flows through them after that, and its way back
    mixes up their scales.

    Raises:
        ValueError: it has done so already.
    """
    for name, module in base.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                f"bitsandbytes has packed {name} for inference on this CPU; load the base anew and "
                "adapt it before "
                "anything is computed with it"
            )
        module.support_avx512bf16_for_cpu = False


def add_lora(base: PreTrainedModel, settings: AdapterSettings) -> None:
    """Put LoRA on every matrix of the layers, in place; A is drawn from the global generator, B
    is zero."""
    from peft import (
        LoraConfig,
        inject_adapter_in_model,
    )  # takes seconds, and other students do without it

    there = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=settings.dropout,
        target_modules=[name for name in PROJECTIONS if name in there],
        bias="none",
    )
    inject_adapter_in_model(lora, base, ADAPTER)
    for name, parameter in base.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()  # peft gives them the dtype of the base


def logical_numbers(parameter: nn.Parameter) -> int:
    """How many numbers a parameter holds; two of NF4 share a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())
