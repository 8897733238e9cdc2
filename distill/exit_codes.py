"""Which errors are expected, what they exit with, and how they are said: 0 done, 2 the user's input, 1 ours."""

from __future__ import annotations

import errno

EXIT_OURS, EXIT_USER, EXIT_INTERRUPTED = 1, 2, 130

# What the operating system refuses because of something the user can change.
REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of your quota and run the same command again",
    errno.EACCES: "check the permissions or choose another folder",
    errno.EPERM: "check the permissions or choose another folder",
    errno.EROFS: "choose a folder that can be written to",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "check the path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EFBIG: "choose a file system that takes larger files",
    errno.EMFILE: "allow this process more open files",
    errno.EIO: "check the disk",
}


def exit_code(error: Exception) -> int | None:
    """The exit code of an expected error, or nothing for a defect."""
    from distill.errors import GradientsDoNotFlow, ProofFailed, TrainingAborted, UserError
    from students.export import ExportError
    from students.fold import FoldError
    from teachers.capture import CaptureError
    from teachers.chat_template import ChatTemplateError
    from teachers.ensemble import EnsembleError
    from teachers.errors import LibraryError, TeacherError
    from teachers.gguf_file import TeacherFileError
    from teachers.store import StoreError
    from teachers.tokenizer_json import TokenizerConversionError

    if isinstance(
        error,
        (
            UserError,
            StoreError,
            TeacherFileError,
            TeacherError,
            ChatTemplateError,
            CaptureError,
            EnsembleError,
            TokenizerConversionError,
        ),
    ):
        return EXIT_USER
    if isinstance(error, OSError) and error.errno in REMEDIES:
        return EXIT_USER
    if isinstance(
        error, (TrainingAborted, GradientsDoNotFlow, ProofFailed, ExportError, FoldError, LibraryError)
    ):
        return EXIT_OURS
    return None


def one_line(error: Exception) -> str:
    """An expected error in one line: what was wrong, and what to do."""
    if isinstance(error, OSError) and error.errno is not None:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}; {REMEDIES.get(error.errno, 'check the path')}"
    return " ".join(str(error).split())
