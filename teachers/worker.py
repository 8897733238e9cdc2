"""llama.cpp running one file, on whatever machine this is: checked on its first decode, run another way if need be.

A build of llama.cpp can crash, or compute other numbers, on one processor and be right on another: its kernels
for AMX and for rearranged weights are chosen by the processor. So the first decode of every file is a trial of a
few tokens. Where it dies or gives logits that are not finite, the file is run without those kernels ("extra
buffers"). Where it works, its results are compared once, for each library, processor and tensor type, with those
without them. What was found is remembered (``teachers.check_record``). Only when nothing works is an error
raised, and the example teacher decides whether it names the file or the machine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teachers import example_teacher
from teachers.check_record import CheckRecord, keep_record, read_record
from teachers.errors import LibraryError, TeacherError, WorkerDied
from teachers.llama_library import unused_features
from teachers.wire import Arrays
from teachers.worker_process import HUNG_SECONDS, Answer, Way, WorkerProcess

# What needs llama.cpp to compute; the rest only looks at the vocabulary.
COMPUTING = frozenset({"speak", "stream", "score", "states", "logits", "speed"})
CHECK_TOKENS = 33  # two tiles of AMX and a rest
KNOWN_TOKENS = (
    2  # of a library that was compared already; a single token would take other kernels than many do
)
# Two ways may differ by rounding. How much that is depends on the model, so it is measured: as the mean KL between two
# kinds of cache in the same way. Extra buffers are up to 0.9 times as far off, kernels that skip a few rows at least
# 50 times (docs/benchmarks.md).
LEAST_ALLOWED_KL = 0.01
ALLOWED_NOISE = 5.0
REFERENCE = Way(gpu_layers=0, extra_buffers=False, mapped=True)
EXTRA_BUFFERS = "extra buffers"  # what two lines are about, of which a process says one
REMEDY = "`distill doctor` says how to build it so that they work"

_log = logging.getLogger(__name__)
already_logged: set[str] = set()  # of this process: no line is said twice

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Failure:
    """Why a way of running a file cannot be used: ``text`` goes on from "llama.cpp …"; ``log``: its last lines."""

    text: str
    log: str = ""
    from_outside: bool = False

    @classmethod
    def of(cls, died: WorkerDied) -> Failure:
        """The failure that a process ended."""
        operation = died.operation.replace("_", " ")
        return cls(f"died during {operation} ({died.ending})", died.log, died.from_outside)


class Worker:
    """One GGUF file in llama.cpp, in a process of its own that works on this machine."""

    def __init__(
        self,
        path: Path,
        *,
        threads: int,
        gpu_layers: int = 0,
        types: Collection[str] = (),
        hung_seconds: float = HUNG_SECONDS,
    ) -> None:
        """Start llama.cpp and load the file.

        ``types``: names of the file's tensor types, whose kernels are compared once. ``hung_seconds``: see
        ``WorkerProcess``.

        Raises:
            TeacherError: llama.cpp cannot load it, or dies on it.
            LibraryError: llama.cpp does not work on this machine.
        """
        self.path = path
        self.threads = threads
        self.hung_seconds = hung_seconds
        self._types = frozenset(types)
        self._checked = False
        record = read_record()
        self._way = Way(gpu_layers, extra_buffers=record.extra_buffers)
        if not record.extra_buffers:
            say_once(
                f"llama.cpp runs without its extra CPU buffers, as its self-check of {record.time[:10]} found: "
                f"with them it {record.reason}. That is slower; {REMEDY}",
                EXTRA_BUFFERS,
            )
        try:
            self._process = self._start(self._way)
        except WorkerDied as died:
            self._process = self._other_process(Failure.of(died))
        if unused := unused_features(self.description["built_with"]):
            say_once(
                f"llama.cpp was built without {', '.join(unused)}, which this processor has: slower than need be. "
                "`distill doctor` says how to build it"
            )
        for line in self._process.warnings:
            say_once(f"llama.cpp, loading {path.name}: {line}", line)

    @property
    def process_id(self) -> int:
        """The child's process id."""
        return self._process.process_id

    @property
    def description(self) -> dict[str, Any]:
        """What llama.cpp says of the model (``LlamaModel.describe``)."""
        return self._process.description

    def way(self) -> Way:
        """How llama.cpp runs the file on this machine, checked.

        Raises:
            TeacherError, LibraryError: see ``ask``.
        """
        if not self._checked:
            self._check()
        return self._way

    def ask(
        self,
        operation: str,
        arguments: dict[str, Any] | None = None,
        arrays: Arrays | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Answer:
        """Send one request and wait for its answer; before the first that computes, the check is made.

        Raises:
            TeacherError: the request failed in the child, or the child died or hung.
            LibraryError: llama.cpp does not work on this machine.
            WorkerDefect: the child failed by a mistake of ours.
        """
        if operation in COMPUTING:
            self.way()
        try:
            return self._process.ask(operation, arguments, arrays, progress)
        except WorkerDied as died:
            if self._checked or died.from_outside:
                raise
            raise self._verdict(Failure.of(died)) from None

    def close(self) -> None:
        """End the child process; safe to call twice."""
        self._process.close()

    # -- the check ------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """See that the first decode works as the file is run now, or run it without extra buffers.

        Raises:
            TeacherError, LibraryError: nothing works.
        """
        failure = self._trial(self._process, self._way)
        if failure is not None:
            self._process.close()
            self._process = self._other_process(failure)
        self._checked = True

    def _other_process(self, failure: Failure) -> WorkerProcess:
        """A process that was tried, after ``failure`` of the first: without extra buffers, remembered from now on."""
        if failure.from_outside:
            # The system, short of memory, may have ended it, which says nothing of the library: once more.
            process = self._tried(self._way)
            if isinstance(process, WorkerProcess):
                return process
            failure = process
        way = replace(self._way, extra_buffers=False)
        if not self._way.extra_buffers or isinstance(process := self._tried(way), Failure):
            raise self._verdict(failure)
        self._way = way
        say_once(
            f"llama.cpp {failure.text} with its extra CPU buffers (AMX, repacked weights){failure.log}. It runs "
            f"without them instead: right, but slower, up to three times where the processor has AMX; {REMEDY}",
            EXTRA_BUFFERS,
        )
        remember(replace(read_record(), extra_buffers=False, reason=failure.text))
        return process

    def _tried(self, way: Way) -> WorkerProcess | Failure:
        """A new process whose first decode works, or why there is none."""
        try:
            process = self._start(way)
        except WorkerDied as died:
            return Failure.of(died)
        failure = self._trial(process, way)
        if failure is None:
            self._checked = True
            return process
        process.close()
        return failure

    def _trial(self, process: WorkerProcess, way: Way) -> Failure | None:
        """Decode a few tokens; says why ``way`` cannot be used, or nothing. New tensor types are compared."""
        on_gpu = way.gpu_layers != 0 and bool(process.description["gpu"])
        types = {f"gpu:{name}" if on_gpu else name for name in self._types}
        new = types - read_record().verified
        compared = bool(new) and (way.extra_buffers or on_gpu)
        try:
            logits = first_logits(process, CHECK_TOKENS if compared else KNOWN_TOKENS)
        except WorkerDied as died:
            return Failure.of(died)
        if not usable(logits):
            return Failure("computes logits that are not finite")
        if compared and (reference := self._reference_logits()) is not None:
            kl, allowed = mean_kl(reference[0], logits), allowed_kl(*reference)
            if not kl <= allowed:
                return Failure(
                    f"computes other numbers (mean KL {kl:.2g} nats, by rounding at most {allowed:.2g})"
                )
            record = read_record()
            remember(replace(record, verified=record.verified | new))
        return None

    def _reference_logits(self) -> tuple[Logits, Logits] | None:
        """The first logits from plain kernels on the processor, with both kinds of cache; nothing where they fail.

        Where they fail there is nothing to compare with, and nothing is remembered as compared.
        """
        try:
            process = self._start(REFERENCE)
        except TeacherError as error:
            _log.info("no reference for the self-check: %s", error)
            return None
        try:
            logits = (first_logits(process, CHECK_TOKENS), first_logits(process, CHECK_TOKENS, exact=True))
        except TeacherError as error:
            _log.info("no reference for the self-check: %s", error)
            return None
        finally:
            process.close()
        return logits if all(usable(rows) for rows in logits) else None

    def _verdict(self, failure: Failure) -> Exception:
        """Whose fault ``failure`` is: the GPU's, the file's or the machine's."""
        if failure.from_outside:
            return TeacherError(
                f"{self.path}: llama.cpp {failure.text}{failure.log}: something outside ended it, twice, usually the "
                "system for want of memory. Close other programs or take a smaller file"
            )
        gpu_layers = self._way.gpu_layers
        if gpu_layers != 0 and runs(self.path, self.threads):
            return TeacherError(
                f"{self.path}: llama.cpp {failure.text} with {gpu_layers} layers on the GPU{failure.log}; it runs "
                "the file on the processor alone. Put fewer layers on the GPU, or none (gpu_layers 0)"
            )
        if runs(example_teacher(), self.threads):
            return TeacherError(
                f"{self.path}: llama.cpp {failure.text}{failure.log}; it runs the example teacher on this machine, so "
                "the cause is in this file: damaged, or of a kind that this llama.cpp does not run"
            )
        return LibraryError(
            f"llama.cpp does not work on this machine: it {failure.text}{failure.log}, and does not run the example "
            f"teacher either, so {self.path} is not to blame. `distill doctor` says what can be done"
        )

    def _start(self, way: Way) -> WorkerProcess:
        return WorkerProcess(self.path, way, threads=self.threads, hung_seconds=self.hung_seconds)


def runs(path: Path, threads: int) -> bool:
    """Whether llama.cpp decodes the file at ``path`` with plain kernels on the processor."""
    try:
        process = WorkerProcess(path, REFERENCE, threads=threads)
    except (TeacherError, LibraryError):
        return False
    try:
        return usable(first_logits(process, KNOWN_TOKENS))
    except TeacherError:
        return False
    finally:
        process.close()


def first_logits(process: WorkerProcess, count: int, *, exact: bool = False) -> Logits:
    """The logits ``[count, V]`` of a first decode.

    Raises:
        TeacherError: the process died, or llama.cpp refuses.
    """
    logits = process.ask("first_decode", {"tokens": count, "exact": exact})[1]["logits"]
    return logits.astype(np.float32, copy=False)


def usable(logits: Logits) -> bool:
    """Whether every row ``[N, V]`` is a distribution: no NaN, no +∞, not −∞ alone (excluded tokens may be −∞)."""
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
    """How far results may be apart by rounding alone; the two are one way's, with a float16 and a float32 cache."""
    return max(LEAST_ALLOWED_KL, ALLOWED_NOISE * mean_kl(plain, exact))


def remember(record: CheckRecord) -> None:
    """Keep ``record``, and say so in a line where there is no place for it."""
    try:
        keep_record(record)
    except OSError as error:
        say_once(
            f"what the self-check of llama.cpp found cannot be kept, so every start makes it again ({error}); set "
            "XDG_CACHE_HOME to a folder that can be written to"
        )


def say_once(text: str, same: str = "") -> None:
    """Log a warning, unless this process has logged it, or one about the ``same``, before."""
    if (key := same or text) not in already_logged:
        already_logged.add(key)
        _log.warning("%s", text)
