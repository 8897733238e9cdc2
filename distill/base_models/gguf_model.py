"""A transformers model of the weights in a GGUF file, which become a student's base.

Not transformers' own reader of GGUF files: it leaves out stretched rotary embeddings, the width of
heads and biases without a word. ``teachers.gguf.llama_weights`` refuses what it does not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from students.gguf.architectures import (
    ARCHITECTURES,
    EMBEDDING,
    FULL,
    OUTPUT,
    SLIDING,
    Architecture,
)
from teachers.base import Floats
from teachers.gguf.llama_weights import LAYER_NAMES, LayerWeights, LlamaWeights
from teachers.tokenizer.gguf_metadata import read_roles, read_tokens

BLOCK_ROWS = 1 << 15  # of a table of tokens, read at once
_FUSED = {
    "attn_qkv.weight": ("q_proj", "k_proj", "v_proj"),
    "ffn_up.weight": ("gate_proj", "up_proj"),
}


def configuration(weights: LlamaWeights) -> Any:
    """What transformers calls the model: sizes, constants, kinds of layers.

    Raises:
        TokenizerConversionError: the file's tokenizer is damaged.
    """
    facts, file, architecture = weights.facts, weights.file, _architecture(weights)
    roles = read_roles(file.fields, len(read_tokens(file.fields)[0]))
    stretch = facts.rotary_factors[0]
    rotary: dict[str, Any] = {"rope_type": "default", "rope_theta": facts.rope_theta}
    if stretch != 1.0:
        rotary |= {"rope_type": "linear", "factor": stretch}
    settings: dict[str, Any] = {
        "vocab_size": facts.vocab_size,
        "hidden_size": facts.width,
        "intermediate_size": facts.feed_forward,
        "num_hidden_layers": facts.layers,
        "num_attention_heads": facts.heads,
        "num_key_value_heads": facts.kv_heads,
        "head_dim": facts.head_width,
        "rms_norm_eps": facts.rms_eps,
        "max_position_embeddings": facts.context,
        "tie_word_embeddings": facts.tied,
        "rope_parameters": rotary,
        **{f"{role}_token_id": roles.get(role) for role in ("bos", "eos", "pad")},
    }
    if architecture.window_period:
        kinds = [FULL if facts.window_of(one) is None else SLIDING for one in range(facts.layers)]
        local = {"rope_type": "default", "rope_theta": facts.window_theta}
        settings |= {
            "layer_types": kinds,
            "sliding_window": facts.window or facts.context,  # one is asked for anyhow
            "rope_parameters": {FULL: rotary, SLIDING: local},
            "query_pre_attn_scalar": facts.query_width,
        }
    if architecture.name == "llama" and "blk.0.attn_q.bias" in file.tensors:
        settings["attention_bias"] = True
    return AutoConfig.for_model(architecture.model_type or architecture.name, **settings)


@torch.no_grad()
def load_weights(weights: LlamaWeights, device: torch.device, dtype: torch.dtype) -> Any:
    """The model for inference, as transformers computes it, with the file's weights in ``dtype``.

    Raises:
        TeacherFileError: a weight is not finite, or of a type that cannot be read.
        TokenizerConversionError: see ``configuration``.
    """
    config = configuration(weights)
    config.dtype = dtype
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    missing = {name: one.shape for name, one in model.named_parameters()}
    for name, values in _tensors(weights):
        shape = missing.pop(name)
        assert values.shape == shape, (name, values.shape, shape)
        _set(model, name, torch.from_numpy(values).to(device, dtype))
    for name, shape in missing.items():
        # transformers has all biases of a layer or none; a file may have some.
        assert name.endswith(".bias"), f"{name} is not in {weights.file.path}"
        _set(model, name, torch.zeros(shape, device=device, dtype=dtype))
    model.tie_weights()
    return model.to(device).eval().requires_grad_(False)


def _architecture(weights: LlamaWeights) -> Architecture:
    name = weights.file.architecture
    return next(one for one in ARCHITECTURES.values() if one.name == name)


def _set(model: Any, name: str, values: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(values, requires_grad=False))


def _tensors(weights: LlamaWeights) -> Iterator[tuple[str, Floats]]:
    """Name and values of every parameter, one layer in memory at a time."""
    architecture, facts = _architecture(weights), weights.facts
    tables = {EMBEDDING: partial(weights.embedding_rows, scaled=False)}
    if not facts.tied:
        tables[OUTPUT] = partial(weights.output_rows)
    for name, rows in tables.items():
        table = np.empty((facts.vocab_size, facts.width), dtype=np.float32)
        for start in range(0, facts.vocab_size, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, facts.vocab_size)
            table[start:stop] = rows(start, stop)
        yield architecture.from_gguf_name(name), table
    offset = np.float32(architecture.norm_offset)
    yield architecture.from_gguf_name("output_norm.weight"), weights.final_norm() - offset
    for number in range(facts.layers):
        for name, values in _stored(weights.layer(number), weights.features.fused):
            ours = architecture.from_gguf_name(f"blk.{number}.{name}")
            yield ours, values - offset if name.endswith("norm.weight") else values


def _stored(layer: LayerWeights, fused: bool) -> Iterator[tuple[str, Floats]]:
    """A layer's tensors by their names in the file, half-split."""
    have = {field.name: getattr(layer, field.name) for field in fields(layer)}
    for name, parts in _FUSED.items() if fused else ():
        yield name, np.concatenate([have.pop(part) for part in parts])
    for name, ours in LAYER_NAMES.items():
        if have.get(ours) is not None:
            yield name, have[ours]
