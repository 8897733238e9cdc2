"""A teacher's tokenizer without the teacher: llama.cpp on a file that carries little else."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from students.builder import build_student
from students.config import SO8TConfig
from students.export import ExportNames, MetadataEntry, write_gguf
from teachers.gguf_teacher import GGUFTeacher

WIDTH = 32


@contextmanager
def tokenizer_alone(tokenizer: Mapping[str, MetadataEntry], vocab_size: int) -> Iterator[GGUFTeacher]:
    """Something that tokenises and renders conversations like the model that ``tokenizer`` (GGUF metadata) is of.

    llama.cpp reads a tokenizer only from a whole model, so it gets the smallest one: a single narrow layer.
    """
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
        write_gguf(build_student(config, seed=0), path, "f16", tokenizer, ExportNames("tokenizer", {}))
        with GGUFTeacher(path, threads=1) as model:
            yield model
