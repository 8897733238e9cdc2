"""Errors the command line turns into one line and an exit code."""

from __future__ import annotations


class UserError(ValueError):
    """The user's input cannot be used: what was wrong, its value, what to do. Exit code 2."""


class TrainingAborted(RuntimeError):
    """Training cannot go on (a loss or gradient is not finite).

    Exit code 1; what was saved stays.
    """


class ProofFailed(RuntimeError):
    """The exported file is not the trained model. Exit code 1; the file does not get its name."""


class GradientsDoNotFlow(RuntimeError):
    """A weight that is to be trained gets no gradient, or one that is frozen does. Exit code 1."""


class WorkersFailed(RuntimeError):
    """Workers of a capture ended and the store is not full. Exit code 1; what was saved stays."""
