"""What a run leaves on the disk, estimated before it starts; sizes in bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill.config.schema import RunConfig
from distill.pipeline.probes import TeacherProbe, first_of
from distill.training.checkpoint_timer import CHECKPOINT_SECONDS
from teachers.base import Teacher
from teachers.gguf.embeddings import stored_columns
from teachers.gguf.file import Field, read_gguf, tokenizer_fields
from teachers.store.teacher_record import (
    LINE_SEQUENCES,
    LINE_TOKENS,
    TeacherRecord,
    first_sequences,
    tokenized_lines,
)

# Bits of a weight in an exported file; the small types keep a table of a large vocabulary in more.
BITS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5}
SMALL_BITS = 6.5
ID_BYTES = 6.0  # a token's id in JSON
# Of tokenizer.json, measured: a token beside its text, a merge, merges for each token.
TOKEN_BYTES, MERGE_BYTES, DERIVED_MERGES = 16, 50, 1.8
STEP_BYTES = 1050  # a step in metrics.jsonl and the report's curves, measured
RECORD_BYTES = 250_000  # tables of the report, card, results, logs of evaluations, measured


@dataclass(frozen=True)
class TeacherFiles:
    """What a store keeps of its teacher beside soft targets (``kept``), and its tokenizer in the
    student's files: as GGUF metadata, as ``tokenizer.json``, and texts that check it."""

    kept: int
    gguf_tokenizer: int
    json_tokenizer: int
    lines: int


@dataclass(frozen=True)
class Disk:
    """``targets``: shards of soft targets; ``teacher``: what the store keeps beside them;
    ``checkpoints``; ``exports``: ``student/``, ``student.gguf``, ``transformers/``; ``records``:
    report, log and the rest."""

    targets: int
    teacher: int
    checkpoints: int
    exports: int
    records: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.targets + self.teacher + self.checkpoints + self.exports + self.records


@dataclass(frozen=True)
class StudentNumbers:
    """Numbers of a student: in its exported file, trained ones; bytes of each in its plain
    folder."""

    exported: int
    trained: int
    plain_bytes: int = 4


def teacher_files(
    teacher: Teacher, gguf: Path | None, probe: TeacherProbe, sequences: int
) -> TeacherFiles:
    """Sizes of what a store of so many sequences keeps of its teacher; ``gguf``: see
    ``keep_teacher_record``."""
    shown = first_of(probe.sequences, min(sequences, LINE_SEQUENCES))
    lines = tokenized_lines(teacher, first_sequences(shown, LINE_SEQUENCES, LINE_TOKENS))
    fields = {} if gguf is None else tokenizer_fields(read_gguf(gguf, model=False))
    info = teacher.info
    # Of its size alone: no page of it is ever touched.
    embeddings = np.empty((info.vocab_size, stored_columns(info.width)), dtype=np.float16)
    arrays = TeacherRecord(info, lines, fields, embeddings).arrays()
    texts = json.dumps([lines.texts, [tokens.tolist() for tokens in lines.tokens]])
    return TeacherFiles(
        kept=probe.codec_bytes + sum(rows.nbytes for rows in arrays.values()),
        gguf_tokenizer=_gguf_bytes(fields),
        json_tokenizer=_json_bytes(fields),
        lines=len(texts),
    )


def exported_bytes(quant: str, numbers: int) -> int:
    """About the size of an exported file with so many numbers."""
    return round(numbers * BITS.get(quant.partition(":")[0], SMALL_BITS) / 8)


def run_files(
    config: RunConfig, teacher: TeacherFiles, student: StudentNumbers, steps: int, tokens: float
) -> tuple[int, int]:
    """Bytes of the exports, and of the records, of a run over so many tokens."""
    exports = exported_bytes(config.export.quant, student.exported)
    exports += student.exported * student.plain_bytes + 4 * student.trained
    exports += 2 * teacher.gguf_tokenizer + teacher.json_tokenizer
    held_out = ID_BYTES * tokens * config.data.held_out + teacher.lines
    return exports, round(_page_bytes() + RECORD_BYTES + steps * STEP_BYTES + held_out)


def checkpoint_bytes(
    config: RunConfig, student: StudentNumbers, steps: int, seconds: float | None
) -> int:
    """The last checkpoint, of weights alone; in a longer training also the one before it, with the
    optimizer's two moments and, where it lies between two validations, the best weights."""
    before = 3 + (steps > config.train.evaluations)
    longer = seconds is None or seconds > CHECKPOINT_SECONDS
    return 4 * student.trained * (1 + before * longer)


def _page_bytes() -> int:
    """The script of the charts, which every report carries."""
    from plotly.offline import get_plotlyjs

    return len(get_plotlyjs().encode())


def _gguf_bytes(fields: Mapping[str, Field]) -> int:
    """A tokenizer's metadata in a GGUF file."""
    size = 0
    for key, field in fields.items():
        values = field.value if isinstance(field.value, list) else [field.value]
        size += (
            len(key)
            + 12
            + sum(len(one.encode()) + 8 if isinstance(one, str) else 4 for one in values)
        )
    return size


def _json_bytes(fields: Mapping[str, Field]) -> int:
    """About what ``tokenizer.json`` takes; SentencePiece's merges are derived from its tokens."""
    if not fields:
        return 0
    tokens, merges = fields["tokenizer.ggml.tokens"].value, fields.get("tokenizer.ggml.merges")
    count = len(tokens) * DERIVED_MERGES if merges is None else len(merges.value)
    return round(sum(len(one) + TOKEN_BYTES for one in tokens) + count * MERGE_BYTES)
