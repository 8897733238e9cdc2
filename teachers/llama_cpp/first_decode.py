"""A first decode of a few tokens: does it work with some load options, and as plain kernels do?

Letters: N tokens, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from teachers.errors import LibraryError, RequestRefused, TeacherError, WorkerDied
from teachers.llama_cpp.library.kernels import LoadOptions
from teachers.llama_cpp.worker_process import WorkerProcess

# Tokens: two tiles of AMX and a rest; more than one, which would take other kernels than many do.
LONG, SHORT = 33, 2
# Load options may differ by rounding. How much that is depends on the model, so it is measured: the
# mean KL between two kinds of cache with the same options. Extra buffers are up to 0.9 times as far
# off, kernels that skip a few rows at least 50 times (docs/benchmarks.md).
LEAST_ALLOWED_KL = 0.01
ALLOWED_NOISE = 5.0
REFERENCE = LoadOptions(extra_buffers=False, mapped=True)

_log = logging.getLogger(__name__)

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Failure:
    """Why load options cannot be used: ``text``, after "llama.cpp …"; ``log``: its last lines."""

    text: str
    log: str = ""
    from_outside: bool = False
    refused: bool = False

    @classmethod
    def of(cls, error: WorkerDied | RequestRefused) -> Failure:
        """The failure that a process ended, or that llama.cpp answered with an error."""
        if isinstance(error, RequestRefused):
            return cls(f"refuses it ({error.message})", error.log, refused=True)
        return cls(error.what, error.log, error.from_outside)


@dataclass(frozen=True)
class Comparison:
    """Mean KL in nats of logits from those of plain kernels, and what rounding may make of it."""

    kl: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether rounding explains the difference."""
        return self.kl <= self.allowed

    @property
    def text(self) -> str:
        """The difference, after "llama.cpp …"."""
        return (
            f"computes other numbers (mean KL {self.kl:.2g} nats, by rounding at most "
            f"{self.allowed:.2g})"
        )


def try_first_decode(process: WorkerProcess, *, long: bool) -> Logits | Failure:
    """The logits ``[N, V]`` of a first decode, or why they cannot be used."""
    try:
        logits = first_logits(process, LONG if long else SHORT)
    except (WorkerDied, RequestRefused) as error:
        return Failure.of(error)
    return logits if usable(logits) else Failure("computes logits that are not finite")


def compare(logits: Logits, start: Callable[[LoadOptions], WorkerProcess]) -> Comparison | None:
    """``logits`` of a long first decode against plain kernels on the processor; nothing where those
    fail.

    ``start`` gives a process with some options. The reference maps the file, so that it takes none
    of the memory that the other process has its weights in.
    """
    try:
        with closing(start(REFERENCE)) as process:
            plain = first_logits(process, len(logits))
            exact = first_logits(process, len(logits), exact=True)
    except (TeacherError, LibraryError) as error:
        _log.info("no reference for the first decode: %s", error)
        return None
    if not (usable(plain) and usable(exact)):
        return None
    return Comparison(mean_kl(plain, logits), allowed_kl(plain, exact))


def works(path: Path, threads: int, options: LoadOptions) -> bool:
    """Whether llama.cpp's first decode of the file at ``path`` works with these options."""
    try:
        with closing(WorkerProcess(path, options, threads=threads)) as process:
            return not isinstance(try_first_decode(process, long=False), Failure)
    except (TeacherError, LibraryError):
        return False


def first_logits(process: WorkerProcess, count: int, *, exact: bool = False) -> Logits:
    """The logits ``[N, V]`` of a first decode of ``count`` tokens, or as many as the context holds.

    Raises:
        TeacherError: the process died, or llama.cpp refuses.
    """
    logits = process.ask("first_decode", {"tokens": count, "exact": exact})[1]["logits"]
    return logits.astype(np.float32, copy=False)


def usable(logits: Logits) -> bool:
    """Whether every row ``[N, V]`` is a distribution: no NaN or +∞, not −∞ alone."""
    return not np.isnan(logits).any() and bool(np.isfinite(logits.max(axis=1)).all())


def mean_kl(reference: Logits, other: Logits) -> float:
    """Mean over rows ``[N, V]`` of KL(reference‖other), in nats, computed in float64 row by row."""
    return float(np.mean([_kl(*pair) for pair in zip(reference, other, strict=True)]))


def _kl(reference: Logits, other: Logits) -> float:
    p, q = (_log_softmax(row) for row in (reference, other))
    likely = np.isfinite(p)
    return float((np.exp(p[likely]) * (p[likely] - q[likely])).sum())


def _log_softmax(row: Logits) -> NDArray[np.float64]:
    shifted = row.astype(np.float64) - row.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def allowed_kl(plain: Logits, exact: Logits) -> float:
    """The KL that rounding explains, from logits with a float16 and with a float32 cache."""
    return max(LEAST_ALLOWED_KL, ALLOWED_NOISE * mean_kl(plain, exact))
