"""The file types a student can be exported as, by llama.cpp's own names in small letters, and the
types of the rows that belong to tokens: those of the embedding, and of an output matrix of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType


@dataclass(frozen=True)
class FileType:
    """One of llama.cpp's file types.

    ``number``: its own for it. ``weighted``: its quantizer uses an importance matrix. ``rows``:
    what the output's rows are stored as unless asked for otherwise, llama.cpp's own choice, and
    ``narrow`` where they do not divide into blocks of 256: the smallest with which a small
    student's file kept to half of the KL that is let pass (docs/benchmarks.md). ``storage``: of
    matrices, where ``students.gguf.writer`` writes the type itself.
    """

    number: LlamaFileType
    weighted: bool
    rows: str
    narrow: str
    storage: GGMLQuantizationType | None = None


FILE_TYPES = {
    "f32": FileType(LlamaFileType.ALL_F32, False, "f32", "f32", GGMLQuantizationType.F32),
    "f16": FileType(LlamaFileType.MOSTLY_F16, False, "f16", "f16", GGMLQuantizationType.F16),
    "bf16": FileType(LlamaFileType.MOSTLY_BF16, False, "bf16", "bf16"),
    "q8_0": FileType(LlamaFileType.MOSTLY_Q8_0, False, "q8_0", "q8_0", GGMLQuantizationType.Q8_0),
    "q6_k": FileType(LlamaFileType.MOSTLY_Q6_K, True, "q6_k", "q8_0"),
    "q5_k_m": FileType(LlamaFileType.MOSTLY_Q5_K_M, True, "q6_k", "q8_0"),
    "q4_k_m": FileType(LlamaFileType.MOSTLY_Q4_K_M, True, "q6_k", "q5_1"),
    "q4_0": FileType(LlamaFileType.MOSTLY_Q4_0, True, "q6_k", "q5_0"),
    "iq4_nl": FileType(LlamaFileType.MOSTLY_IQ4_NL, True, "q6_k", "q5_0"),
}
"""From the most exact to the smallest."""


@dataclass(frozen=True)
class RowType:
    """How a token's row may be stored. ``rounds_like``: the file type that rounds as much.
    ``instead``: what is taken where rows do not divide into its blocks, as llama.cpp would."""

    storage: GGMLQuantizationType
    rounds_like: str
    instead: str = "f16"

    def fits(self, width: int) -> bool:
        """Whether rows of ``width`` numbers divide into its blocks."""
        return width % GGML_QUANT_SIZES[self.storage][0] == 0


ROW_TYPES = {
    "f32": RowType(GGMLQuantizationType.F32, "f32"),
    "f16": RowType(GGMLQuantizationType.F16, "f16"),
    "bf16": RowType(GGMLQuantizationType.BF16, "bf16"),
    "q8_0": RowType(GGMLQuantizationType.Q8_0, "q8_0"),
    "q6_k": RowType(GGMLQuantizationType.Q6_K, "q6_k", "q8_0"),
    "q5_k": RowType(GGMLQuantizationType.Q5_K, "q5_k_m", "q5_1"),
    "q5_1": RowType(GGMLQuantizationType.Q5_1, "q5_k_m"),
    "q5_0": RowType(GGMLQuantizationType.Q5_0, "q5_k_m"),
    "q4_k": RowType(GGMLQuantizationType.Q4_K, "q4_k_m", "q5_0"),
    "q4_1": RowType(GGMLQuantizationType.Q4_1, "q4_0"),
    "q4_0": RowType(GGMLQuantizationType.Q4_0, "q4_0"),
    "iq4_nl": RowType(GGMLQuantizationType.IQ4_NL, "iq4_nl"),
}
SUPER_BLOCK = 256  # of the K types
MATRICES = ("embedding", "output")


@dataclass(frozen=True)
class Quantization:
    """A file type, and what the rows of ``MATRICES`` are to be stored as where the user said so;
    written ``q4_k_m:embedding=q6_k:output=q8_0``."""

    file_type: str
    rows: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return ":".join([self.file_type, *(f"{key}={kind}" for key, kind in self.rows.items())])

    @property
    def stem(self) -> str:
        """The same for a file's name, in which not every system takes a colon."""
        return str(self).replace(":", "-").replace("=", "-")

    @property
    def rounding(self) -> list[str]:
        """File types one of which rounds as much as anything in this file."""
        return [self.file_type, *(ROW_TYPES[kind].rounds_like for kind in self.rows.values())]

    @classmethod
    def parse(cls, text: str) -> Quantization:
        """What a text means, in letters of any case.

        Raises:
            ValueError: it means nothing; says what there is.
        """
        name, *parts = text.lower().split(":")
        if name not in FILE_TYPES:
            raise ValueError(f"{text!r} is not a file type; choose from {', '.join(FILE_TYPES)}")
        rows = {}
        for part in parts:
            matrix, _, kind = part.partition("=")
            if matrix not in MATRICES or kind not in ROW_TYPES or matrix in rows:
                raise ValueError(
                    f"{text!r}: {part!r} is not the type of token rows; write embedding=TYPE or "
                    f"output=TYPE, each once, with TYPE one of {', '.join(ROW_TYPES)}"
                )
            rows[matrix] = kind
        return cls(name, {matrix: rows[matrix] for matrix in MATRICES if matrix in rows})

    def row_types(self, width: int, tied: bool = True) -> dict[str, str]:
        """The types of ``MATRICES`` for rows of ``width`` numbers, as far as they are not left to
        llama.cpp: as asked for, or by default, or the next that such rows divide into.

        ``tied``: the embedding is the output matrix, whose rounding goes into every logit. An
        embedding that is only looked up is the file type's own matter.
        """
        kind = FILE_TYPES[self.file_type]
        default = kind.narrow if width % SUPER_BLOCK else kind.rows
        chosen = {"embedding" if tied else "output": default, **self.rows}
        return {matrix: fitting(one, width) for matrix, one in chosen.items()}


def fitting(kind: str, width: int) -> str:
    """``kind``, or what is taken in its place for rows of ``width`` numbers."""
    while not ROW_TYPES[kind].fits(width):
        kind = ROW_TYPES[kind].instead
    return kind
