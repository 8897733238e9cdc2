"""Write a student as a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from students.gguf.architectures import (
    Architecture,
    architecture_of,
    context_length,
    head_width,
    require_exportable,
    rotary_dimensions,
    to_gguf_name,
)
from students.gguf.metadata import (
    QUANTS,
    ExportError,
    ExportNames,
    ExtraValue,
    MetadataEntry,
    add_general,
    add_origin,
    add_size_label,
    add_tokenizer,
    add_values,
    require_format,
)
from students.gguf.rope_scaling import rope_scaling, rope_theta
from students.model import so8
from students.model.decoder import SO8TForCausalLM
from students.model.fold import fold
from students.model.heads import head_values
from students.model.interface import Student

_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file: its name there, and how many heads its rows are to be permuted by
    (0: not at all)."""

    name: str
    tensor: Tensor
    permuted_heads: int = 0

    def array(self) -> NDArray[np.float32]:
        """The values as the file holds them, before quantisation."""
        found: NDArray[np.float32] = self.tensor.detach().cpu().numpy()
        if not self.permuted_heads:
            return np.ascontiguousarray(found)
        rows = permute_for_rope(found.reshape(len(found), -1), self.permuted_heads)
        return np.ascontiguousarray(rows.reshape(found.shape))


def write_base_gguf(
    model: PreTrainedModel,
    path: Path,
    quant: str,
    tokenizer: Mapping[str, MetadataEntry],
    names: ExportNames,
    extras: Mapping[str, ExtraValue],
) -> None:
    """Write ``model``, float32 and with its adapters merged, to ``path``.

    ``tokenizer`` holds ``tokenizer.*`` metadata (value, type, element type) with as many tokens as
    the model has rows. ``extras``: further ``so8t.*`` keys by their full names, the heads for
    instance (see ``add_values``). Nothing that is refused leaves a file.

    Raises:
        ExportError: unknown ``quant``, a model llama.cpp does not compute alike (see
            ``require_exportable``), weights that are not float32 or not finite, or a vocabulary
            that does not match the tokenizer.
        UnmappedTensor: a weight has no GGUF name.
        OSError: the disk refuses.
    """
    require_exportable(model.config)
    require_format(quant, tokenizer, model.config.vocab_size)
    entries = list(_entries(model, architecture_of(model.config)))
    rows = {len(entry.tensor) for entry in entries if entry.name in (_EMBEDDING, _OUTPUT)}
    if rows != {model.config.vocab_size}:
        raise ExportError(
            f"embedding and output have {sorted(rows)} rows, the configuration "
            f"{model.config.vocab_size} tokens"
        )
    writer = GGUFWriter(path, model.config.model_type)
    try:
        add_general(writer, quant, names)
        _add_shape(writer, model)
        add_origin(writer, names)
        add_values(writer, extras)
        add_tokenizer(writer, tokenizer)
        _write(writer, entries, quant)
    finally:
        writer.close()


