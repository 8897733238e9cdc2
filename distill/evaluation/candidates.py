"""The files that ``distill evaluate`` compares, checked before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from gguf import LlamaFileType

from distill.errors import UserError
from distill.evaluation.inputs.files import Files
from distill.heads.gguf_heads import heads_in
from distill.runs.folder import RunFolder
from students.model.heads import Heads
from teachers.gguf.file import GGUFFile


@dataclass(frozen=True)
class Candidate:
    """A GGUF file to be measured; ``run``: the folder of its run, if it is in one."""

    name: str
    file: GGUFFile
    run: RunFolder | None = None
    heads: Heads | None = None

    @property
    def file_type(self) -> str:
        """The file type by its metadata, such as Q4_K_M; empty: missing or unknown."""
        try:
            return (
                LlamaFileType(self.file.value("general.file_type"))
                .name.removeprefix("MOSTLY_")
                .removeprefix("ALL_")
            )
        except ValueError:
            return ""

    @property
    def context_length(self) -> int:
        """Tokens of the model's trained context; raises ``UserError`` if it is missing."""
        key = f"{self.file.architecture}.context_length"
        length = self.file.value(key)
        if type(length) is not int or length < 1:
            raise UserError(
                f"{self.file.path} is damaged: {key} is {length!r}; export or convert it again"
            )
        return length


@dataclass(frozen=True)
class Candidates:
    """The teacher and its students. ``warnings``: what about them the user should know."""

    teacher: Candidate
    students: list[Candidate]
    warnings: list[str]


def find_candidates(files: Files) -> Candidates:
    """The teacher and its students with their heads; raises ``UserError`` for broken heads."""
    students = [
        Candidate(name, file, run, heads_in(file))
        for name, file, run in zip(files.names[1:], files.students, files.runs, strict=True)
    ]
    return Candidates(Candidate(files.names[0], files.teacher), students, files.warnings)
