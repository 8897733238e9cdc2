"""Write a student as a GGUF file that stock llama.cpp runs: plain tensors, gates folded away."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from students.gguf.architectures import EMBEDDING, FOLDED, OUTPUT, Architecture, architecture_of
from students.gguf.config_values import (
    context_length,
    head_width,
    require_exportable,
    rotary_dimensions,
    window_of,
)
from students.gguf.file_types import FILE_TYPES
from students.gguf.metadata import (
    ExportError,
    ExportNames,
    ExtraValue,
    MetadataEntry,
    add_tokenizer,
    add_values,
    require_format,
)
from students.gguf.provenance import add_lineage
from students.gguf.rope_scaling import RopeScaling, rope_scaling, rope_theta, window_theta
from students.model import so8
from students.model.decoder import SO8TForCausalLM
from students.model.fold import fold, llama_config
from students.model.heads import head_values
from students.model.interface import Student


@dataclass(frozen=True)
class _Model:
    """What is written: a transformers configuration and its weights by name."""

    architecture: Architecture
    config: Any
    state: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Entry:
    """One tensor under its name in the file.

    ``permuted_heads``: how many heads its rows are to be permuted by, 0: not at all. ``offset`` is
    added to all its values.
    """

    name: str
    tensor: Tensor
    permuted_heads: int = 0
    offset: float = 0.0

    def array(self) -> NDArray[np.float32]:
        """The values as the file holds them, before quantization."""
        values: NDArray[np.float32] = self.tensor.detach().cpu().numpy()
        if self.permuted_heads:
            rows = permute_for_rope(values.reshape(len(values), -1), self.permuted_heads)
            values = rows.reshape(values.shape)
        if self.offset:
            values = values + np.float32(self.offset)
        return np.ascontiguousarray(values)


def write_gguf(
    student: SO8TForCausalLM,
    path: Path,
    quant: str,
    tokenizer: Mapping[str, MetadataEntry],
    names: ExportNames,
) -> None:
    """Fold ``student`` and write it to ``path`` with its heads; see ``write_base_gguf``.

    Raises:
        FoldError: the gates cannot be folded exactly.
    """
    require_format(quant, tokenizer, student.config.vocab_size)
    # Not ``to_llama(student)``, which has its tensors in another order and takes twice the memory.
    model = _Model(FOLDED, llama_config(student.config), fold(student))
    rotations = {f"so8t.{key}": number for key, number in rotation_stats(student).items()}
    extras = {**head_values(student.heads()), **rotations}
    _write_file(model, path, quant, tokenizer, names, extras)


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
        ExportError: ``quant`` is not written without llama.cpp's quantizer, llama.cpp does not
            compute the model alike (see ``require_exportable``), weights are not float32 or not
            finite, or the vocabulary does not match the tokenizer.
        UnmappedTensor: a weight has no GGUF name.
        OSError: the disk refuses.
    """
    require_exportable(model.config)
    described = _Model(architecture_of(model.config), model.config, model.state_dict())
    _write_file(described, path, quant, tokenizer, names, extras)


def _write_file(
    model: _Model,
    path: Path,
    quant: str,
    tokenizer: Mapping[str, MetadataEntry],
    names: ExportNames,
    extras: Mapping[str, ExtraValue],
) -> None:
    vocab_size = model.config.vocab_size
    require_format(quant, tokenizer, vocab_size)
    scaling = rope_scaling(model.config, rotary_dimensions(model.config))
    entries = [
        *_entries(model),
        *(_Entry(name, torch.from_numpy(values)) for name, values in scaling.tensors.items()),
    ]
    rows = {len(entry.tensor) for entry in entries if entry.name in (EMBEDDING, OUTPUT)}
    if rows != {vocab_size}:
        raise ExportError(
            f"embedding and output have {sorted(rows)} rows, the configuration {vocab_size} tokens"
        )
    kind = FILE_TYPES[quant]
    assert kind.storage is not None
    writer = GGUFWriter(path, model.architecture.name)
    try:
        writer.add_name(names.name)
        add_lineage(writer, names.lineage)
        writer.add_file_type(kind.number)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, model, scaling)
        for key, text in names.origin.items():
            writer.add_string(f"so8t.{key}", text)
        add_values(writer, extras)
        add_tokenizer(writer, tokenizer)
        _write_tensors(writer, entries, kind.storage)
    finally:
        writer.close()


