"""A teacher's tokenizer without the teacher: llama.cpp on a file that carries little else."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from students.gguf.metadata import ExportNames, MetadataEntry
from teachers.gguf.file import Field, GGUFFile, tokenizer_fields
from teachers.llama_cpp.teacher import GGUFTeacher

WIDTH = 32


@contextmanager
def tokenizer_alone(
    tokenizer: Mapping[str, MetadataEntry], vocab_size: int, name: str = "tokenizer"
) -> Iterator[GGUFTeacher]:
    """The tokenizer and chat template of ``tokenizer`` (GGUF metadata), in a running llama.cpp.

    ``name``: the teacher's, on which it may depend how llama.cpp reads its tokenizer.
    llama.cpp reads a tokenizer only from a whole model, so it gets a single narrow layer.
    """
    # These import transformers, which takes seconds.
    from students.gguf.writer import write_gguf
    from students.model.build import build_student
    from students.model.config import SO8TConfig

    config = SO8TConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        intermediate_size=WIDTH,
        max_position_embeddings=512,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.gguf"
        write_gguf(build_student(config, seed=0), path, "f16", tokenizer, ExportNames(name, {}))
        with GGUFTeacher(path, threads=1) as model:
            yield model


def tokenizer_entries(file: GGUFFile) -> dict[str, MetadataEntry]:
    """A GGUF file's tokenizer and chat template in the form the exporter copies."""
    return metadata_entries(tokenizer_fields(file))


def metadata_entries(fields: Mapping[str, Field]) -> dict[str, MetadataEntry]:
    """GGUF metadata as it was read, in the form the exporter copies."""
    return {key: (field.value, field.type, field.element_type) for key, field in fields.items()}
