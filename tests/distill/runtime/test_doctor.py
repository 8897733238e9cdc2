"""``distill doctor``: the truth about machines of every kind, most of them pretended."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from distill.runtime import doctor, machine_checks
from distill.runtime.progress import Console
from teachers.llama_cpp.library import build as llama_library
from teachers.llama_cpp.library.build import Processor
from teachers.llama_cpp.library.check_record import (
    CheckRecord,
    change_record,
    of_this_process,
    read_record,
)
from tests.conftest import command
from tests.support.llama.double import Fault, llama_cpp_with

pytestmark = pytest.mark.needs_gguf
ROOT = Path(__file__).parents[3]
AVX2 = frozenset({"avx", "avx2", "f16c", "fma", "bmi2"})


Examined = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> Examined:
    """The exit code of the command, and what it says of each thing by name."""

    def examine(*, pytorch: bool = False) -> tuple[int, dict[str, Any]]:
        if not pytorch:  # takes seconds, and so does measuring speed
            monkeypatch.setattr(doctor, "pytorch_findings", lambda: iter(()))
            monkeypatch.setattr(doctor, "SPEED_PROMPT", 16)
            monkeypatch.setattr(doctor, "SPEED_NEW", 2)
        ended = command("doctor", "--json")
        content = json.loads(ended.out)
        assert content["main_job"] == (ended.code == 0)
        return int(ended.code or 0), {finding["name"]: finding for finding in content["findings"]}

    return examine


def test_a_machine_in_order(examined: Examined) -> None:
    """Every part is named, what is not ok has a remedy, and the speed is a speed."""
    code, found = examined(pytorch=True)
    assert code == 0
    assert {"processor", "memory", "disk", "packages", "PyTorch"} <= found.keys()
    assert {"llama.cpp", "self-check", "speed"} <= found.keys()
    assert all(finding["remedy"] for finding in found.values() if finding["level"] != "ok")
    assert {"F32", "Q8_0"} <= set(found["self-check"]["facts"]["compared"])
    assert found["speed"]["facts"]["prompt"] > 0 and found["speed"]["facts"]["generation"] > 0


@pytest.mark.skipif(os.name != "posix", reason="the double dies of signals")
@pytest.mark.parametrize(
    ("fault", "code", "name", "level", "text"),
    [
        (Fault(die_at=1), 0, "self-check", "slow", "SIGSEGV"),
        (Fault(logits="wrong"), 0, "self-check", "slow", "other numbers"),
        (Fault(die_at=1, where="always"), 1, "self-check", "broken", "does not work on this"),
        (Fault(import_error="no such library"), 1, "llama.cpp", "broken", "no such library"),
    ],
    ids=["extra buffers die", "extra buffers are wrong", "everything dies", "does not load"],
)
def test_a_llama_cpp_that_does_not_suit_the_machine(
    fault: Fault, code: int, name: str, level: str, text: str, examined: Examined, tmp_path: Path
) -> None:
    """Slow or broken, with the command that builds it again."""
    with llama_cpp_with(fault, tmp_path / "double"):
        found_code, found = examined()
    assert found_code == code and found[name]["level"] == level and text in found[name]["text"]
    assert "llama_cpp/library/build.cmake" in found[name]["remedy"]


def test_a_remembered_fault_is_not_forgotten_for_another_kind_of_file(
    examined: Examined, tmp_path: Path
) -> None:
    """Where the example works, only a fault found with its own kinds of tensors has gone."""
    for types, level in ((["F32", "Q8_0"], "ok"), (["Q4_K"], "slow")):
        with llama_cpp_with(Fault(), tmp_path / level):
            fault = CheckRecord(False, 0, "died (signal SIGSEGV)", frozenset(types))
            change_record(lambda record: fault)  # noqa: B023
            code, found = examined()
            of_this_process.clear()
            check = found["self-check"]
            assert code == 0 and check["level"] == level and "SIGSEGV" in check["text"], types
            assert read_record().extra_buffers == (level == "ok"), types
            assert ("llama_cpp/library/build.cmake" in check["remedy"]) == (level == "slow"), types


def test_the_command_that_builds_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell takes its paths whole, and what CMAKE_ARGS asked for stays."""
    monkeypatch.setattr(doctor, "__file__", "/home/my user/distill/runtime/doctor.py")
    command = doctor.rebuild_command().removeprefix("compile it again: ")
    setting = command.partition(f" {sys.executable}")[0]
    shell = ["sh", "-c", f"CMAKE_ARGS=-DGGML_CUDA=on; {setting} env"]
    answer = subprocess.run(shell, capture_output=True, text=True, check=True)
    [setting] = [line for line in answer.stdout.splitlines() if line.startswith("CMAKE_ARGS=")]
    first, include = shlex.split(setting.partition("=")[2])
    path = "/home/my user/teachers/llama_cpp/library/build.cmake"
    assert (first, include) == ("-DGGML_CUDA=on", f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={path}")


def test_no_place_to_remember(
    examined: Examined, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache folder that cannot be made: slow, not broken."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    code, found = examined()
    assert code == 0 and found["check kept"]["level"] == "slow"
    assert "XDG_CACHE_HOME" in found["check kept"]["remedy"]


def test_a_bad_teacher_is_the_users_mistake(tmp_path: Path) -> None:
    """A file that is no GGUF file is refused as everywhere."""
    (tmp_path / "x.gguf").write_bytes(b"no such thing")
    ended = command("doctor", "--teacher", tmp_path / "x.gguf")
    assert ended.code == 2 and "x.gguf" in ended.complaint


def test_a_library_built_for_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a feature of the processor it is slow, with one that the processor lacks it dies."""
    amx = AVX2 | {"avx512f", "avx512_vnni", "amx_int8"}
    for features, built, level, named in (
        (AVX2, ["AVX", "AVX2", "REPACK"], "ok", ""),
        (amx, ["AVX2", "AVX512", "AVX512_VNNI"], "slow", "AMX_INT8"),
        (AVX2, ["AVX"], "slow", "AVX2"),
        (frozenset({"avx"}), ["AVX", "AVX2", "FMA"], "broken", "AVX2, FMA"),
        (frozenset(), ["AVX2"], "ok", ""),  # a system that does not tell its processor's features
    ):
        pretended, facts = Processor("pretended", features), {"built_with": built, "devices": []}
        monkeypatch.setattr(llama_library, "processor", lambda found=pretended: found)
        monkeypatch.setattr(doctor, "ask_child", lambda code, found=facts: (found, ""))
        library = next(iter(doctor.library_findings()))
        assert library.level == level and named in library.text, (built, library)
        assert bool(library.remedy) == (level != "ok"), (built, library)


def test_small_machines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One core, no AVX, 2 GB: each a line of its own in the run too."""
    monkeypatch.setattr(machine_checks.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine_checks, "container_limits", lambda: [])
    for case in (
        (8, AVX2, 32, 16.0, ["ok", "ok"]),
        (1, AVX2, 32, 16.0, ["slow", "ok"]),
        (2, frozenset({"sse2"}), 32, 16.0, ["slow", "ok"]),
        (2, AVX2, 2, 1.5, ["ok", "slow"]),
        (2, AVX2, 2, 0.5, ["ok", "broken"]),
    ):
        cores, features, total, free, levels = case
        memory = SimpleNamespace(total=total << 30, available=int(free * 2**30))
        pretended = Processor("pretended", features)
        monkeypatch.setattr(psutil, "virtual_memory", lambda found=memory: found)
        monkeypatch.setattr(machine_checks, "usable_cores", lambda found=cores: found)
        monkeypatch.setattr(machine_checks, "processor", lambda found=pretended: found)
        found = [machine_checks.processor_finding().level, machine_checks.memory_finding().level]
        assert found == levels, case
        machine_checks.warn_of_machine(Console())
        lines = capsys.readouterr().out.count("distill doctor")
        assert lines == sum(level != "ok" for level in levels), case


def test_a_container_has_the_memory_that_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both versions of control groups, in the process's own group or at the root."""
    groups = tmp_path / "groups"
    cases = {
        "0::/box\n": ("box/memory.max", "box/memory.current"),
        "0::/not/seen/from/inside\n": ("memory.max", "memory.current"),
    }
    old = ("memory/box/memory.limit_in_bytes", "memory/box/memory.usage_in_bytes")
    cases["3:cpu:/\n7:memory:/box\n"] = old
    for number, (lines, names) in enumerate(cases.items()):
        groups.write_text(lines, encoding="utf-8")
        root = tmp_path / str(number)
        limit, used = (root / name for name in names)
        assert machine_checks.container_limits(groups, root) == [], lines
        limit.parent.mkdir(parents=True)
        limit.write_text(f"{3 << 30}\n", encoding="ascii")
        used.write_text(f"{1 << 30}\n", encoding="ascii")
        assert machine_checks.container_limits(groups, root) == [(3 << 30, 1 << 30)], lines
        stats = "anon 7\ninactive_file 24\n"  # files kept in memory are free
        limit.with_name("memory.stat").write_text(stats, encoding="ascii")
        assert machine_checks.container_limits(groups, root) == [(3 << 30, (1 << 30) - 24)], lines
        limit.write_text("max\n", encoding="ascii")
        assert machine_checks.container_limits(groups, root) == [], lines
    monkeypatch.setattr(machine_checks, "container_limits", lambda: [(3 << 30, 1 << 30)])
    facts = machine_checks.memory_finding().facts
    assert facts["total_bytes"] <= 3 << 30 and facts["available_bytes"] <= 2 << 30


def test_the_first_lines_need_nothing_heavy() -> None:
    """The examiner comes at once, and asks PyTorch and llama.cpp in processes of their own."""
    code = "import sys, distill.cli, distill.runtime.doctor as d; [*d.machine_findings(), "
    code += "*d.package_findings()]; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert not {"torch", "transformers", "llama_cpp"} & set(answer.stdout.split())
