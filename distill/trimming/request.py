"""What ``distill trim``, or a run for its student, asks of a vocabulary, checked as far as that
takes no time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distill.capture.data_rows import DataRows, read_rows
from distill.capture.teachers import teacher_sources
from distill.config.schema import RunConfig
from distill.config.sources import DataConfig
from distill.errors import UserError
from distill.trimming.file import require_plain_vocabulary
from teachers.gguf.file import GGUFFile, read_gguf
from teachers.vocabulary.reduced import VocabularyError
from teachers.vocabulary.selection import Vocabulary
from teachers.vocabulary.size import VocabularySize

TOKENS = 8192
FEWEST = 64


@dataclass(frozen=True)
class TrimRequest:
    """``tokens``: of the text that the teacher reads to choose by; half as many of held-out text
    judge the result."""

    teacher: Path
    data: Path
    output: Path
    size: VocabularySize
    tokens: int = TOKENS

    @property
    def judged_tokens(self) -> int:
        """Of held-out text, for the bits per byte."""
        return self.tokens // 2

    @property
    def card(self) -> Path:
        """The file that says what was done."""
        return self.output.with_suffix(".md")

    @property
    def modelfile(self) -> Path:
        """Ollama's."""
        return self.output.with_suffix(".Modelfile")

    @property
    def tokenizer(self) -> Path:
        """The folder of tokenizer.json."""
        return self.output.with_name(f"{self.output.stem}-tokenizer")


@dataclass(frozen=True)
class TrimInputs:
    """A request that can be followed, with the teacher's file, its vocabulary and the data."""

    request: TrimRequest
    file: GGUFFile
    vocabulary: Vocabulary
    data: DataRows


def check_trim(request: TrimRequest) -> TrimInputs:
    """Read what is needed, PyTorch apart.

    Raises:
        UserError: something is in the way of the output, or the data cannot be used.
        TeacherFileError, TokenizerConversionError, VocabularyError: the teacher cannot be trimmed,
            or not to that size.
    """
    output = request.output
    if output.suffix != ".gguf":
        raise UserError(f"--output {output} must end in .gguf")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: the folder {output.parent} does not exist")
    for path in (output, request.card, request.modelfile, request.tokenizer):
        if path.exists():
            raise UserError(f"--output {output}: {path} exists; choose another name")
    if request.tokens < FEWEST:
        raise UserError(f"--tokens {request.tokens} is too few; give {FEWEST} or more")
    file, vocabulary = _check_teacher(request.teacher, request.size)
    data = read_rows(DataConfig(path=str(request.data)))
    assert data is not None
    return TrimInputs(request, file, vocabulary, data)


def check_student_vocabulary(config: RunConfig) -> None:
    """Refuse a vocabulary that the teacher of these settings cannot be cut to.

    Raises:
        UserError: there is more than one teacher, or it is no GGUF file.
        TeacherFileError, TokenizerConversionError, VocabularyError: see ``check_trim``.
    """
    if config.student.vocab is None:
        return
    first, *others = teacher_sources(config.teacher)
    if others or not isinstance(first, Path) or first.is_dir():
        what = f"{first} is {'a folder' if isinstance(first, Path) else 'a server'}"
        raise UserError(
            f"--vocab {config.student.vocab} needs a single GGUF teacher, whose tokens are cut; "
            f"{'teacher.mix_with names others' if others else what}: leave --vocab out"
        )
    _check_teacher(first, VocabularySize.parse(config.student.vocab))


def _check_teacher(path: Path, size: VocabularySize) -> tuple[GGUFFile, Vocabulary]:
    file = read_gguf(path)
    try:
        vocabulary = Vocabulary(file.fields)
        vocabulary.require_room(size)
    except VocabularyError as error:
        raise VocabularyError(f"{file.path}: {error}") from None
    require_plain_vocabulary(file)
    return file, vocabulary
