"""A GGUF model's way from its last hidden state to logits, as its metadata has it."""

from __future__ import annotations

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from teachers.base import Floats, LogitRule
from teachers.errors import RequestRefused
from teachers.gguf.file import GGUFFile

SUPER_BLOCK = 256
# What llama.cpp assumes where the metadata is silent: a cap, and a scale's product with the width.
CAPS = {"gemma2": 30.0, "gemma3n": 30.0}
SCALED_WIDTHS = {"minicpm": 256.0, "minicpm3": 256.0}


def output_name(file: GGUFFile) -> str:
    """The tensor that is multiplied with the last hidden state."""
    return "output.weight" if "output.weight" in file.tensors else "token_embd.weight"


def output_rows(file: GGUFFile, start: int, stop: int) -> Floats:
    """Rows ``[stop − start, D]`` of that tensor.

    Raises:
        RequestRefused: logits are more than the product with it.
    """
    if "output.bias" in file.tensors:
        reason = "its output layer has a bias besides the matrix"
        raise RequestRefused(str(file.path), reason)
    return file.rows(output_name(file), start, stop)


def logit_rules(file: GGUFFile, width: int) -> list[LogitRule]:
    """What the model of ``width`` may do with that product, by its metadata."""
    name = file.architecture
    scale = file.value(f"{name}.logit_scale", SCALED_WIDTHS.get(name, width) / width)
    cap = file.value(f"{name}.final_logit_softcapping", CAPS.get(name))
    return LogitRule.candidates(scale, cap)


def rounded_states(states: Floats, kind: GGMLQuantizationType) -> Floats:
    """Hidden states ``[N, D]`` as llama.cpp rounds them to multiply them with a matrix of ``kind``:
    to the same floating point, or to eight bits with a scale for each 32, or 256, of them."""
    block, _ = GGML_QUANT_SIZES[kind]
    if block == 1:
        return (
            states if kind == GGMLQuantizationType.F32 else dequantize(quantize(states, kind), kind)
        )
    parts = states.reshape(-1, SUPER_BLOCK if block == SUPER_BLOCK else 32)
    scales = np.maximum(np.abs(parts).max(axis=1, keepdims=True) / 127.0, 1e-30)
    kept = scales if block == SUPER_BLOCK else scales.astype(np.float16).astype(np.float32)
    return ((parts / scales).round() * kept).astype(np.float32).reshape(states.shape)
