"""The file types a student can be exported as, by llama.cpp's own names in small letters."""

from __future__ import annotations

from dataclasses import dataclass

from gguf import GGMLQuantizationType, LlamaFileType


@dataclass(frozen=True)
class FileType:
    """One of llama.cpp's file types.

    ``number``: its own for it. ``weighted``: its quantizer uses an importance matrix. ``storage``:
    of matrices, where ``students.gguf.writer`` writes the type itself.
    """

    number: LlamaFileType
    weighted: bool
    storage: GGMLQuantizationType | None = None


FILE_TYPES = {
    "f32": FileType(LlamaFileType.ALL_F32, False, GGMLQuantizationType.F32),
    "f16": FileType(LlamaFileType.MOSTLY_F16, False, GGMLQuantizationType.F16),
    "bf16": FileType(LlamaFileType.MOSTLY_BF16, False),
    "q8_0": FileType(LlamaFileType.MOSTLY_Q8_0, False, GGMLQuantizationType.Q8_0),
    "q6_k": FileType(LlamaFileType.MOSTLY_Q6_K, True),
    "q5_k_m": FileType(LlamaFileType.MOSTLY_Q5_K_M, True),
    "q4_k_m": FileType(LlamaFileType.MOSTLY_Q4_K_M, True),
    "q4_0": FileType(LlamaFileType.MOSTLY_Q4_0, True),
    "iq4_nl": FileType(LlamaFileType.MOSTLY_IQ4_NL, True),
}
"""From the most exact to the smallest."""
