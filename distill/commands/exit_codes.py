"""Which errors are expected, their exit codes, and their messages: 0 done, 2 the user's input,
1 ours."""

from __future__ import annotations

import errno

EXIT_OURS, EXIT_USER = 1, 2

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


# By name, as to import all of these modules takes seconds. An error whose module was never imported
# has not been raised.
EXIT_CODES = {
    "distill.errors.UserError": EXIT_USER,
    "teachers.store.capture.CaptureError": EXIT_USER,
    "teachers.tokenizer.chat_template.ChatTemplateError": EXIT_USER,
    "teachers.ensemble.EnsembleError": EXIT_USER,
    "teachers.atomic_files.StoreError": EXIT_USER,
    "teachers.gguf.file.TeacherFileError": EXIT_USER,
    "teachers.tokenizer.gguf_metadata.TokenizerConversionError": EXIT_USER,
    "teachers.errors.TeacherError": EXIT_USER,
    "teachers.vocabulary.reduced.VocabularyError": EXIT_USER,
    "distill.errors.GradientsDoNotFlow": EXIT_OURS,
    "distill.errors.ProofFailed": EXIT_OURS,
    "distill.errors.TrainingAborted": EXIT_OURS,
    "distill.errors.WorkersFailed": EXIT_OURS,
    "students.gguf.metadata.ExportError": EXIT_OURS,
    "students.model.fold.FoldError": EXIT_OURS,
    "teachers.errors.LibraryError": EXIT_OURS,
    "teachers.errors.WorkerDied": EXIT_OURS,  # of a file that had worked: no fault of the user's
}


def exit_code(error: Exception) -> int | None:
    """The exit code of an expected error, or of one that derives from it; nothing for a defect."""
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__)
    codes = [EXIT_CODES[name] for name in names if name in EXIT_CODES]
    if codes:
        return codes[0]
    return EXIT_USER if isinstance(error, OSError) and error.errno in REMEDIES else None


def one_line(error: Exception) -> str:
    """An expected error in one line: what was wrong, and what to do."""
    if isinstance(error, OSError) and error.errno is not None:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}; {REMEDIES.get(error.errno, 'check the path')}"
    return " ".join(str(error).split())