def _entries(model: _Model) -> Iterator[_Entry]:
    """The model's tensors, each once, none converted yet."""
    config, architecture = model.config, model.architecture
    permuted = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state.items():
        gguf_name = architecture.to_gguf_name(name)
        if tensor.dtype != torch.float32:
            raise ExportError(
                f"{name} is {tensor.dtype}; only float32 weights are exported (load it in float32)"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ExportError(f"{name} has values that are not finite")
        if gguf_name == OUTPUT and torch.equal(tensor, model.state["model.embed_tokens.weight"]):
            continue  # tied: llama.cpp takes the embedding where there is no output matrix
        heads = permuted.get(name.split(".")[-2], 0) if architecture.permuted else 0
        offset = architecture.norm_offset if gguf_name.endswith("norm.weight") else 0.0
        yield _Entry(gguf_name, tensor, heads, offset)


def _add_shape(writer: GGUFWriter, model: _Model, scaling: RopeScaling) -> None:
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
    if width * config.num_attention_heads != config.hidden_size:  # else it is readers' default
        writer.add_key_length(width)
        writer.add_value_length(width)
    writer.add_rope_dimension_count(rotary_dimensions(config))
    writer.add_rope_freq_base(rope_theta(config))
    if model.architecture.ignores_window:
        writer.add_sliding_window(config.sliding_window or 0)
    if window := window_of(config):
        writer.add_sliding_window(window)
        writer.add_rope_freq_base_swa(window_theta(config))
    adders = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
    for key, value in scaling.values.items():
        adders[type(value)](f"{model.architecture.name}.{key}", value)


def _write_tensors(
    writer: GGUFWriter, entries: Sequence[_Entry], kind: GGMLQuantizationType
) -> None:
    """Sizes first, then one tensor after another, so that one alone is held twice."""
    kinds = [storage_type(entry.tensor.shape, kind) for entry in entries]
    for entry, stored in zip(entries, kinds, strict=True):
        shape = tuple(entry.tensor.shape)
        block, block_bytes = GGML_QUANT_SIZES[stored]
        size = math.prod(shape) // block * block_bytes
        writer.add_tensor_info(entry.name, shape, np.dtype(np.float32), size, raw_dtype=stored)
    writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry, stored in zip(entries, kinds, strict=True):
        writer.write_tensor_data(quantize(entry.array(), stored))


def permute_for_rope(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder rows ``[heads · W, D]`` of a query or key projection from half-split rotary pairs
    (i, i + W/2) to neighboring ones (2i, 2i + 1)."""
    rows, columns = weight.shape
    split = weight.reshape(heads, 2, rows // heads // 2, columns)
    return split.swapaxes(1, 2).reshape(rows, columns)


def rotation_stats(student: Student) -> dict[str, float]:
    """How exact the rotations are and how far from commuting, over all layers and blocks."""
    rotations = student.rotations().detach()
    commutators = so8.commutator_norm(rotations[:, 1], rotations[:, 0])
    return {
        "max_orthogonality_error": float(so8.orthogonality_error(rotations).max()),
        "max_determinant_error": float(so8.determinant_error(rotations).max()),
        "min_commutator_norm": float(commutators.min()),
        "mean_commutator_norm": float(commutators.mean()),
    }


def storage_type(shape: Sequence[int], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """How a tensor of ``shape`` is stored in a file of ``kind``.

    Vectors (norms, biases) stay float32; rows that do not divide into Q8_0's blocks stay float16,
    as llama.cpp does.
    """
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if kind == GGMLQuantizationType.Q8_0 and shape[-1] % GGML_QUANT_SIZES[kind][0]:
        return GGMLQuantizationType.F16
    return kind
