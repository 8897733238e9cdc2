"""What can go wrong while llama.cpp runs a file; the class says whose fault it is."""

from __future__ import annotations

import signal


class TeacherError(ValueError):
    """The file cannot be used: llama.cpp refuses it or dies on it. Names the file and the cause."""


class RequestRefused(TeacherError):
    """A teacher that lives on answered with the error ``message``; ``log``: its last lines."""

    def __init__(self, path: str, message: str, log: str = "") -> None:
        self.message, self.log = message, log
        super().__init__(f"{path}: {message}{log}")


class SettingRefused(TeacherError):
    """A setting that this machine or this model cannot follow: no other way to run the file is
    tried."""


class WorkerDied(TeacherError):
    """The process that runs llama.cpp ended, or hung and was stopped, during a request.

    Attributes:
        what: what happened, going on from "llama.cpp …" ("died during score (signal SIGSEGV)").
        log: its last lines on one line, or nothing.
        from_outside: another process ended it (the system for want of memory, a user).
        hung: it was stopped, having given no sign of life.
    """

    def __init__(
        self, path: str, what: str, log: str = "", *, from_outside: bool = False, hung: bool = False
    ) -> None:
        self.what, self.log, self.from_outside, self.hung = what, log, from_outside, hung
        memory = "; the system may have run out of memory" if from_outside else ""
        super().__init__(
            f"{path}: llama.cpp {what}{log}{memory}. Nothing saved is lost: run the same command "
            "again; if it comes to the same, try DISTILL_PLAIN_KERNELS=1 in the environment, and "
            "`distill doctor`"
        )


class LibraryError(RuntimeError):
    """llama.cpp does not work on this machine, whatever the file. Exit code 1."""


class WorkerDefect(RuntimeError):
    """The worker failed by a mistake of this package's own; carries the child's traceback."""


def ending(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