def _entries(model: PreTrainedModel, architecture: Architecture) -> Iterator[_Entry]:
    """Every tensor of the file, none converted yet; the model's are each there once."""
    config, state = model.config, model.state_dict()
    permuted = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in state.items():
        theirs = architecture.to_gguf_name(name)
        if tensor.dtype != torch.float32:
            raise ExportError(
                f"{name} is {tensor.dtype}; only float32 weights are exported (load it in float32)"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ExportError(f"{name} has values that are not finite")
        if theirs == _OUTPUT and torch.equal(tensor, state["model.embed_tokens.weight"]):
            continue  # tied: llama.cpp takes the embedding where there is no output matrix
        heads = permuted.get(name.split(".")[-2], 0) if architecture.permuted else 0
        yield _Entry(theirs, tensor, heads)
    for theirs, factors in rope_scaling(config, rotary_dimensions(config)).tensors.items():
        yield _Entry(theirs, torch.from_numpy(factors))


def _add_shape(writer: GGUFWriter, model: PreTrainedModel) -> None:
    """The keys that llama.cpp's own converter writes for these architectures."""
    config = model.config
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    width = head_width(config)
    if width * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(width)
        writer.add_value_length(width)
    writer.add_rope_dimension_count(rotary_dimensions(config))
    writer.add_rope_freq_base(rope_theta(config))
    if config.model_type == "phi3":
        writer.add_sliding_window(
            config.sliding_window or 0
        )  # older llama.cpp refuses a file without it
    for key, value in rope_scaling(config, rotary_dimensions(config)).values.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[
            type(value)
        ]
        add(f"{config.model_type}.{key}", value)


def _write(writer: GGUFWriter, entries: list[_Entry], quant: str) -> None:
    """Sizes first, then one tensor after another, so that one alone is held twice."""
    kinds = [storage_type(entry.tensor.shape, QUANTS[quant][0]) for entry in entries]
    for entry, kind in zip(entries, kinds, strict=True):
        shape = tuple(entry.tensor.shape)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        size = math.prod(shape) // block * block_bytes
        writer.add_tensor_info(entry.name, shape, np.dtype(np.float32), size, raw_dtype=kind)
    add_size_label(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry, kind in zip(entries, kinds, strict=True):
        writer.write_tensor_data(quantize(entry.array(), kind))


def permute_for_rope(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder the rows of a query or key projection ``[heads · W, D]`` from half-split to paired
    rotary layout."""
    rows, columns = weight.shape
    return (
        weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def write_gguf(
    student: SO8TForCausalLM,
    path: Path,
    quant: str,
    tokenizer: Mapping[str, MetadataEntry],
    names: ExportNames,
) -> None:
    """Fold ``student`` and write it to ``path``.

    ``tokenizer`` holds the teacher's ``tokenizer.*`` metadata (value, type, element type), copied
    as it is.

    Raises:
        ExportError: unknown ``quant``, or a vocabulary that does not match the tokenizer.
        FoldError: the gates cannot be folded exactly.
        UnmappedTensor: a weight has no GGUF name.
        OSError: the disk refuses.
    """
    require_format(quant, tokenizer, student.config.vocab_size)
    writer = GGUFWriter(path, "llama")
    try:
        _add_metadata(writer, student, quant, names)
        add_tokenizer(writer, tokenizer)
        _add_tensors(writer, student, QUANTS[quant][0])
        add_size_label(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_metadata(
    writer: GGUFWriter, student: SO8TForCausalLM, quant: str, names: ExportNames
) -> None:
    config = student.config
    add_general(writer, quant, names)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if (
        config.attention_width != config.hidden_size
    ):  # else it is what every reader takes them to be
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    add_origin(writer, names)
    add_values(writer, head_values(student.heads()))
    for key, number in rotation_figures(student).items():
        writer.add_float32(f"so8t.{key}", number)


def rotation_figures(student: Student) -> dict[str, float]:
    """How exact the rotations are and how far from commuting, over all layers and blocks."""
    rotations = student.rotations().detach()
    commutators = so8.commutator_norm(rotations[:, 1], rotations[:, 0])
    return {
        "max_orthogonality_error": float(so8.orthogonality_error(rotations).max()),
        "max_determinant_error": float(so8.determinant_error(rotations).max()),
        "min_commutator_norm": float(commutators.min()),
        "mean_commutator_norm": float(commutators.mean()),
    }


def _add_tensors(writer: GGUFWriter, student: SO8TForCausalLM, kind: GGMLQuantizationType) -> None:
    config = student.config
    for name, tensor in fold(student).items():
        weight = _array(tensor)
        if name.endswith("q_proj.weight"):
            weight = permute_for_rope(weight, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            weight = permute_for_rope(weight, config.num_key_value_heads)
        stored = storage_type(weight.shape, kind)
        data = quantize(np.ascontiguousarray(weight), stored)
        writer.add_tensor(to_gguf_name(name), data, raw_dtype=stored)


def storage_type(shape: Sequence[int], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """How a tensor of ``shape`` is stored in a file of ``kind``.

    Vectors (norms, biases) stay float32; rows that do not divide into Q8_0's blocks stay float16,
    as llama.cpp does.
    """
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if kind == GGMLQuantizationType.Q8_0 and shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        return GGMLQuantizationType.F16
    return kind


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().cpu().numpy()
