"""What ``distill judge`` can refuse before PyTorch is imported."""

from __future__ import annotations

from pathlib import Path

from distill.errors import UserError
from distill.heads.prompts import read_prompts, require_words
from students.model.head_decisions import carries_heads
from teachers.gguf.file import GGUFFile, read_gguf


def check_judge(student: Path, prompt: str | None, prompts: Path | None) -> list[str]:
    """Refuse what ``distill judge`` cannot do; returns what is to be judged.

    Raises:
        UserError: no prompt or two kinds of them, a file that cannot be used, or a student
            without heads.
        TeacherFileError: the student is no GGUF file, or damaged.
    """
    if (prompt is None) == (prompts is None):
        raise UserError("give one prompt to judge, or --prompts FILE.jsonl")
    if prompt is not None:
        require_words(prompt)
    require_heads(read_gguf(student))
    if prompts is not None:
        return [entry.text for entry in read_prompts(prompts, labelled=False)]
    return [] if prompt is None else [prompt]


def require_heads(file: GGUFFile) -> None:
    """See that a student has a head.

    Raises:
        UserError: it has none.
    """
    if not carries_heads(file.fields):
        raise UserError(
            f"{file.path} carries no heads (so8t.safety.*, so8t.verification.*); give a student "
            "that `distill run` has "
            "made, with safety.labels and loss.lambda_safety as they are by default"
        )
