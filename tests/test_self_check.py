"""The check of llama.cpp: what dies or computes nonsense on this machine is run another way, and the truth is said."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from distill.capturing import recipe_for
from distill.config import TargetsConfig
from distill.console import Console
from distill.exit_codes import exit_code
from distill.results import how_llama_cpp_ran
from teachers import check_record, example_teacher
from teachers.check_record import CheckRecord, read_record
from teachers.errors import LibraryError, TeacherError, WorkerDied
from teachers.gguf_teacher import GGUFTeacher
from teachers.worker import Worker
from tests.llama_double import Fault, llama_cpp_with

pytestmark = [
    pytest.mark.needs_gguf,
    pytest.mark.skipif(os.name != "posix", reason="the double dies of signals"),
]
SEQUENCE = np.arange(5, 25, dtype=np.int32)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGILL, signal.SIGABRT, signal.SIGKILL])
def test_a_death_at_the_first_decode_is_survived_and_remembered(
    number: int, tiny_teacher_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the signal: the file is run without extra buffers, one line says so, and the next start knows."""
    with llama_cpp_with(Fault(die_at=1, signal=number), tmp_path / "double") as deaths:
        with caplog.at_level(logging.WARNING), GGUFTeacher(tiny_teacher_path, threads=1) as teacher:
            found = teacher.logits([SEQUENCE], exact=True)
            assert not teacher.worker.way().extra_buffers
        how = how_llama_cpp_ran()
        assert not how["extra_buffers"] and signal.Signals(number).name in how["reason"]
        [line] = [record.getMessage() for record in caplog.records]
        assert signal.Signals(number).name in line and "GGML_ASSERT(double)" in line and "doctor" in line
        paid = len(deaths.read_text())
        assert paid == (2 if number == signal.SIGKILL else 1)  # one that may come from outside is tried again
        record = read_record()
        assert signal.Signals(number).name in record.reason and record.failed == {"F32"}
        size = tiny_teacher_path.stat().st_size
        assert not record.allows_extra_buffers(size) and not record.allows_extra_buffers(2 * size)
        # Want of memory says nothing of smaller files.
        assert record.allows_extra_buffers(size - 1) == (number == signal.SIGKILL)
        check_record.of_this_process.clear()  # as another process would find it
        assert read_record() == record
        with GGUFTeacher(tiny_teacher_path, threads=1) as teacher:
            assert np.array_equal(teacher.logits([SEQUENCE], exact=True), found)
        assert len(deaths.read_text()) == paid
    with GGUFTeacher(tiny_teacher_path, threads=1) as teacher:
        assert np.abs(teacher.logits([SEQUENCE], exact=True) - found).max() < 1e-4


