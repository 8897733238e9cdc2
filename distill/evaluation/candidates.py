"""Which files ``distill evaluate`` compares: found, checked and named before any of them is
loaded."""

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
    """A GGUF file to be measured.

    ``run``: the run's folder that it lies in, if it does; ``heads``: what it carries.
    """

    name: str
    file: GGUFFile
    run: RunFolder | None = None
    heads: Heads | None = None

    @property
    def file_type(self) -> str:
        """The file type that the file says it has, such as Q4_K_M; empty where it says none, or
        an unknown one."""
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
        """How many tokens the model was trained to look at.

        Raises:
            UserError: the file does not say.
        """
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


def find_candidates(found: Files) -> Candidates:
    """The files of the teacher and its students, with the heads that they carry.

    Raises:
        UserError: broken heads.
    """
    students = [
        Candidate(name, file, run, heads_in(file))
        for name, file, run in zip(found.names[1:], found.students, found.runs, strict=True)
    ]
    return Candidates(Candidate(found.names[0], found.teacher), students, found.warnings)
