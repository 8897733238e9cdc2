"""The folder of a model that is to become a student, checked without PyTorch."""

from __future__ import annotations

from pathlib import Path

from distill.errors import UserError
from teachers.gguf.file import TeacherFileError
from teachers.huggingface.folder import ModelFolder, check_folder


def base_folder(path: Path, what: str = "--student-base") -> ModelFolder:
    """The folder of a model that is to become a student, which errors call ``what``.

    Raises:
        UserError: it is none, or is quantized.
    """
    try:
        folder = check_folder(path)
    except TeacherFileError as error:
        raise UserError(f"{what}: {error}") from None
    if "quantization_config" in folder.config:
        raise UserError(
            f"{what} {path} is quantized already; give the folder of the model before that, and "
            "add --load-in-4bit"
        )
    return folder