def test_a_death_while_loading_is_survived(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """Weights are rearranged while they are loaded, so that can die as well."""
    with (
        llama_cpp_with(Fault(die_at=0), tmp_path / "double"),
        GGUFTeacher(tiny_teacher_path, threads=1) as teacher,
    ):
        assert np.isfinite(teacher.logits([SEQUENCE])).all() and not teacher.worker.way().extra_buffers


def test_one_death_from_outside_says_nothing_of_the_library(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """The system ends a process when memory runs out: tried again, and nothing slow is remembered."""
    with (
        llama_cpp_with(Fault(die_at=1, signal=signal.SIGKILL, times=1), tmp_path / "double"),
        GGUFTeacher(tiny_teacher_path, threads=1) as teacher,
    ):
        assert teacher.worker.way().extra_buffers and read_record().extra_buffers


def test_a_death_at_the_second_decode_is_one_clear_error(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """Later than the check nothing is run again: llama.cpp's own reason, what to do, and no file is blamed."""
    with (
        llama_cpp_with(Fault(die_at=2), tmp_path / "double"),
        GGUFTeacher(tiny_teacher_path, threads=1) as teacher,
    ):
        for _ in range(2):
            with pytest.raises(WorkerDied) as died:
                teacher.logits([SEQUENCE])
            said = str(died.value)
            assert "SIGSEGV" in said and "GGML_ASSERT(double)" in said and "doctor" in said
            assert "damaged" not in said


@pytest.mark.parametrize("logits", ["nan", "wrong"])
def test_nonsense_does_not_pass(logits: str, tiny_teacher_path: Path, tmp_path: Path) -> None:
    """Logits that are not finite, or quietly those of other tokens, are not taken from extra buffers."""
    with GGUFTeacher(tiny_teacher_path, threads=1) as teacher:
        right = teacher.logits([SEQUENCE], exact=True)
    with (
        llama_cpp_with(Fault(logits=logits), tmp_path / "double"),
        GGUFTeacher(tiny_teacher_path, threads=1) as teacher,
    ):
        assert np.abs(teacher.logits([SEQUENCE], exact=True) - right).max() < 1e-4
        reason = read_record().reason
        assert ("not finite" if logits == "nan" else "other numbers") in reason


def test_both_ways_are_compared_once(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """Types that were compared are remembered, and not compared again; a new type is."""
    with llama_cpp_with(Fault(), tmp_path / "double"):
        for path, types in ((tiny_teacher_path, {"F32"}), (example_teacher(), {"F32", "Q8_0"})):
            with GGUFTeacher(path, threads=1) as teacher:
                teacher.logits([SEQUENCE])
            assert read_record().verified == types and read_record().extra_buffers
        # Wrong results of a type that counts as compared are not looked at again.
        fault = tmp_path / "double" / "llama_cpp" / "fault.json"
        fault.write_text(fault.read_text().replace('"logits": ""', '"logits": "wrong"'))
        with GGUFTeacher(tiny_teacher_path, threads=1) as teacher:
            assert teacher.worker.way().extra_buffers


def test_the_machine_is_blamed_only_where_it_is_at_fault(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """Where every file fails it is the machine, where the example teacher runs it is the file."""
    with llama_cpp_with(Fault(die_at=1, where="always"), tmp_path / "machine"):
        with GGUFTeacher(tiny_teacher_path, threads=1) as teacher, pytest.raises(LibraryError) as failed:
            teacher.logits([SEQUENCE])
        assert "not to blame" in str(failed.value) and "doctor" in str(failed.value)
        assert read_record() == CheckRecord()
    with (
        llama_cpp_with(Fault(die_at=1, where="other files"), tmp_path / "file"),
        GGUFTeacher(tiny_teacher_path, threads=1) as teacher,
        pytest.raises(TeacherError, match=r"tiny\.gguf.*SIGSEGV.*the cause is in this file"),
    ):
        teacher.logits([SEQUENCE])


@pytest.mark.parametrize("status", ["-3", "no model"])
def test_a_refusal_is_taken_like_a_death(status: str, tiny_teacher_path: Path, tmp_path: Path) -> None:
    """llama.cpp may answer with an error where another build dies: tried without extra buffers, and blamed rightly."""
    fault = Fault(refuse=True) if status == "-3" else Fault(refuse=True, die_at=-2)
    for where, extra in (("extra buffers", False), ("other files", True), ("always", True)):
        with llama_cpp_with(replace(fault, where=where), tmp_path / where.replace(" ", "-")):
            if where == "extra buffers":
                with GGUFTeacher(tiny_teacher_path, threads=1) as teacher:
                    assert teacher.worker.way().extra_buffers == extra
                assert read_record().allows_extra_buffers(1)  # it may have been memory
                continue
            kind = LibraryError if where == "always" else TeacherError
            with pytest.raises(kind) as refused, GGUFTeacher(tiny_teacher_path, threads=1) as teacher:
                teacher.logits([SEQUENCE])
            assert ("not to blame" in str(refused.value)) == (where == "always")
            assert "llama.cpp cannot" in str(refused.value) and tiny_teacher_path.name in str(refused.value)


def test_a_first_decode_that_hangs_is_taken_like_a_death(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """A worker that computes nothing and says nothing is stopped, and the file run the other way."""
    with llama_cpp_with(Fault(die_at=1, signal=signal.SIGSTOP), tmp_path / "double"):
        worker = Worker(tiny_teacher_path, threads=1, hung_seconds=1.0)
        try:
            assert not worker.way().extra_buffers and "no sign of life" in read_record().reason
        finally:
            worker.close()


def test_a_damaged_package_is_the_machines_fault(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """Whatever importing the package or calling a function that it lacks raises, no file is blamed."""
    for number, line in enumerate(
        ("raise ValueError('bad magic')", "1 +", "del native.LLAMA_LOAD_MODE_NONE")
    ):
        with llama_cpp_with(Fault(), tmp_path / str(number)) as deaths:
            code = deaths.with_name("llama_cpp") / "__init__.py"
            code.write_text(f"{code.read_text()}\n{line}\n")
            with pytest.raises(LibraryError) as failed:
                GGUFTeacher(tiny_teacher_path, threads=1)
            assert tiny_teacher_path.name not in str(failed.value) and "doctor" in str(failed.value)


def test_a_worker_ends_with_its_parent(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """Also while it is busy in llama.cpp and does not read: nobody would see what it computes."""
    code = (
        "import sys; from pathlib import Path; from teachers.worker import Worker; "
        "w = Worker(Path(sys.argv[1]), threads=1); print(w.process_id, flush=True); w.way()"
    )
    with llama_cpp_with(Fault(die_at=1, signal=0), tmp_path / "double") as begun:
        parent = subprocess.Popen(
            [sys.executable, "-c", code, str(tiny_teacher_path)], stdout=subprocess.PIPE
        )
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        while not begun.exists():
            time.sleep(0.05)
        parent.kill()
        parent.wait()
        parent.stdout.close()
        child.wait(timeout=20)


def test_a_way_out_by_hand(tiny_teacher_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where llama.cpp dies later than its check, the user can choose plain kernels."""
    monkeypatch.setenv("DISTILL_PLAIN_KERNELS", "1")
    with GGUFTeacher(tiny_teacher_path, threads=1) as teacher:
        assert not teacher.worker.way().extra_buffers
    assert read_record().extra_buffers


def test_a_gpu_that_dies_is_named(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """A death with layers on the GPU of a file that runs without them: fewer layers are the user's business."""
    with (
        llama_cpp_with(Fault(die_at=1, where="gpu"), tmp_path / "double"),
        GGUFTeacher(tiny_teacher_path, threads=1, gpu_layers=7) as teacher,
        pytest.raises(
            TeacherError, match=r"7 layers on the GPU.*SIGSEGV|SIGSEGV.*7 layers on the GPU"
        ) as failed,
    ):
        teacher.logits([SEQUENCE])
    assert "Put fewer layers on the GPU" in str(failed.value)


def test_a_gpu_that_computes_nonsense_is_named(
    tiny_teacher_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Results on the GPU are compared with those of a processor that no GPU helps."""
    with (
        llama_cpp_with(Fault(logits="wrong", where="gpu"), tmp_path / "double") as deaths,
        GGUFTeacher(tiny_teacher_path, threads=1, gpu_layers=7) as teacher,
    ):
        assert teacher.worker.way().extra_buffers and read_record() == CheckRecord()
        notes = [json.loads(line) for line in deaths.with_name("notes").read_text().splitlines()]
    models, contexts = [[note for note in notes if key in note] for key in ("devices", "op_offload")]
    assert [(model["gpu_layers"], model["devices"]) for model in models] == [(7, False), (0, True)]
    assert [context["op_offload"] or context["offload_kqv"] for context in contexts] == [True, False, False]
    assert sum("Pretended computes other numbers" in record.getMessage() for record in caplog.records) == 1


def test_a_gpu_that_nobody_asked_for_is_shut_out(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """A library that dies in its GPU's driver with no layers there runs on the processor alone, the next time too."""
    with llama_cpp_with(Fault(die_at=1, where="driver"), tmp_path / "double") as deaths:
        for _ in range(2):
            with GGUFTeacher(tiny_teacher_path, threads=1) as teacher:
                assert np.isfinite(teacher.logits([SEQUENCE])).all() and teacher.worker.way().processor_only
        assert len(deaths.read_text()) == 1


def test_what_was_refused_leaves_no_process(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """After an error of the check the file can be asked again, with the same answer, and every process has ended."""
    cases = {"refused": Fault(die_at=1), "died": Fault(die_at=1, where="always")}
    for name, fault in cases.items():
        with llama_cpp_with(fault, tmp_path / name) as deaths:
            if name == "refused":  # the other way makes no context
                code = deaths.with_name("llama_cpp") / "__init__.py"
                text = code.read_text().replace('applies() and fault["refuse"]', "not extra_buffers")
                code.write_text(text)
            teacher = GGUFTeacher(tiny_teacher_path, threads=1)
            said = []
            for _ in range(2):
                with pytest.raises((TeacherError, LibraryError)) as failed:
                    teacher.logits([SEQUENCE])
                said.append(str(failed.value))
            assert said[0] == said[1]
            with pytest.raises((TeacherError, LibraryError)):
                teacher.tokenize(["a"], add_special=False, parse_special=False)
            teacher.close()
            notes = [json.loads(line) for line in deaths.with_name("notes").read_text().splitlines()]
            assert not [
                note["process"] for note in notes if psutil.pid_exists(note.get("process", 0) or 1 << 30)
            ]


def test_the_reference_takes_no_memory_of_its_own(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """The second process of a comparison maps the file, without extra buffers."""
    with (
        llama_cpp_with(Fault(), tmp_path / "double") as deaths,
        GGUFTeacher(tiny_teacher_path, threads=1) as teacher,
    ):
        teacher.worker.way()
        notes = [json.loads(line) for line in deaths.with_name("notes").read_text().splitlines()]
    first, second = [note for note in notes if "load_mode" in note]
    assert (
        first["extra_buffers"] and not second["extra_buffers"] and first["load_mode"] != second["load_mode"]
    )


def test_warnings_of_loading_are_passed_on_once(
    tiny_teacher_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What llama.cpp warns of while it loads reaches the user, with the file's name."""
    with llama_cpp_with(Fault(warning="load: an odd token"), tmp_path / "double"):
        for _ in range(2):
            GGUFTeacher(tiny_teacher_path, threads=1).close()
    assert [record.getMessage() for record in caplog.records] == [
        "llama.cpp, loading tiny.gguf: load: an odd token"
    ]


def test_exit_codes() -> None:
    """The machine's fault is ours to the command line, the file's the user's."""
    died = WorkerDied("x.gguf", "died during score (signal SIGSEGV)")
    assert [exit_code(error) for error in (LibraryError("x"), died, TeacherError("x"))] == [1, 1, 2]


def test_a_dead_worker_is_not_a_teacher_without_a_sketch(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """Whether states can stand for logits is not answered by a death."""
    with (
        llama_cpp_with(Fault(die_at=2), tmp_path / "double"),
        GGUFTeacher(tiny_teacher_path, threads=1) as teacher,
        pytest.raises(WorkerDied),
    ):
        recipe_for(TargetsConfig(), teacher, Console(quiet=True))


def test_a_library_that_does_not_load_is_said(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """No file is blamed for a missing library."""
    with (
        llama_cpp_with(Fault(import_error="libllama.so: cannot open shared object"), tmp_path / "double"),
        pytest.raises(LibraryError, match=r"cannot open shared object.*doctor"),
    ):
        GGUFTeacher(tiny_teacher_path, threads=1)
