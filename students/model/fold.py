"""Absorb the SO(8) gates into the output projections: the student becomes a plain Llama, exactly.

y = W_o · R_cmd · (R_safe · x) = (W_o · blockdiag(R_cmd R_safe)) · x, so the folded projection gives
the same layer output for every input. Folding is done in float64 and rounded once.
"""

from __future__ import annotations

import re

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from numerics.precision import float64
from students.model import so8
from students.model.config import SO8TConfig
from students.model.decoder import SO8TForCausalLM

MAX_ORTHOGONALITY_ERROR = 1e-5
HEADS = ("safety_head.", "verification_head.")  # not in the graph, under keys of their own
_GATE = re.compile(r"model\.layers\.(\d+)\.self_attn\.gate\.(safety|command)")


class FoldError(ValueError):
    """The student cannot be folded exactly; names the tensor and the reason."""


def fold(student: SO8TForCausalLM) -> dict[str, Tensor]:
    """The student's weights as a plain Llama's, float32 on the CPU, without any gate; but for the
    output projections they are the student's own where that is on the CPU.

    Names are those of transformers' Llama. With tied embeddings there is no ``lm_head.weight``.

    Raises:
        FoldError: a weight is not float32 or not finite, or a rotation is not exact.
    """
    weights = student.state_dict()
    for name, tensor in weights.items():
        if tensor.dtype != torch.float32:
            raise FoldError(
                f"{name} is {tensor.dtype}; only float32 weights fold exactly (load it in float32)"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise FoldError(f"{name} has values that are not finite")
    state = {
        name: tensor.detach().cpu()
        for name, tensor in weights.items()
        if not _GATE.fullmatch(name) and not name.startswith(HEADS)
    }
    if student.config.tie_word_embeddings:
        del state["lm_head.weight"]
    for number, gate in enumerate(student.gates()):
        rotations = so8.rotation(float64(torch.stack((gate.safety, gate.command)).detach().cpu()))
        error = float(so8.orthogonality_error(rotations).max())
        if not error <= MAX_ORTHOGONALITY_ERROR:
            raise FoldError(
                f"layer {number}: rotation is off by {error:.2e}, more than "
                f"{MAX_ORTHOGONALITY_ERROR}"
            )
        name = f"model.layers.{number}.self_attn.o_proj.weight"
        folded = so8.rotate_columns(float64(state[name]), rotations[1] @ rotations[0])
        state[name] = folded.to(state[name].device, torch.float32)
    return state


def llama_config(config: SO8TConfig) -> LlamaConfig:
    """The configuration of a folded student."""
    names = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
    )
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return LlamaConfig(rope_parameters=rope, **{name: getattr(config, name) for name in names})


def to_llama(student: SO8TForCausalLM) -> LlamaForCausalLM:
    """The folded student as transformers' own Llama, with the weights that ``fold`` gives.

    Raises:
        FoldError: see ``fold``.
    """
    state = fold(student)
    with init_empty_weights(include_buffers=False):
        llama = LlamaForCausalLM(llama_config(student.config))
    if student.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    llama.load_state_dict(state, strict=True, assign=True)
    llama.tie_weights()
    return llama.eval()
