"""Which files ``distill evaluate`` compares, checked and named without PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.errors import UserError
from distill.runs.folder import RunFolder
from teachers import example_teacher
from teachers.gguf.file import GGUFFile, file_sha256, read_gguf, tokenizer_fields, tokenizer_sha256

TEACHER_SHA256 = "so8t.teacher_sha256"


@dataclass(frozen=True)
class Files:
    """The teacher's file and its students'; ``names``: of all, the teacher's first.

    ``runs``: the run's folder that each student is in, if any.
    """

    teacher: GGUFFile
    students: list[GGUFFile]
    runs: list[RunFolder | None]
    names: list[str]
    warnings: list[str]


def find_files(students: Sequence[Path], teacher: Path | None) -> Files:
    """Find and check the files: ``students`` are GGUF files or run folders, ``teacher`` a GGUF file
    (none: the example teacher, if every student names it).

    Raises:
        UserError: no student, a file twice, another vocabulary, a teacher that must be named.
        TeacherFileError: missing, damaged, or not a GGUF file.
    """
    if not students:
        raise UserError("no student is given; name its GGUF file or its run's folder")
    paths, runs = zip(*map(_find, students), strict=True)
    _require_different(paths)
    files = [read_gguf(path) for path in paths]
    teacher = teacher or _known_teacher(files)
    if teacher.is_dir():
        raise UserError(f"--teacher {teacher} is a folder; evaluate needs the teacher's GGUF file")
    reference = read_gguf(teacher)
    _require_different([teacher, *paths])
    names = unique_names([file.path for file in (reference, *files)])
    warnings = _other_teachers(reference, files, names[1:])
    for file, name in zip(files, names[1:], strict=True):
        warnings += _compare_vocabularies(reference, file, name)
    return Files(reference, files, list(runs), names, warnings)


def _find(path: Path) -> tuple[Path, RunFolder | None]:
    """A student's file, and the run's folder that it lies in."""
    if not path.is_dir():
        folder = RunFolder(path.parent)
        return path, folder if _is_run(folder) else None
    folder = RunFolder(path)
    if not _is_run(folder):
        raise UserError(f"{path} is a folder but not a run's; give a run's folder or a GGUF file")
    if not folder.gguf.exists():
        raise UserError(
            f"{path} has no {folder.gguf.name} yet; let its command finish first, or name a file"
        )
    return folder.gguf, folder


def _is_run(folder: RunFolder) -> bool:
    return folder.config_file.exists() and folder.identity_file.exists()


def _known_teacher(students: Sequence[GGUFFile]) -> Path:
    """The example teacher, if every student says that it was made of it."""
    example = example_teacher()
    ours = file_sha256(example)
    for file in students:
        digest = file.value(TEACHER_SHA256)
        if digest != ours:
            named = isinstance(digest, str)
            whose = f"{TEACHER_SHA256} is {digest[:12]}…" if named else "it names none"
            raise UserError(
                f"{file.path} was not made of the example teacher ({whose}); name its teacher with "
                "--teacher FILE.gguf"
            )
    return example


def _require_different(paths: Sequence[Path]) -> None:
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise UserError(
                f"{path} is given twice; name every file once, the teacher with --teacher"
            )
        seen.add(path.resolve())


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Each file's name, with as many of its folders as make it unique."""
    parts = [path.resolve().parts for path in paths]
    names = []
    for own in parts:
        others = [other for other in parts if other is not own]
        length = 1
        while any(other[-length:] == own[-length:] for other in others):
            length += 1
        names.append(Path(*own[-length:]).as_posix())
    return names


def _other_teachers(
    teacher: GGUFFile, students: Sequence[GGUFFile], names: Sequence[str]
) -> list[str]:
    """A warning for every student that names another teacher than this one."""
    digests = [file.value(TEACHER_SHA256) for file in students]
    if all(digest is None for digest in digests):
        return []  # a large teacher takes minutes to hash
    ours = teacher.sha256
    return [
        f"{name} was made of another teacher (SHA-256 {str(digest)[:12]}…) than {teacher.path} "
        f"({ours[:12]}…)"
        for name, digest in zip(names, digests, strict=True)
        if digest is not None and digest != ours
    ]


def _compare_vocabularies(teacher: GGUFFile, student: GGUFFile, name: str) -> list[str]:
    """Warnings about other tokenizer differences; raises ``UserError`` if token ids differ."""
    if tokenizer_sha256(teacher) == tokenizer_sha256(student):
        return []
    ours, theirs = teacher.value("tokenizer.ggml.tokens"), student.value("tokenizer.ggml.tokens")
    if ours != theirs:
        pairs = zip(ours, theirs, strict=False)
        first = next(
            (index for index, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs))
        )
        remedy = "give a student of this teacher"
        if set(theirs) < set(ours):
            remedy = (
                "it has a part of the teacher's tokens: name the teacher's file with that "
                "vocabulary, which lies beside the run's store, with --teacher"
            )
        raise UserError(
            f"{student.path} has another vocabulary than the teacher {teacher.path}: {len(theirs)} "
            f"tokens against {len(ours)}, the first difference at token {first}; {remedy}"
        )
    ours, theirs = (
        {key: field.value for key, field in tokenizer_fields(file).items()}
        for file in (teacher, student)
    )
    keys = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
    return [
        f"{name} has the teacher's tokens, but differs in {', '.join(keys)}; the text is read as "
        "the teacher does"
    ]
