"""The check of llama.cpp: what dies or computes nonsense is run another way, and it is said."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from distill.capture.store_setup import recipe_for
from distill.commands.exit_codes import exit_code
from distill.config.schema import TargetsConfig
from distill.runtime.environment import llama_cpp_environment
from distill.runtime.progress import Console
from teachers import example_teacher
from teachers.errors import LibraryError, TeacherError, WorkerDied
from teachers.gguf.file import read_gguf
from teachers.llama_cpp.library import check_record
from teachers.llama_cpp.library.check_record import CheckRecord, read_record
from teachers.llama_cpp.library.kernels import LoadOptions
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.llama_cpp.worker import Worker, has_rows_of_one_block
from tests.support.children.capture_child import Source
from tests.support.llama.double import Fault, llama_cpp_with
from tools.models.random_teacher import Shape, write

pytestmark = [
    pytest.mark.needs_gguf,
    pytest.mark.skipif(os.name != "posix", reason="the double dies of signals"),
]
SEQUENCE = np.arange(5, 25, dtype=np.int32)
Opened = Callable[..., AbstractContextManager[GGUFTeacher]]


@pytest.fixture
def opened(tiny_teacher_path: Path, tmp_path: Path) -> Opened:
    """Opens the tiny teacher in a llama.cpp with a fault, made in ``tmp_path / folder``."""

    @contextmanager
    def open_with(
        fault: Fault, folder: str = "double", gpu_layers: int = 0
    ) -> Iterator[GGUFTeacher]:
        with (
            llama_cpp_with(fault, tmp_path / folder),
            GGUFTeacher(tiny_teacher_path, LoadOptions(gpu_layers), threads=1) as teacher,
        ):
            yield teacher

    return open_with


@pytest.fixture
def right(tiny_teacher: GGUFTeacher) -> np.ndarray:
    """What a llama.cpp in order computes."""
    return tiny_teacher.logits([SEQUENCE], exact=True)


def notes_in(folder: Path) -> list[dict[str, Any]]:
    """What the double noted of its models and contexts."""
    return [json.loads(line) for line in (folder / "notes").read_text().splitlines()]


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGILL, signal.SIGABRT, signal.SIGKILL])
def test_a_death_at_the_first_decode_is_survived_and_remembered(
    number: signal.Signals,
    tiny_teacher_path: Path,
    right: np.ndarray,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever the signal: it runs without extra buffers, a line says so, the next start knows."""
    with llama_cpp_with(Fault(die_at=1, signal=number), tmp_path / "double") as deaths:
        with caplog.at_level(logging.WARNING), GGUFTeacher(tiny_teacher_path, threads=1) as teacher:
            found = teacher.logits([SEQUENCE], exact=True)
            assert not teacher.worker.options().extra_buffers
        how, record = llama_cpp_environment(), read_record()
        assert not how["extra_buffers"] and number.name in how["reason"]
        [line] = [record.getMessage() for record in caplog.records]
        assert number.name in line and "GGML_ASSERT(double)" in line and "doctor" in line
        paid = len(deaths.read_text())
        assert paid == (2 if number == signal.SIGKILL else 1)  # from outside: tried again
        assert number.name in record.reason and record.failed == {"F32"}
        size = tiny_teacher_path.stat().st_size
        assert not record.allows_extra_buffers(size) and not record.allows_extra_buffers(2 * size)
        # Want of memory says nothing of smaller files.
        assert record.allows_extra_buffers(size - 1) == (number == signal.SIGKILL)
        check_record.of_this_process.clear()  # as another process would find it
        assert read_record() == record
        with GGUFTeacher(tiny_teacher_path, threads=1) as teacher:
            assert np.array_equal(teacher.logits([SEQUENCE], exact=True), found)
        assert len(deaths.read_text()) == paid
    assert np.abs(right - found).max() < 1e-4


def test_a_death_while_loading_is_survived(opened: Opened) -> None:
    """Weights are rearranged while they are loaded, so that can die as well."""
    with opened(Fault(die_at=0)) as teacher:
        assert np.isfinite(teacher.logits([SEQUENCE])).all()
        assert not teacher.worker.options().extra_buffers


def test_one_death_from_outside_says_nothing_of_the_library(opened: Opened) -> None:
    """The system ends a process when memory runs out: tried again, nothing slow is remembered."""
    with opened(Fault(die_at=1, signal=signal.SIGKILL, times=1)) as teacher:
        assert teacher.worker.options().extra_buffers and read_record().extra_buffers


def test_a_death_at_the_second_decode_is_one_clear_error(opened: Opened) -> None:
    """Nothing is run again after the check, no file is blamed, and a sketch is not ruled out."""
    with opened(Fault(die_at=2)) as teacher:
        for ask in (
            lambda: recipe_for(TargetsConfig(), teacher, Source(), Console(quiet=True)),
            lambda: teacher.logits([SEQUENCE]),
        ):
            with pytest.raises(WorkerDied, match=r"SIGSEGV.*GGML_ASSERT\(double\).*doctor") as died:
                ask()
            assert "damaged" not in str(died.value)


