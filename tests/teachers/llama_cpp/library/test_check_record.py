"""What the self-check of llama.cpp found is kept for the next process, if there is a place."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from teachers.llama_cpp.library import build as llama_library
from teachers.llama_cpp.library import check_record
from teachers.llama_cpp.library.check_record import (
    CheckRecord,
    change_record,
    read_record,
    record_path,
)
from teachers.llama_cpp.teacher import GGUFTeacher
from tests.support.llama.double import Fault, llama_cpp_with

pytestmark = [
    pytest.mark.needs_gguf,
    pytest.mark.skipif(os.name != "posix", reason="the double dies of signals"),
]
DAMAGED = [
    "",
    "[]",
    '{"extra_buffers": 1}',
    '{"verified": 3}',
    "[" * 10**5,
    "\0",
    '{"extra_buffers": false, "verified": [], "failed": []}',  # and no reason
    '{"extra_buffers": false, "reason": "\\u001b[31m", "time": "1", "verified": [], "failed": []}',
]


def test_what_another_process_found_is_kept(tmp_path: Path) -> None:
    """A change is made to what is there by then: neither a verdict nor a comparison is lost."""
    with llama_cpp_with(Fault(), tmp_path / "double"):
        mine = read_record()  # as it was when this process began
        change_record(lambda record: replace(record, extra_buffers=False, reason="died"))
        check_record.of_this_process[llama_library.fingerprint()] = mine
        change_record(lambda record: replace(record, verified=record.verified | {"Q8_0"}))
        check_record.of_this_process.clear()
        assert not read_record().extra_buffers and read_record().verified == {"Q8_0"}


@pytest.mark.parametrize("place", ["a file", "no home"])
def test_where_nothing_can_be_kept_the_run_goes_on(
    place: str, tiny_teacher_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A cache folder that cannot be written to: said in a line, remembered in this process."""
    (tmp_path / "cache").write_text("", encoding="utf-8")
    with (
        pytest.MonkeyPatch.context() as changed,
        llama_cpp_with(Fault(die_at=1), tmp_path / "double") as deaths,
    ):
        changed.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        if place == "no home":

            def unknown(user: int) -> None:
                raise KeyError(user)

            changed.delenv("XDG_CACHE_HOME")
            changed.delenv("HOME", raising=False)
            changed.setattr("pwd.getpwuid", unknown)
        for _ in range(2):
            with GGUFTeacher(tiny_teacher_path, threads=1) as teacher:
                assert np.isfinite(teacher.logits([np.arange(5, 25, dtype=np.int32)])).all()
        assert len(deaths.read_text()) == 1
    lines = [record.getMessage() for record in caplog.records]
    assert sum("cannot be kept" in line and "XDG_CACHE_HOME" in line for line in lines) == 1


def test_what_is_no_record_counts_as_none(tmp_path: Path) -> None:
    """A damaged file; a FIFO, which would be waited for; a device, which has no end."""
    with llama_cpp_with(Fault(), tmp_path / "double"):
        path = record_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        for content in (*DAMAGED, Path("/dev/zero"), None):
            path.unlink(missing_ok=True)
            if content is None:
                os.mkfifo(path)
            elif isinstance(content, Path):
                path.symlink_to(content)
            else:
                path.write_text(content, encoding="utf-8")
            check_record.of_this_process.clear()
            assert read_record() == CheckRecord(), str(content)[:100]
        path.unlink()
