"""What can go wrong while llama.cpp runs a file. Which of them the caller sees decides whose fault it is."""

from __future__ import annotations

import signal


class TeacherError(ValueError):
    """The file cannot be used: llama.cpp refuses it or dies on it. Names the file and the cause."""


class RequestRefused(TeacherError):
    """llama.cpp answered a request with an error and lives on."""


class WorkerDied(TeacherError):
    """The process that runs llama.cpp ended while it was asked for something.

    Attributes:
        operation: what it was asked for.
        ending: how it ended, in words ("signal SIGSEGV").
        log: its last lines on one line, or nothing.
        from_outside: another process ended it (the system for want of memory, a user).
    """

    def __init__(
        self, path: str, operation: str, ending: str, log: str = "", from_outside: bool = False
    ) -> None:
        self.path, self.operation, self.ending, self.log = path, operation, ending, log
        self.from_outside = from_outside
        memory = "; the system may have run out of memory" if from_outside else ""
        super().__init__(
            f"{path}: llama.cpp died during {operation} ({ending}){log}{memory}; what was captured is kept, "
            "run the same command again to continue. `distill doctor` checks this machine"
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
