"""Make a plain model of an adapted student: LoRA merged, gates folded, NF4 dequantized.

W_o' = (W_o + scale · B·A) · blockdiag(R_cmd R_safe R0ᵀ), computed in float64 and rounded once; the
other matrices likewise without the rotation. One weight after the other, to save memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from students.adapter.adapter import AdaptedStudent
from students.adapter.base_model import ADAPTER
from students.adapter.gated_projection import GatedProjection, StartingGate, turn
from students.model import so8
from students.model.fold import MAX_ORTHOGONALITY_ERROR, FoldError


@torch.no_grad()
def merge(
    student: AdaptedStudent, keep: Callable[[Tensor], Tensor] = lambda weight: weight
) -> PreTrainedModel:
    """The student as a float32 model of its base's class on the CPU, with the teacher's vocabulary.

    Nothing of peft, bitsandbytes, the gates or the heads is left in it. ``keep`` says where each
    weight lies as soon as it is computed (``students.mapped_tensors``).

    Raises:
        FoldError: a weight is not finite, or a turn is not a rotation.
    """
    for name, tensor in student.own_weights().items():
        if not bool(torch.isfinite(tensor).all()):
            raise FoldError(f"{name} has values that are not finite")
    turns = [_exact_turn(number, gate) for number, gate in enumerate(student.gates())]
    plain = _without_weights(student)
    output = plain.get_output_embeddings()
    for path, module in plain.named_modules():
        if module is output and student.config.tie_word_embeddings:
            continue
        for leaf in dict(module.named_parameters(recurse=False)):
            weight = _merged(student, path, leaf, turns)
            if not bool(torch.isfinite(weight).all()):
                raise FoldError(f"{path}.{leaf} has values that are not finite")
            setattr(module, leaf, nn.Parameter(keep(weight), requires_grad=False))
    plain.tie_weights()
    return plain.eval()


def _exact_turn(number: int, gate: StartingGate) -> Tensor:
    """A layer's turn ``[N, 8, 8]`` in float64, on the CPU."""
    parameters = torch.stack((gate.safety, gate.command)).cpu().double()
    exact = turn(so8.rotation(parameters), gate.start.cpu())
    error = max(
        float(so8.orthogonality_error(exact).max()), float(so8.determinant_error(exact).max())
    )
    if not error <= MAX_ORTHOGONALITY_ERROR:
        raise FoldError(
            f"layer {number}: rotation is off by {error:.2e}, more than {MAX_ORTHOGONALITY_ERROR}"
        )
    return exact


def _without_weights(student: AdaptedStudent) -> Any:
    """A model of the base's class with the teacher's vocabulary, on the meta device."""
    config: PreTrainedConfig = copy.deepcopy(student.base.config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        config.__dict__.pop(name, None)
    config.vocab_size = student.config.vocab_size
    config.dtype = torch.float32
    config.name_or_path = ""
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        config.pad_token_id = None
    with init_empty_weights(include_buffers=False):
        plain = type(student.base)(config)
    plain.generation_config = copy.deepcopy(student.base.generation_config)
    return plain


def _merged(student: AdaptedStudent, path: str, leaf: str, turns: list[Tensor]) -> Tensor:
    """One tensor of the plain model, a float32 copy on the CPU."""
    module = student.base.get_submodule(path)
    rotation = None
    if isinstance(module, GatedProjection):
        rotation = turns[int(path.split(".")[2])]  # model.layers.3.self_attn.o_proj
        module = module.projection
    base = getattr(module, "base_layer", module)
    stored: Tensor = getattr(base, leaf)
    if base in (student.base.get_input_embeddings(), student.base.get_output_embeddings()):
        stored = stored[: student.config.vocab_size]
    if base is module or leaf != "weight":
        return stored.to("cpu", torch.float32, copy=True)
    weight = _dequantized(base).cpu().double()
    a, b = (lora[ADAPTER].weight.cpu().double() for lora in (module.lora_A, module.lora_B))
    weight = weight.addmm_(b, a, alpha=float(module.scaling[ADAPTER]))
    return (weight if rotation is None else so8.rotate_columns(weight, rotation)).float()


def _dequantized(projection: Any) -> Tensor:
    """A projection's matrix as the student computes with it: NF4 in the dtype of the product."""
    weight: Tensor = projection.weight
    state = copy.copy(getattr(weight, "quant_state", None))
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit  # it is there, for it made this weight

    state.dtype = projection.compute_dtype or state.dtype
    return dequantize_4bit(weight.data, state)
