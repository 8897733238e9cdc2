"""What ``distill judge`` can refuse before PyTorch is imported."""

from __future__ import annotations

from pathlib import Path

from distill.errors import UserError
from distill.heads.prompts import read_prompts, require_prompt_text
from students.model.head_decisions import carries_heads
from teachers.gguf.file import GGUFFile, read_gguf


def check_judge(student: Path, prompt: str | None, prompts: Path | None) -> list[str]:
    """The prompts to judge, checked together with the student.

    Raises:
        UserError: not exactly one source of prompts, an unusable file, no heads.
        TeacherFileError: the student is no GGUF file, or damaged.
    """
    if (prompt is None) == (prompts is None):
        raise UserError("give one prompt to judge, or --prompts FILE.jsonl")
    if prompt is not None:
        require_prompt_text(prompt)
    require_heads(read_gguf(student))
    if prompts is not None:
        return [entry.text for entry in read_prompts(prompts, labelled=False)]
    return [] if prompt is None else [prompt]


def require_heads(file: GGUFFile) -> None:
    """Raise ``UserError`` unless a student has a head."""
    if not carries_heads(file.fields):
        raise UserError(
            f"{file.path} carries no heads (so8t.safety.*, so8t.verification.*); give a student "
            "that `distill run` has "
            "made, with safety.labels and loss.lambda_safety as they are by default"
        )