@pytest.mark.parametrize(("logits", "reason"), [("nan", "not finite"), ("wrong", "other numbers")])
def test_nonsense_does_not_pass(
    logits: str, reason: str, opened: Opened, right: np.ndarray
) -> None:
    """Logits that are not finite, or those of other tokens, are not taken from extra buffers."""
    with opened(Fault(logits=logits)) as teacher:
        assert np.abs(teacher.logits([SEQUENCE], exact=True) - right).max() < 1e-4
        assert reason in read_record().reason


def test_both_ways_are_compared_once(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """Types that were compared are not compared again, a new type is; the reference is mapped."""
    with llama_cpp_with(Fault(), tmp_path / "double"):
        for path, types in ((tiny_teacher_path, {"F32"}), (example_teacher(), {"F32", "Q8_0"})):
            with GGUFTeacher(path, threads=1) as teacher:
                teacher.logits([SEQUENCE])
            assert read_record().verified == types and read_record().extra_buffers
        first, second = [note for note in notes_in(tmp_path / "double") if "load_mode" in note][:2]
        assert first["extra_buffers"] and not second["extra_buffers"]
        assert first["load_mode"] != second["load_mode"]
        # Wrong results of a type that counts as compared are not looked at again.
        fault = tmp_path / "double" / "llama_cpp" / "fault.json"
        fault.write_text(fault.read_text().replace('"logits": ""', '"logits": "wrong"'))
        with GGUFTeacher(tiny_teacher_path, threads=1) as teacher:
            assert teacher.worker.options().extra_buffers


def test_the_machine_is_blamed_only_where_it_is_at_fault(opened: Opened) -> None:
    """Where every file fails it is the machine, where the example teacher runs it is the file."""
    with opened(Fault(die_at=1, where="always"), "machine") as teacher:
        with pytest.raises(LibraryError, match=r"not to blame.*doctor"):
            teacher.logits([SEQUENCE])
        assert read_record() == CheckRecord()
    with (
        opened(Fault(die_at=1, where="other files"), "file") as teacher,
        pytest.raises(TeacherError, match=r"tiny\.gguf.*SIGSEGV.*the cause is in this file"),
    ):
        teacher.logits([SEQUENCE])


@pytest.mark.parametrize("status", ["-3", "no model"])
def test_a_refusal_is_taken_like_a_death(status: str, opened: Opened) -> None:
    """An error where another build dies: tried without extra buffers, and blamed rightly."""
    fault = Fault(refuse=True, die_at=-1 if status == "-3" else -2)
    with opened(fault) as teacher:
        assert not teacher.worker.options().extra_buffers
        assert read_record().allows_extra_buffers(1)  # it may have been memory
    for where, kind in (("other files", TeacherError), ("always", LibraryError)):
        with (
            pytest.raises(kind, match=r"tiny\.gguf") as refused,
            opened(replace(fault, where=where), where) as teacher,
        ):
            teacher.logits([SEQUENCE])
        assert ("not to blame" in str(refused.value)) == (where == "always")
        assert "llama.cpp cannot" in str(refused.value)


def test_a_first_decode_that_hangs_is_taken_like_a_death(
    tiny_teacher_path: Path, tmp_path: Path
) -> None:
    """A worker that computes and says nothing is stopped, and the file run the other way."""
    with (
        llama_cpp_with(Fault(die_at=1, signal=signal.SIGSTOP), tmp_path / "double"),
        closing(Worker(tiny_teacher_path, threads=1, hung_seconds=1.0)) as worker,
    ):
        assert not worker.options().extra_buffers and "no sign of life" in read_record().reason


def test_a_library_that_does_not_load_is_the_machines_fault(
    tiny_teacher_path: Path, tmp_path: Path
) -> None:
    """Whatever importing the package or calling a missing function raises, no file is blamed."""
    lines = {
        "": "cannot open shared object",
        "raise ValueError('bad magic')": "bad magic",
        "1 +": "invalid syntax",
        "del native.LLAMA_LOAD_MODE_NONE": "LLAMA_LOAD_MODE_NONE",
    }
    for number, (line, words) in enumerate(lines.items()):
        fault = Fault(import_error="" if line else words)
        with llama_cpp_with(fault, tmp_path / str(number)) as deaths:
            code = deaths.with_name("llama_cpp") / "__init__.py"
            code.write_text(f"{code.read_text()}\n{line}\n")
            with pytest.raises(LibraryError) as failed:
                GGUFTeacher(tiny_teacher_path, threads=1)
        said = str(failed.value)
        assert re.search(f"{words}.*doctor", said) and "tiny.gguf" not in said, (line, said)


def test_a_worker_ends_with_its_parent(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """Also while it is busy in llama.cpp and does not read: nobody would see what it computes."""
    code = (
        "import sys; from pathlib import Path; from teachers.llama_cpp.worker import Worker; "
        "w = Worker(Path(sys.argv[1]), threads=1); print(w.process_id, flush=True); w.options()"
    )
    command = [sys.executable, "-c", code, str(tiny_teacher_path)]
    with (
        llama_cpp_with(Fault(die_at=1, signal=0), tmp_path / "double") as begun,
        subprocess.Popen(command, stdout=subprocess.PIPE) as parent,
    ):
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        while not begun.exists():
            time.sleep(0.05)
        parent.kill()
        parent.wait()
        child.wait(timeout=20)


def test_a_way_out_by_hand(tiny_teacher_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where llama.cpp dies later than its check, the user can choose plain kernels."""
    monkeypatch.setenv("DISTILL_PLAIN_KERNELS", "1")
    with GGUFTeacher(tiny_teacher_path, threads=1) as teacher:
        assert not teacher.worker.options().extra_buffers
    assert read_record().extra_buffers


def test_a_gpu_that_dies_is_named(opened: Opened) -> None:
    """A death with layers on the GPU of a file that runs without: the user may choose fewer."""
    named = r"7 layers on the GPU.*SIGSEGV|SIGSEGV.*7 layers on the GPU"
    with (
        opened(Fault(die_at=1, where="gpu"), gpu_layers=7) as teacher,
        pytest.raises(TeacherError, match=named) as failed,
    ):
        teacher.logits([SEQUENCE])
    assert "Put fewer layers on the GPU" in str(failed.value)


def test_a_gpu_that_computes_nonsense_is_named(
    opened: Opened, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Results on the GPU are compared with those of a processor that no GPU helps."""
    with opened(Fault(logits="wrong", where="gpu"), gpu_layers=7) as teacher:
        assert teacher.worker.options().extra_buffers and read_record() == CheckRecord()
    notes = notes_in(tmp_path / "double")
    models = [(note["gpu_layers"], note["alone"]) for note in notes if "alone" in note]
    assert models == [(7, False), (0, True)]
    contexts = [note["op_offload"] or note["offload_kqv"] for note in notes if "op_offload" in note]
    assert contexts == [True, False, False]
    said = [record.getMessage() for record in caplog.records]
    assert sum("Pretended computes other numbers" in line for line in said) == 1


def test_a_gpu_that_nobody_asked_for_is_shut_out(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """A library that would die in its GPU's driver does not come there."""
    with (
        llama_cpp_with(Fault(die_at=1, where="driver"), tmp_path / "double") as deaths,
        GGUFTeacher(tiny_teacher_path, threads=1) as teacher,
    ):
        assert np.isfinite(teacher.logits([SEQUENCE])).all()
        assert not deaths.exists() and read_record().extra_buffers


def test_what_was_refused_leaves_no_process(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """After an error of the check a file can be asked again, to the same end; no process stays."""
    for name, fault in (("refused", Fault(die_at=1)), ("died", Fault(die_at=1, where="always"))):
        with llama_cpp_with(fault, tmp_path / name):
            if name == "refused":  # the other way makes no context
                code = tmp_path / name / "llama_cpp" / "__init__.py"
                text = code.read_text()
                code.write_text(text.replace('applies() and fault["refuse"]', "not extra_buffers"))
            with GGUFTeacher(tiny_teacher_path, threads=1) as teacher:
                said = set()
                for _ in range(2):
                    with pytest.raises((TeacherError, LibraryError)) as failed:
                        teacher.logits([SEQUENCE])
                    said.add(str(failed.value))
                assert len(said) == 1, name
                with pytest.raises((TeacherError, LibraryError)):
                    teacher.tokenize(["a"], add_special=False, parse_special=False)
        notes = notes_in(tmp_path / name)
        alive = [note for note in notes if psutil.pid_exists(note.get("process", 0) or 1 << 30)]
        assert not alive, name


def test_warnings_of_loading_are_passed_on_once(
    tiny_teacher_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What llama.cpp warns of while it loads reaches the user, with the file's name."""
    with llama_cpp_with(Fault(warning="load: an odd token"), tmp_path / "double"):
        for _ in range(2):
            GGUFTeacher(tiny_teacher_path, threads=1).close()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["llama.cpp, loading tiny.gguf: load: an odd token"]


def test_exit_codes() -> None:
    """The machine's fault is ours to the command line, the file's the user's."""
    died = WorkerDied("x.gguf", "died during score (signal SIGSEGV)")
    assert [exit_code(error) for error in (LibraryError("x"), died, TeacherError("x"))] == [1, 1, 2]


def test_rows_of_one_block_take_plain_kernels(tmp_path: Path) -> None:
    """Those for AMX give NaN for them, which a check of the type on another file does not see."""
    files = {}
    for width in (32, 64):
        shape = Shape(width=width, layers=1, feed_forward=96, heads=2, vocab_size=600)
        write(files.setdefault(width, tmp_path / f"{width}.gguf"), shape, "q8_0", 0)
    sequence = np.arange(5, 52, dtype=np.int32)
    for width in (64, 32):
        with GGUFTeacher(files[width], threads=1) as teacher:
            assert np.isfinite(teacher.logits([sequence], exact=True)).all(), width
    one_block, two_blocks = (has_rows_of_one_block(read_gguf(files[width])) for width in (32, 64))
    assert one_block and not two_blocks
