"""Write a student as a GGUF file of architecture ``llama`` with the teacher's own tokenizer.

Stock llama.cpp knows nothing of the gates: they are folded away first. Rotary embeddings of this
architecture turn neighbouring pairs (2i, 2i+1), while the student turns (i, i + W/2); the rows of
the query and key projections are permuted accordingly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType

from students.gguf.provenance import Lineage, add_lineage

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
    """What the file says about itself: its name and where it came from, as ``so8t.*`` keys and as
    the specification has it."""

    name: str
    origin: Mapping[str, str]
    lineage: Lineage = field(default_factory=Lineage)


def write_tokenizer(path: Path, tokenizer: Mapping[str, MetadataEntry], name: str) -> None:
    """Write a GGUF file that holds the tokenizer alone, so that a student can be exported again
    later.

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
            # The writer refuses empty arrays, and an absent one means the same to llama.cpp
            continue
        writer.add_key_value(key, _as_bytes(value), kind, element)


def _as_bytes(value: Any) -> Any:
    """Text back into the very bytes it was read from (tokens need not be valid UTF-8)."""
    if isinstance(value, str):
        return value.encode("utf-8", errors="surrogateescape")
    if isinstance(value, list) and value and isinstance(value[0], str):
        return [item.encode("utf-8", errors="surrogateescape") for item in value]
    return value


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
    """Add ``so8t.*`` keys, the heads for instance, which llama.cpp carries along without reading
    them.

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
