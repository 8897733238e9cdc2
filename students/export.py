"""Write a student as a GGUF file of architecture ``llama`` with the teacher's own tokenizer.

Stock llama.cpp knows nothing of the gates: they are folded away first. Rotary embeddings of this
architecture turn neighbouring pairs (2i, 2i+1), while the student turns (i, i + W/2); the rows of the query
and key projections are permuted accordingly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from numpy.typing import NDArray
from torch import Tensor

from students import so8
from students.fold import fold
from students.gguf_names import to_gguf_name
from students.heads import head_values
from students.lineage import Lineage, add_lineage
from students.model import SO8TForCausalLM
from students.student import Student

QUANTS = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
MetadataEntry = tuple[Any, GGUFValueType, "GGUFValueType | None"]
ExtraValue = list[float] | list[str] | float | int


class ExportError(ValueError):
    """A student that cannot be written as GGUF; names the reason."""


@dataclass(frozen=True)
class ExportNames:
    """What the file says about itself: its name and where it came from, as ``so8t.*`` keys and as the specification
    has it."""

    name: str
    origin: Mapping[str, str]
    lineage: Lineage = field(default_factory=Lineage)


def permute_for_rope(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder the rows of a query or key projection ``[heads · W, D]`` from half-split to paired rotary layout."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(
    student: SO8TForCausalLM,
    path: Path,
    quant: str,
    tokenizer: Mapping[str, MetadataEntry],
    names: ExportNames,
) -> None:
    """Fold ``student`` and write it to ``path``.

    ``tokenizer`` holds the teacher's ``tokenizer.*`` metadata (value, type, element type), copied as it is.

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


def write_tokenizer(path: Path, tokenizer: Mapping[str, MetadataEntry], name: str) -> None:
    """Write a GGUF file that holds the tokenizer alone, so that a student can be exported again later.

    Raises:
        OSError: the disk refuses.
    """
    writer = GGUFWriter(path, "llama")
    try:
        writer.add_name(name)
        add_tokenizer(writer, tokenizer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def require_format(quant: str, tokenizer: Mapping[str, MetadataEntry], vocab_size: int) -> None:
    """Refuse what no file can be written from, before there is one.

    Raises:
        ExportError: unknown ``quant``, or a tokenizer that does not have ``vocab_size`` tokens.
    """
    if quant not in QUANTS:
        raise ExportError(f"quant {quant!r} is not supported; choose one of {', '.join(QUANTS)}")
    tokens = tokenizer.get("tokenizer.ggml.tokens")
    if tokens is None or len(tokens[0]) != vocab_size:
        found = 0 if tokens is None else len(tokens[0])
        raise ExportError(f"the student has {vocab_size} tokens, the tokenizer {found}")


def add_tokenizer(writer: GGUFWriter, tokenizer: Mapping[str, MetadataEntry]) -> None:
    """Add the ``tokenizer.*`` entries as they are."""
    for key, (value, kind, element) in tokenizer.items():
        if kind == GGUFValueType.ARRAY and not value:
            continue  # the writer refuses empty arrays, and an absent one means the same to llama.cpp
        writer.add_key_value(key, _as_bytes(value), kind, element)


def _as_bytes(value: Any) -> Any:
    """Text back into the very bytes it was read from (tokens need not be valid UTF-8)."""
    if isinstance(value, str):
        return value.encode("utf-8", errors="surrogateescape")
    if isinstance(value, list) and value and isinstance(value[0], str):
        return [item.encode("utf-8", errors="surrogateescape") for item in value]
    return value


def _add_metadata(writer: GGUFWriter, student: SO8TForCausalLM, quant: str, names: ExportNames) -> None:
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
    if config.attention_width != config.hidden_size:  # else it is what every reader takes them to be
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    add_origin(writer, names)
    add_values(writer, head_values(student.heads()))
    for key, number in rotation_figures(student).items():
        writer.add_float32(f"so8t.{key}", number)


def add_general(writer: GGUFWriter, quant: str, names: ExportNames) -> None:
    """The file's name, its lineage and the format of its weights."""
    writer.add_name(names.name)
    add_lineage(writer, names.lineage)
    writer.add_file_type(QUANTS[quant][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_size_label(writer: GGUFWriter) -> None:
    """The number of parameters, such as 46M; once all tensors are known to the writer."""
    total, shared, expert, experts = writer.get_total_parameter_count()
    writer.add_size_label(gguf.size_label(total, shared, expert, experts))


def add_origin(writer: GGUFWriter, names: ExportNames) -> None:
    """Where the file came from, as ``so8t.*`` keys."""
    for key, value in names.origin.items():
        writer.add_string(f"so8t.{key}", value)


def add_values(writer: GGUFWriter, values: Mapping[str, ExtraValue]) -> None:
    """Add ``so8t.*`` keys, the heads for instance, which llama.cpp carries along without reading them.

    Numbers in lists become float32; no list may be empty.
    """
    for key, value in values.items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            element = GGUFValueType.STRING if isinstance(value[0], str) else GGUFValueType.FLOAT32
            writer.add_key_value(key, value, GGUFValueType.ARRAY, element)


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

    Vectors (norms, biases) stay float32; rows that do not divide into Q8_0's blocks stay float16, as llama.cpp does.
    """
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if kind == GGMLQuantizationType.Q8_0 and shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        return GGMLQuantizationType.F16
    return kind


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().cpu().numpy()
