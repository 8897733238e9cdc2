"""llama.cpp running one file on this machine: checked by a first decode, with other load options if
need be.

A build of llama.cpp can crash, or compute other numbers, on one processor and be right on another:
its kernels for AMX and for rearranged weights are chosen by the processor. So the first decode of
every file is a trial of a few tokens (``teachers.llama_cpp.first_decode``). Where it dies, hangs or
gives logits that are not finite or not those of plain kernels, the file is run without those
kernels ("extra buffers"). The result is remembered (``teachers.llama_cpp.library.check_record``).
Only when nothing works is an error raised; the example teacher decides whether it names the file or
the machine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES

from teachers import example_teacher
from teachers.errors import LibraryError, RequestRefused, TeacherError, WorkerDied
from teachers.gguf.file import GGUFFile
from teachers.gguf.split import model_bytes
from teachers.llama_cpp.first_decode import REFERENCE, Failure, compare, try_first_decode, works
from teachers.llama_cpp.library.build import unused_features
from teachers.llama_cpp.library.check_record import CheckRecord, change_record, read_record
from teachers.llama_cpp.library.kernels import LoadOptions
from teachers.llama_cpp.sizes import shape_of
from teachers.llama_cpp.wire import Arrays
from teachers.llama_cpp.worker_process import HUNG_SECONDS, Answer, WorkerProcess

# What needs llama.cpp to compute; the rest reads only the vocabulary.
COMPUTING = frozenset({"generate", "stream", "score", "states", "logits", "speed"})
# An escape where llama.cpp dies later than its check: 1 for no extra buffers
PLAIN = "DISTILL_PLAIN_KERNELS"
EXTRA_BUFFERS = "extra buffers"  # the subject of two warnings, of which a process logs one
COST = "prompts take up to 3.7 times as long where the processor has AMX"  # docs/machines.md
REMEDY = "`distill doctor` says how to build it so that they work"

_log = logging.getLogger(__name__)
already_logged: set[str] = set()  # of this process: no warning comes twice
without_extra_buffers: dict[str, str] = {}  # files that this process runs so, by name, and why


class Worker:
    """One GGUF file in llama.cpp, in a process of its own that works on this machine."""

    def __init__(
        self,
        path: Path,
        *,
        threads: int,
        options: LoadOptions | None = None,
        file: GGUFFile | None = None,
        hung_seconds: float = HUNG_SECONDS,
        anew: bool = False,
    ) -> None:
        """Start llama.cpp and load the file.

        ``file``: its header, by which the kernels of its tensor types are compared once, and
        without which no GPU can be asked for. ``hung_seconds``: see ``WorkerProcess``. ``anew``:
        check as if nothing was remembered.

        Raises:
            TeacherError: llama.cpp cannot load it, or dies on it; or it does not fit on the GPU.
            LibraryError: llama.cpp does not work on this machine.
        """
        self.path = path
        self.threads = threads
        self.hung_seconds = hung_seconds
        tensors = file.tensors.values() if file else ()
        self._types = frozenset(tensor.type.name for tensor in tensors)
        self._anew = anew
        self._known = CheckRecord() if anew else read_record()
        self._bytes = model_bytes(path)
        self._options = options or LoadOptions()
        if self._options.gpu_layers:
            assert file is not None
            self._options = replace(self._options, shape=shape_of(file))
        plain = os.environ.get(PLAIN) == "1" or (file is not None and has_rows_of_one_block(file))
        if plain or not self._known.allows_extra_buffers(self._bytes):
            self._options = replace(self._options, extra_buffers=False)
        self._checked = False
        self._failed: TeacherError | LibraryError | None = None  # once nothing works
        self._process = self._first_process()
        self._pass_on_warnings()

    @property
    def process_id(self) -> int:
        """The child's process id."""
        return self._process.process_id

    @property
    def description(self) -> dict[str, Any]:
        """What llama.cpp says of the model (``LlamaModel.describe``)."""
        return self._process.description

    def options(self) -> LoadOptions:
        """The load options with which llama.cpp runs the file on this machine, checked.

        Raises:
            TeacherError, LibraryError: see ``ask``.
        """
        if self._failed is not None:
            raise self._failed
        if not self._checked:
            failure = self._trial(self._process, self._options)
            if failure is not None:
                self._process.close()
                try:
                    self._process = self._other_process(failure)
                except (TeacherError, LibraryError) as error:
                    self._failed = error
                    raise
            self._checked = True
        return self._options

    def ask(
        self,
        operation: str,
        arguments: dict[str, Any] | None = None,
        arrays: Arrays | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Answer:
        """Send one request and wait for its answer; the first that computes makes the check.

        Raises:
            TeacherError: the request failed in the child, or the child died or hung.
            LibraryError: llama.cpp does not work on this machine.
            WorkerDefect: the child failed by a mistake of ours.
        """
        if operation in COMPUTING:
            self.options()
        elif self._failed is not None:
            raise self._failed
        try:
            return self._process.ask(operation, arguments, arrays, progress)
        except WorkerDied as died:
            if self._checked or died.from_outside or died.hung:
                raise
            self._failed = self._verdict(Failure.of(died))
            raise self._failed from None

    def close(self) -> None:
        """End the child process; safe to call twice."""
        self._process.close()

    # -- the check

    def _first_process(self) -> WorkerProcess:
        """The process that loads the file: as remembered, or without extra buffers if it dies."""
        if not self._known.allows_extra_buffers(self._bytes):
            warn_once(
                "llama.cpp runs without its extra CPU buffers, as its self-check of "
                f"{self._known.time[:10]} found: with them it {self._known.reason}. So {COST}; "
                f"{REMEDY}",
                EXTRA_BUFFERS,
            )
        if not self._options.extra_buffers:
            reason = self._known.reason or f"is told not to by {PLAIN}"
            without_extra_buffers[self.path.name] = reason
        try:
            return self._start(self._options)
        except (WorkerDied, RequestRefused) as error:
            return self._other_process(Failure.of(error))

    def _other_process(self, failure: Failure) -> WorkerProcess:
        """A tried process after ``failure`` of the first: without extra buffers, remembered.

        Raises:
            TeacherError, LibraryError: there is none.
        """
        if failure.from_outside:
            # The system, short of memory, may have ended it, whatever the library: once more.
            process = self._tried(self._options)
            if isinstance(process, WorkerProcess):
                return process
            failure = process
        if failure.refused:
            require_loadable(self.path)
        other = replace(self._options, extra_buffers=False)
        if not self._options.extra_buffers or isinstance(process := self._tried(other), Failure):
            raise self._verdict(failure)
        self._options = other
        warn_once(
            f"llama.cpp {failure.text} with its extra CPU buffers (AMX, repacked weights)"
            f"{failure.log}. It runs without them instead: right, but {COST}; {REMEDY}",
            EXTRA_BUFFERS,
        )
        without_extra_buffers[self.path.name] = failure.text
        if self._options.gpu_layers == 0 or not works(
            self.path, self.threads, replace(REFERENCE, extra_buffers=True)
        ):
            remember(lambda record: self._with_failure(record, failure))
        return process

    def _with_failure(self, record: CheckRecord, failure: Failure) -> CheckRecord:
        """The record with ``failure``; a possible want of memory concerns only files this large."""
        failed = replace(record, reason=failure.text, failed=self._types)
        if (failure.from_outside or failure.refused) and self._bytes:
            return replace(failed, from_bytes=min(record.from_bytes or self._bytes, self._bytes))
        return replace(failed, extra_buffers=False)

    def _tried(self, options: LoadOptions) -> WorkerProcess | Failure:
        """A new process whose first decode works, or why there is none."""
        try:
            process = self._start(options)
        except (WorkerDied, RequestRefused) as error:
            return Failure.of(error)
        try:
            failure = self._trial(process, options)
        except BaseException:
            process.close()
            raise
        if failure is None:
            self._checked = True
            return process
        process.close()
        return failure

    def _trial(self, process: WorkerProcess, options: LoadOptions) -> Failure | None:
        """Decode a few tokens, and compare new tensor types: why ``options`` cannot be used."""
        gpus = process.description["gpus"]
        device = f"{', '.join(gpus)}, {options.gpu_layers} layers: " if gpus else ""
        new = {device + name for name in self._types}
        if not self._anew:
            new -= read_record().verified
        compared = bool(new) and (options.extra_buffers or bool(gpus))
        logits = try_first_decode(process, long=compared)
        if isinstance(logits, Failure) or not compared:
            return logits if isinstance(logits, Failure) else None
        result = compare(logits, self._start)
        if result is None:
            warn_once(
                f"llama.cpp's results with {self.path.name} could not be compared with those of "
                "plain kernels"
            )
        elif result.agrees:
            remember(lambda record: replace(record, verified=record.verified | new))
        elif gpus:  # a graphics card rounds in its own ways, for which the bound was not measured
            warn_once(
                f"llama.cpp on {', '.join(gpus)} {result.text}; gpu_layers 0 computes on the "
                "processor"
            )
        else:
            return Failure(result.text)
        return None

    def _verdict(self, failure: Failure) -> TeacherError | LibraryError:
        """Whose fault ``failure`` is: the GPU's, the file's or the machine's."""
        what = f"llama.cpp {failure.text}"
        if failure.from_outside:
            return TeacherError(
                f"{self.path}: {what}{failure.log}: something outside ended it, twice, usually the "
                "system for want of memory. Close other programs or take a smaller file"
            )
        layers = self._options.gpu_layers
        if layers and works(self.path, self.threads, REFERENCE):
            return TeacherError(
                f"{self.path}: {what} with {layers} layers on the GPU{failure.log}; it runs the "
                "file on the processor alone. Put fewer layers on the GPU, or none (gpu_layers 0)"
            )
        if works(example_teacher(), self.threads, REFERENCE):
            reason = (
                "; it runs the example teacher on this machine, so the cause is in this file: "
                "damaged, or of a kind that this llama.cpp does not run"
            )
            end = "" if failure.refused else reason
            return TeacherError(f"{self.path}: {what}{failure.log}{end}")
        return LibraryError(
            f"llama.cpp does not work on this machine: it {failure.text}{failure.log}, and does "
            f"not run the example teacher either, so {self.path} is not to blame. `distill doctor` "
            "says what can be done"
        )

    def _start(self, options: LoadOptions) -> WorkerProcess:
        return WorkerProcess(
            self.path, options, threads=self.threads, hung_seconds=self.hung_seconds
        )

    def _pass_on_warnings(self) -> None:
        """Log what llama.cpp warned of while it loaded the file, what it was built without, and
        that it has no GPU, where one was asked for."""
        if self._options.gpu_layers > 0 and not self.description["gpus"]:
            warn_once(
                f"gpu_layers = {self._options.gpu_layers} has no effect: llama.cpp sees no GPU "
                "here, and computes on the processor. docs/gpu.md says how to build it for one"
            )
        if unused := unused_features(self.description["built_with"]):
            warn_once(
                f"llama.cpp was built without {', '.join(unused)}, which this processor has: "
                "slower than need be. `distill doctor` says how to build it"
            )
        for line in self._process.warnings:
            warn_once(f"llama.cpp, loading {self.path.name}: {line}", line)


def require_loadable(path: Path) -> None:
    """Refuse a file, within a second, that llama.cpp refuses to load whatever the options; what
    else can go wrong is for ``Worker`` to find.

    Raises:
        TeacherError: it refuses this file, and not the example teacher.
        LibraryError: llama.cpp itself cannot be loaded.
    """
    try:
        WorkerProcess(path, REFERENCE, threads=1).close()
    except WorkerDied:
        return  # a crash is no refusal: ``Worker`` finds out with which kernels, and says so
    except RequestRefused as error:
        failure = Failure.of(error)
        with suppress(RequestRefused, WorkerDied):
            WorkerProcess(example_teacher(), REFERENCE, threads=1).close()
            raise TeacherError(f"{path}: llama.cpp {failure.text}{failure.log}") from None


def why_without_extra_buffers() -> str:
    """Why a file of this process runs without extra buffers, after "llama.cpp …"; else empty."""
    return next(iter(without_extra_buffers.values()), "")


def has_rows_of_one_block(file: GGUFFile) -> bool:
    """Whether a quantized matrix has rows of a single block. llama.cpp's kernels for AMX then give
    NaN, and the check does not see it where another file's matrices of that type were right."""
    matrices = (one for one in file.tensors.values() if len(one.shape) > 1)
    return any(1 < GGML_QUANT_SIZES[one.type][0] == one.shape[-1] for one in matrices)


def remember(change: Callable[[CheckRecord], CheckRecord]) -> None:
    """Change the record; warn where it cannot be kept."""
    try:
        change_record(change)
    except OSError as error:
        warn_once(
            "what the self-check of llama.cpp found cannot be kept, so every start makes it again "
            f"({error}); set XDG_CACHE_HOME to a folder that can be written to"
        )


def warn_once(text: str, same: str = "") -> None:
    """Log a warning, unless this process has logged it, or one about the ``same``, before."""
    if (key := same or text) not in already_logged:
        already_logged.add(key)
        _log.warning("%s", text)
