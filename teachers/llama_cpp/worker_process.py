"""One process that llama.cpp lives in, and the parent's handle on it.

llama.cpp may abort or crash on a damaged file; here that ends a child process, which becomes one
clear error with the last lines of its log. Requests and answers are frames
(``teachers.llama_cpp.wire``) over the child's standard input and output; its standard error goes to
a temporary log.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, cast

import psutil

from teachers.errors import (
    LibraryError,
    RequestRefused,
    SettingRefused,
    WorkerDefect,
    WorkerDied,
    ending,
)
from teachers.llama_cpp.library.kernels import LoadOptions
from teachers.llama_cpp.wire import Arrays, read_frame, write_frame

LOG_TAIL_LINES = 3
LOG_BYTES = 64 << 10  # of the log's end that are looked at
# Else a debugger's output follows, and buries, llama.cpp's reason to abort on standard error.
_QUIET_ABORT = {"GGML_NO_BACKTRACE": "1"}
# Signals that a library does not send to itself: a user, or the system when memory runs out.
_FROM_OUTSIDE = {
    int(getattr(signal, name, 0)) for name in ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT")
} - {0}
# A worker that is silent for so long is given up: hung if it computes nothing either, else lost.
HUNG_SECONDS = 120.0
LOST_SECONDS = 1800.0
Answer = tuple[dict[str, Any], Arrays]

# With the parent's sys.path: no folder `teachers` in the working directory can shadow this package.
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from teachers.llama_cpp.server "
    "import serve; serve()"
)


class WorkerProcess:
    """A child process that runs one GGUF file through llama.cpp."""

    def __init__(
        self, path: Path, options: LoadOptions, *, threads: int, hung_seconds: float = HUNG_SECONDS
    ) -> None:
        """Start the process and load the file.

        ``hung_seconds``: silent and idle for so long, the worker is given up.

        Raises:
            TeacherError: llama.cpp cannot load it.
            LibraryError: llama.cpp itself cannot be loaded.
        """
        self.path = path
        self.hung_seconds = hung_seconds
        self.given_up = ""
        self._sign = time.monotonic()
        self._busy = False
        self._closed = threading.Event()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close())
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | _QUIET_ABORT,
        )
        threading.Thread(target=self._watch, daemon=True).start()
        try:
            load = {"path": str(path), "threads": threads, "options": asdict(options)}
            self.description = self.ask("load", load)[0]
            self.warnings = self._log_lines()
        except BaseException:
            self.close()
            raise

    @property
    def process_id(self) -> int:
        """The child's process id."""
        return self._process.pid

    def ask(
        self,
        operation: str,
        arguments: dict[str, Any] | None = None,
        arrays: Arrays | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Answer:
        """Send one request and wait for its answer; ``progress`` gets reported counts.

        Raises:
            TeacherError: the request failed in the child, or the child died or hung.
            LibraryError: llama.cpp itself cannot be loaded.
            WorkerDefect: the child failed by a mistake of ours.
        """
        stdin, stdout = cast(BinaryIO, self._process.stdin), cast(BinaryIO, self._process.stdout)
        self._sign, self._busy = time.monotonic(), True
        try:
            write_frame(stdin, {"operation": operation, **(arguments or {})}, arrays)
            while True:
                message, answer = read_frame(stdout)
                self._sign = time.monotonic()
                if "progress" not in message:
                    break
                progress(message["progress"])
        except (EOFError, BrokenPipeError):
            raise self._obituary(operation) from None
        finally:
            self._busy = False
        if "library" in message:
            other, remedy = os.environ.get("LLAMA_CPP_LIB_PATH"), "install llama-cpp-python again"
            if other:
                remedy = f"unset LLAMA_CPP_LIB_PATH, which is {other}"
            raise LibraryError(
                f"llama.cpp cannot be loaded ({message['library']}); {remedy}. `distill doctor` "
                "says how"
            )
        if "error" in message:
            if message["setting"]:
                raise SettingRefused(f"{self.path}: {message['error']}")
            raise RequestRefused(str(self.path), message["error"], self._last_words())
        return message, answer

    def _watch(self) -> None:
        """Kill a worker that gives no sign of life, which ends the wait for it."""
        process = psutil.Process(self._process.pid)
        computed, since = 0.0, time.monotonic()
        while not self._closed.wait(min(5.0, self.hung_seconds / 4)):
            try:
                times = process.cpu_times()
            except psutil.Error:
                return  # it has ended, which the waiting side sees by itself
            now = time.monotonic()
            if not self._busy or times.user + times.system > computed + 0.01:
                computed, since = times.user + times.system, now
            silent = now - self._sign
            hung = silent > self.hung_seconds and now - since > self.hung_seconds
            if self._busy and (hung or silent > LOST_SECONDS):
                self.given_up = f"gave no sign of life for {silent:.0f} s and was stopped"
                self._process.kill()
                return

    def _obituary(self, operation: str) -> Exception:
        """What to raise about a child that has ended while it was asked for something."""
        code = self._process.wait()
        if code == 1 and "Traceback" in self._log_tail():
            text = f"the llama.cpp worker failed during {operation}:\n{self._log_tail()}"
            return WorkerDefect(text)
        hung, operation = bool(self.given_up), operation.replace("_", " ")
        what = f"died during {operation} ({ending(code)})"
        if hung:
            what = f"{self.given_up} during {operation}"
        outside = -code in _FROM_OUTSIDE and not hung
        return WorkerDied(str(self.path), what, self._last_words(), from_outside=outside, hung=hung)

    def _log_tail(self) -> str:
        """The end of the child's log."""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - LOG_BYTES))
        text = self._log.read().decode("utf-8", errors="replace")
        self._log.seek(0, os.SEEK_END)
        return text

    def _log_lines(self) -> list[str]:
        """The end of the child's log, without blank lines."""
        lines = [line.strip() for line in self._log_tail().splitlines() if line.strip()]
        # llama.cpp names its source files as they lay where it was built.
        source = re.compile(r"/\S+/([\w.-]+\.(?:c|cc|cpp|cu|h|hpp|m):\d)")
        return [source.sub(r"\1", line) for line in lines]

    def _last_words(self) -> str:
        """The end of the child's log, on one line, or nothing."""
        lines = self._log_lines()[-LOG_TAIL_LINES:]
        return f"; it said: {' | '.join(lines)}" if lines else ""

    def close(self) -> None:
        """End the child process; safe to call twice."""
        self._closed.set()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                with suppress(BrokenPipeError):  # the child is gone already
                    pipe.close()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._log.close()
