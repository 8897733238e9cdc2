"""The check of llama.cpp: what dies or computes nonsense on this machine is run another way, and the truth is said."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from distill.capturing import recipe_for
from distill.config import TargetsConfig
from distill.console import Console
from teachers import check_record, example_teacher
from teachers.check_record import CheckRecord, read_record, record_path
from teachers.errors import LibraryError, TeacherError, WorkerDied
from teachers.gguf_teacher import GGUFTeacher
from teachers.worker import allowed_kl, mean_kl, usable
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
        [line] = [record.getMessage() for record in caplog.records]
        assert signal.Signals(number).name in line and "GGML_ASSERT(double)" in line and "doctor" in line
        paid = len(deaths.read_text())
        assert paid == (2 if number == signal.SIGKILL else 1)  # one that may come from outside is tried again
        record = read_record()
        assert not record.extra_buffers and signal.Signals(number).name in record.reason
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


def test_a_gpu_that_computes_nonsense_is_named(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """Results on the GPU are compared with the processor's."""
    with (
        llama_cpp_with(Fault(logits="wrong", where="gpu"), tmp_path / "double"),
        GGUFTeacher(tiny_teacher_path, threads=1, gpu_layers=7) as teacher,
        pytest.raises(TeacherError, match=r"other numbers.*7 layers on the GPU"),
    ):
        teacher.logits([SEQUENCE])


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


@pytest.mark.parametrize("place", ["a file", "no home"])
def test_where_nothing_can_be_kept_the_run_goes_on(
    place: str, tiny_teacher_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A cache folder that cannot be written to: said in a line, remembered in this process alone."""
    (tmp_path / "cache").write_text("", encoding="utf-8")
    with (
        pytest.MonkeyPatch.context() as changed,
        llama_cpp_with(Fault(die_at=1), tmp_path / "double") as deaths,
    ):
        changed.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        if place == "no home":
            changed.setattr("platformdirs.user_cache_path", lambda name: Path("~/.cache") / name)
        for _ in range(2):
            with GGUFTeacher(tiny_teacher_path, threads=1) as teacher:
                assert np.isfinite(teacher.logits([SEQUENCE])).all()
        assert len(deaths.read_text()) == 1
    lines = [record.getMessage() for record in caplog.records]
    assert sum("cannot be kept" in line and "XDG_CACHE_HOME" in line for line in lines) == 1


@pytest.mark.parametrize("content", ["", "[]", '{"extra_buffers": 1}', '{"verified": 3}', "[" * 10**5, "\0"])
def test_a_damaged_record_counts_as_none(content: str, tmp_path: Path) -> None:
    """The record is found again, whatever has become of its file."""
    with llama_cpp_with(Fault(), tmp_path / "double"):
        record_path().parent.mkdir(parents=True, exist_ok=True)
        record_path().write_text(content, encoding="utf-8")
        assert read_record() == CheckRecord()


def test_divergence_of_logits() -> None:
    """Against the definition in float64; identity, direction, excluded tokens, and what cannot be used."""
    draw = np.random.default_rng(0)
    p, q = (draw.normal(0, 3, (5, 40)).astype(np.float32) for _ in range(2))
    dense = [
        np.exp(rows.astype(np.float64)) / np.exp(rows.astype(np.float64)).sum(1)[:, None] for rows in (p, q)
    ]
    expected = (dense[0] * np.log(dense[0] / dense[1])).sum(1).mean()
    assert mean_kl(p, q) == pytest.approx(expected, rel=1e-6) and mean_kl(p, p) == 0.0
    assert mean_kl(p, q) != pytest.approx(mean_kl(q, p), rel=1e-3)
    p[:, 3] = q[:, 3] = -np.inf  # tokens that a model excludes
    assert np.isfinite(mean_kl(p, q)) and usable(p)
    assert allowed_kl(p, p) == 0.01 and allowed_kl(p, q) == pytest.approx(5 * mean_kl(p, q))
    for bad in (np.nan, np.inf):
        rows = p.copy()
        rows[2, 5] = bad
        assert not usable(rows)
    rows[:] = -np.inf
    assert not usable(rows)
