"""Fixtures: a tiny GGUF teacher, a bigram teacher, the example teacher, the shared ones.

``llama_here`` runs llama.cpp in the tests' own process, for tests of whole runs.
"""

from __future__ import annotations

import gc
import io
import math
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from distill.capture.temporary_files.tokenizer_only import tokenizer_entries
from distill.cli import main
from students.gguf.metadata import ExportNames
from students.gguf.writer import write_gguf
from students.model.decoder import SO8TForCausalLM
from teachers import example_teacher
from teachers.errors import RequestRefused, SettingRefused
from teachers.gguf.file import read_gguf
from teachers.llama_cpp.library.kernels import LoadOptions
from teachers.llama_cpp.server import Server
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.llama_cpp.wire import read_frame, write_frame
from teachers.llama_cpp.worker_process import Answer as Reply
from teachers.llama_cpp.worker_process import WorkerProcess
from teachers.targets.distributions import Arrays
from tests.support.students import make_student

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What the check of llama.cpp finds is the tests' own, in this process and in those that it starts.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="distill-tests-")


def pytest_configure() -> None:
    """Hear Ctrl-C, which tests send to themselves and to what they start: a shell without job
    control has commands in the background ignore it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Leave what all tests share out of garbage collection: each one looks at millions of objects
    of imported modules otherwise."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Remove the tests' own cache folder."""
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


class LlamaHere:
    """Stands for ``WorkerProcess``: llama.cpp in the tests' own process."""

    def __init__(
        self, path: Path, way: LoadOptions, *, threads: int, hung_seconds: float = math.inf
    ) -> None:
        self.path = path
        self.process_id = os.getpid()
        self.warnings: list[str] = []
        self.server = Server(io.BytesIO())
        # llama.cpp configures AMX's tiles once a thread, and PyTorch, whose bfloat16 products only
        # here run in the same threads, releases them: its next product would be an illegal
        # instruction.
        options = replace(way, extra_buffers=False)
        load = {"path": str(path), "threads": threads, "options": asdict(options)}
        self.description = self.ask("load", load)[0]

    def ask(
        self,
        operation: str,
        arguments: dict[str, Any] | None = None,
        arrays: Arrays | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Reply:
        """See ``WorkerProcess.ask``."""
        request, answer = io.BytesIO(), io.BytesIO()
        write_frame(request, {"operation": operation, **(arguments or {})}, arrays)
        request.seek(0)
        self.server.output = answer
        with redirect_stderr(io.StringIO()) as said:
            self.server.run(request)
        answer.seek(0)
        while "progress" in (reply := read_frame(answer))[0]:
            progress(reply[0]["progress"])
        if "error" in reply[0]:
            if reply[0]["setting"]:
                raise SettingRefused(f"{self.path}: {reply[0]['error']}")
            raise RequestRefused(str(self.path), reply[0]["error"], said.getvalue())
        return reply

    def close(self) -> None:
        """Free the model and its contexts; safe to call twice."""
        if self.server.model is not None:
            for context in self.server.contexts:
                context.release()
            self.server.contexts = []
            self.server.model.close()


@pytest.fixture(scope="module")
def llama_here() -> Iterator[None]:
    """llama.cpp runs in this process in all of a module's tests: another one takes seconds."""
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr("teachers.llama_cpp.worker.WorkerProcess", LlamaHere)
        yield


@dataclass(frozen=True)
class Ended:
    """A command's exit code, standard output and standard error."""

    code: Any
    out: str
    complaint: str

    @property
    def said(self) -> str:
        """What it printed, each gap one space."""
        return " ".join(self.out.split())


def command(*words: object) -> Ended:
    """A command line in this process."""
    said, complaint = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["distill", *map(str, words)]),
        redirect_stdout(said),
        redirect_stderr(complaint),
        pytest.raises(SystemExit) as stopped,
    ):
        main()
    ended = Ended(stopped.value.code, said.getvalue(), complaint.getvalue())
    assert "Traceback" not in ended.complaint, (words, ended)
    return ended


def says(*words: object) -> str:
    """What a command that works prints, with nothing on standard error."""
    ended = command(*words)
    assert (ended.code, ended.complaint) == (0, ""), (words, ended)
    return ended.out


def refuses(*words: object) -> str:
    """Why a command exits with 2, in one line on standard error, with nothing else printed."""
    ended = command(*words)
    assert ended.code == 2 and ended.complaint.count("\n") == 1 and not ended.out, (words, ended)
    return ended.complaint


def not_refused(
    rows: Iterable[tuple[Sequence[object], Sequence[str]]], *start: object
) -> list[object]:
    """Rows of arguments with which a command does not exit with 2, saying the words of the row."""
    ended = [(command(*start, *arguments), words) for arguments, words in rows]
    said = [(one, words, " ".join(one.complaint.split())) for one, words in ended]
    return [row for row in said if row[0].code != 2 or any(word not in row[2] for word in row[1])]


@pytest.fixture(scope="session")
def tiny_student() -> SO8TForCausalLM:
    """The student that the tiny teacher is an export of."""
    return make_student(64, 2, len(read_gguf(example_teacher()).value("tokenizer.ggml.tokens")))


@pytest.fixture(scope="session")
def tiny_teacher_path(
    tmp_path_factory: pytest.TempPathFactory, tiny_student: SO8TForCausalLM
) -> Path:
    """A 64×2 GGUF model with random weights and the example teacher's tokenizer and template."""
    path = tmp_path_factory.mktemp("teacher") / "tiny.gguf"
    example = read_gguf(example_teacher())
    write_gguf(tiny_student, path, "f32", tokenizer_entries(example), ExportNames("tiny", {}))
    return path


def in_its_own_process(path: Path, options: LoadOptions | None = None) -> GGUFTeacher:
    """A teacher as users have it, also where ``llama_here`` is in force."""
    with patch("teachers.llama_cpp.worker.WorkerProcess", WorkerProcess):
        return GGUFTeacher(path, options, threads=1)


@pytest.fixture(scope="session")
def tiny_teacher(tiny_teacher_path: Path) -> Iterator[GGUFTeacher]:
    """The tiny teacher, loaded once for all tests."""
    with in_its_own_process(tiny_teacher_path) as teacher:
        yield teacher


@pytest.fixture(scope="session")
def example_gguf() -> Iterator[GGUFTeacher]:
    """The example teacher (Q8_0), loaded once for all tests."""
    with in_its_own_process(example_teacher()) as teacher:
        yield teacher
