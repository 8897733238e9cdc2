"""What a student's GGUF file says besides its tensors, and writing files without large ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, GGUFWriter

from students.gguf.file_types import FILE_TYPES
from students.gguf.provenance import Lineage

MetadataEntry = tuple[Any, GGUFValueType, "GGUFValueType | None"]
ExtraValue = list[float] | list[str] | list[int] | float | int


class ExportError(ValueError):
    """A student that cannot be written as GGUF; names the reason."""


@dataclass(frozen=True)
class ExportNames:
    """The file's name and origin, as ``so8t.*`` keys and as the specification has it."""

    name: str
    origin: Mapping[str, str]
    lineage: Lineage = field(default_factory=Lineage)


@contextmanager
def small_gguf(path: Path, architecture: str) -> Iterator[GGUFWriter]:
    """A writer for a file whose tensors, if any, fit into memory; written at the end of the block.

    Raises:
        OSError: the disk refuses.
    """
    writer = GGUFWriter(path, architecture)
    try:
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def write_tokenizer(path: Path, tokenizer: Mapping[str, MetadataEntry], name: str) -> None:
    """Write a GGUF file of the tokenizer alone, so that a student can be exported again later.

    Raises:
        OSError: the disk refuses.
    """
    with small_gguf(path, "llama") as writer:
        writer.add_name(name)
        add_tokenizer(writer, tokenizer)


def require_format(quant: str, tokenizer: Mapping[str, MetadataEntry], vocab_size: int) -> None:
    """Refuse what no file can be written from, before there is one.

    Raises:
        ExportError: ``quant`` is none of the types that are written without llama.cpp's quantizer,
            or the tokenizer does not have ``vocab_size`` tokens.
    """
    written = [name for name, kind in FILE_TYPES.items() if kind.storage is not None]
    if quant not in written:
        raise ExportError(f"quant {quant!r} is not supported; choose one of {', '.join(written)}")
    tokens = tokenizer.get("tokenizer.ggml.tokens")
    count = 0 if tokens is None else len(tokens[0])
    if tokens is None or count != vocab_size:
        raise ExportError(f"the student has {vocab_size} tokens, the tokenizer {count}")


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
        return [_as_bytes(item) for item in value]
    return value


def add_values(writer: GGUFWriter, values: Mapping[str, ExtraValue]) -> None:
    """Add keys that llama.cpp carries along without reading them, the heads for instance.

    Numbers in lists become float32, whole ones int8 or, where one does not fit, int32; no list may
    be empty.
    """
    for key, value in values.items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_key_value(key, value, GGUFValueType.ARRAY, _element(value))


def _element(values: list[float] | list[str] | list[int]) -> GGUFValueType:
    first = values[0]
    if isinstance(first, int):
        fits = all(-128 <= number < 128 for number in values if isinstance(number, int))
        return GGUFValueType.INT8 if fits else GGUFValueType.INT32
    return GGUFValueType.STRING if isinstance(first, str) else GGUFValueType.FLOAT32
