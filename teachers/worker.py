"""The process llama.cpp lives in, and the parent's handle on it.

llama.cpp may abort or crash on a damaged file; here that ends a child process, which the parent turns into
one clear error with llama.cpp's own last words. Requests and answers are frames (``teachers.wire``) over the
child's standard input and output; the child's standard error goes to a temporary log.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

from teachers.wire import Arrays, pack_ragged, read_frame, unpack_ragged, write_frame

LOG_TAIL_LINES = 3
Answer = tuple[dict[str, Any], Arrays]

# The child gets the parent's sys.path, so that a folder called `teachers` in the user's working directory
# cannot take this package's place.
_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from teachers.worker import serve; serve()"


class TeacherError(ValueError):
    """The teacher cannot be used: llama.cpp refused the file or died on it. Names the file and the cause."""


class Worker:
    """A child process that runs one GGUF file through llama.cpp."""

    def __init__(self, path: Path, *, threads: int, gpu_layers: int = 0) -> None:
        """Start the process and load the file.

        Raises:
            TeacherError: llama.cpp cannot load it.
        """
        self.path = path
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close())
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        try:
            load = {"path": str(path), "threads": threads, "gpu_layers": gpu_layers}
            self.description = self.ask("load", load)[0]
        except BaseException:
            self.close()
            raise

    def ask(
        self,
        operation: str,
        arguments: dict[str, Any] | None = None,
        arrays: Arrays | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Answer:
        """Send one request and wait for its answer; ``progress`` gets the counts reported on the way.

        Raises:
            TeacherError: the request failed in the child, or the child died.
        """
        stdin, stdout = cast(BinaryIO, self._process.stdin), cast(BinaryIO, self._process.stdout)
        try:
            write_frame(stdin, {"operation": operation, **(arguments or {})}, arrays)
            while True:
                message, answer = read_frame(stdout)
                if "progress" not in message:
                    break
                progress(message["progress"])
        except (EOFError, BrokenPipeError):
            raise TeacherError(self._obituary(operation)) from None
        if "error" in message:
            raise TeacherError(f"{self.path}: {message['error']}{self._last_words()}")
        return message, answer

    def _obituary(self, operation: str) -> str:
        code = self._process.wait()
        try:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        except ValueError:
            how = f"exit code {code}"
        return (
            f"{self.path}: llama.cpp died during {operation} ({how}){self._last_words()}; the file is probably "
            "damaged or of a kind this llama.cpp does not run"
        )

    def _last_words(self) -> str:
        """The end of the child's log, on one line, or nothing."""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - 4096))
        lines = self._log.read().decode("utf-8", errors="replace").splitlines()
        self._log.seek(0, os.SEEK_END)
        said = [line.strip() for line in lines if line.strip() and not line.startswith(("[New LWP", "#"))]
        return f"; it said: {' | '.join(said[-LOG_TAIL_LINES:])}" if said else ""

    def close(self) -> None:
        """End the child process; safe to call twice."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # the child is gone already, which is what close wants
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._log.close()


# -- inside the child ---------------------------------------------------------------------------------------


class _Server:
    """Answers requests inside the child; one method per operation."""

    def __init__(self, output: BinaryIO) -> None:
        self.output = output
        self.model: Any = None
        self.lanes: list[Any] = []
        self._done = 0
        self._reporting = threading.Lock()

    def report(self, more: int) -> None:
        """Tell the parent that ``more`` units are done; lanes call this from their own threads."""
        with self._reporting:
            self._done += more
            write_frame(self.output, {"progress": self._done})

    def divide(self, count: int, work: Callable[[Any, slice], Any]) -> list[Any]:
        """Give each lane a share of ``count`` sequences, of like size and in order; returns their results."""
        self._done = 0
        lanes = self.lanes[: max(1, min(count, len(self.lanes)))]
        edges = [count * place // len(lanes) for place in range(len(lanes) + 1)]
        spans = [slice(start, stop) for start, stop in itertools.pairwise(edges)]
        with ThreadPoolExecutor(len(lanes)) as pool:
            return list(pool.map(work, lanes, spans))

    def load(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        from teachers.llama_cpp import LlamaContext, LlamaModel

        self.model = LlamaModel(request["path"], threads=request["threads"], gpu_layers=request["gpu_layers"])
        each = max(1, self.model.threads // self.model.lanes)
        self.lanes = [LlamaContext(self.model, each) for _ in range(self.model.lanes)]
        return self.model.describe(), {}

    def tokenize(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        special = {"add_special": request["add_special"], "parse_special": request["parse_special"]}
        tokens = [self.model.tokenize(text, **special) for text in request["texts"]]
        return {}, pack_ragged(tokens, "tokens")

    def detokenize(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        texts = []
        for tokens in unpack_ragged(arrays, "tokens"):
            raw = b"".join(self.model.piece(token) for token in tokens.tolist())
            texts.append(raw.decode("utf-8", errors="replace"))
        return {"texts": texts}, {}

    def speak(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        from teachers.base import Sampling
        from teachers.speak import speak

        segments = unpack_ragged(arrays, "segments")
        requests, taken = [], 0
        for count in arrays["segment_counts"].tolist():
            requests.append(segments[taken : taken + count])
            taken += count
        sampling = Sampling(**request["sampling"])

        def work(lane: Any, span: slice) -> list[Any]:
            first = request["first_index"] + span.start
            return speak(lane, requests[span], sampling, first_index=first, progress=self.report)

        return {}, pack_ragged(list(itertools.chain(*self.divide(len(requests), work))), "tokens")

    def score(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        import numpy as np
        import torch

        from teachers.soft_targets import CompactTargets

        sequences, nodes = unpack_ragged(arrays, "tokens"), tuple(request["nodes"])

        def work(lane: Any, span: slice) -> list[Arrays]:
            torch.set_num_threads(lane.threads)  # of this lane's thread
            pieces = []
            for logits in lane.logits(sequences[span]):
                targets = CompactTargets.from_logits(torch.from_numpy(logits), request["num_topk"], nodes)
                pieces.append(targets.arrays(self.model.vocab_size))
                self.report(len(logits))
            return pieces

        pieces = list(itertools.chain(*self.divide(len(sequences), work)))
        return {}, {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def logits(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        import numpy as np

        sequences = unpack_ragged(arrays, "tokens")

        def work(lane: Any, span: slice) -> list[Any]:
            return [piece.copy() for piece in lane.logits(sequences[span], exact=request["exact"])]

        return {}, {"logits": np.concatenate(list(itertools.chain(*self.divide(len(sequences), work))))}

    def speed(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        from teachers.llama_cpp import LlamaContext

        context = LlamaContext(
            self.model, self.model.threads
        )  # all threads on one sequence, as a user runs it
        try:
            prompt, generation = context.speed(request["prompt_tokens"], request["new_tokens"])
        finally:
            context.release()
        return {"prompt": prompt, "generation": generation}, {}

    def run(self, source: BinaryIO) -> None:
        while True:
            try:
                request, arrays = read_frame(source)
            except EOFError:
                return
            try:
                operation = getattr(self, request.pop("operation"))
                answer, answer_arrays = operation(request, arrays)
            except (RuntimeError, ValueError, MemoryError, OSError) as error:
                write_frame(self.output, {"error": str(error) or type(error).__name__})
                continue
            write_frame(self.output, answer, answer_arrays)


def serve() -> None:
    """Answer requests until the parent closes the pipe. Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # llama.cpp's libraries may print to standard output; keep the protocol on a descriptor of its own.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _Server(output).run(sys.stdin.buffer)
