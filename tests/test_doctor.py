"""``distill doctor``: the truth about machines of every kind, most of them pretended."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from distill import doctor, machine
from distill.console import Console
from teachers import llama_library
from teachers.check_record import CheckRecord, change_record, of_this_process, read_record
from teachers.llama_library import Processor
from tests.llama_double import Fault, llama_cpp_with

pytestmark = pytest.mark.needs_gguf
ROOT = Path(__file__).parent.parent
AVX2 = frozenset({"avx", "avx2", "f16c", "fma", "bmi2"})


def examined(*options: str, **environment: str) -> tuple[int, dict[str, Any]]:
    """The exit code of the command, and what it says of each thing by name."""
    answer = subprocess.run(
        [sys.executable, "-m", "distill", "doctor", "--json", *options],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | environment, check=False,
    )  # fmt: skip
    assert "Traceback" not in answer.stderr, answer.stderr
    content = json.loads(answer.stdout)
    assert content["main_job"] == (answer.returncode == 0)
    return answer.returncode, {finding["name"]: finding for finding in content["findings"]}


def test_a_machine_in_order() -> None:
    """Every part is named, what is not ok has a remedy, and the speed is a speed."""
    code, found = examined()
    assert code == 0
    assert set(found) >= {
        "processor",
        "memory",
        "disk",
        "packages",
        "llama.cpp",
        "self-check",
        "speed",
        "PyTorch",
    }
    assert all(finding["remedy"] for finding in found.values() if finding["level"] != "ok")
    assert {"F32", "Q8_0"} <= set(found["self-check"]["facts"]["compared"])
    assert found["speed"]["facts"]["prompt"] > 0 and found["speed"]["facts"]["generation"] > 0


@pytest.mark.skipif(os.name != "posix", reason="the double dies of signals")
@pytest.mark.parametrize(
    ("fault", "code", "name", "level", "text"),
    [
        (Fault(die_at=1), 0, "self-check", "slow", "SIGSEGV"),
        (Fault(logits="wrong"), 0, "self-check", "slow", "other numbers"),
        (Fault(die_at=1, where="always"), 1, "self-check", "broken", "does not work on this machine"),
        (Fault(import_error="no such library"), 1, "llama.cpp", "broken", "no such library"),
    ],
    ids=["extra buffers die", "extra buffers are wrong", "everything dies", "does not load"],
)
def test_a_llama_cpp_that_does_not_suit_the_machine(
    fault: Fault, code: int, name: str, level: str, text: str, tmp_path: Path
) -> None:
    """Slow or broken, with the command that builds it again."""
    with llama_cpp_with(fault, tmp_path / "double"):
        found_code, found = examined()
    assert found_code == code and found[name]["level"] == level and text in found[name]["text"]
    assert "llama_cpp_build.cmake" in found[name]["remedy"]


@pytest.mark.parametrize(("types", "level"), [(["F32", "Q8_0"], "ok"), (["Q4_K"], "slow")])
def test_a_remembered_fault_is_not_forgotten_for_another_kind_of_file(
    types: list[str], level: str, tmp_path: Path
) -> None:
    """Where the example works, only a fault that was found with its own kinds of tensors has gone."""
    with llama_cpp_with(Fault(), tmp_path / "double"):
        fault = CheckRecord(False, 0, "died during first decode (signal SIGSEGV)", frozenset(types))
        change_record(lambda record: fault)
        code, found = examined()
        of_this_process.clear()
        assert code == 0 and found["self-check"]["level"] == level
        assert "SIGSEGV" in found["self-check"]["text"]
        assert read_record().extra_buffers == (level == "ok")
        assert ("llama_cpp_build.cmake" in found["self-check"]["remedy"]) == (level == "slow")


def test_the_command_that_builds_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell takes its paths whole, and what CMAKE_ARGS asked for stays."""
    monkeypatch.setattr(doctor, "__file__", "/home/my user/distill/doctor.py")
    setting = doctor.rebuild_command().removeprefix("compile it again: ").partition(f" {sys.executable}")[0]
    answer = subprocess.run(
        ["sh", "-c", f"CMAKE_ARGS=-DGGML_CUDA=on; {setting} env"], capture_output=True, text=True, check=True
    )
    [setting] = [line for line in answer.stdout.splitlines() if line.startswith("CMAKE_ARGS=")]
    include = "-DCMAKE_PROJECT_llama_cpp_INCLUDE=/home/my user/teachers/llama_cpp_build.cmake"
    assert shlex.split(setting.partition("=")[2]) == ["-DGGML_CUDA=on", include]


def test_no_place_to_remember(tmp_path: Path) -> None:
    """A cache folder that cannot be made: slow, not broken."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    code, found = examined(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert (
        code == 0
        and found["check kept"]["level"] == "slow"
        and "XDG_CACHE_HOME" in found["check kept"]["remedy"]
    )


def test_a_bad_teacher_is_the_users_mistake(tmp_path: Path) -> None:
    """A file that is no GGUF file is refused as everywhere."""
    (tmp_path / "x.gguf").write_bytes(b"no such thing")
    answer = subprocess.run(
        [sys.executable, "-m", "distill", "doctor", "--teacher", str(tmp_path / "x.gguf")],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert answer.returncode == 2 and "x.gguf" in answer.stderr and "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    ("features", "built", "level", "named"),
    [
        (AVX2, ["AVX", "AVX2", "REPACK"], "ok", ""),
        (
            AVX2 | {"avx512f", "avx512_vnni", "amx_int8"},
            ["AVX2", "AVX512", "AVX512_VNNI"],
            "slow",
            "AMX_INT8",
        ),
        (AVX2, ["AVX"], "slow", "AVX2"),
        (frozenset({"avx"}), ["AVX", "AVX2", "FMA"], "broken", "AVX2, FMA"),
        (frozenset(), ["AVX2"], "ok", ""),  # a system that does not tell its processor's features
    ],
)
def test_a_library_built_for_another_processor(
    features: frozenset[str], built: list[str], level: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a feature of the processor it is slow, with one that the processor lacks it dies."""
    monkeypatch.setattr(llama_library, "processor", lambda: Processor("pretended", features))
    monkeypatch.setattr(doctor, "ask_child", lambda code: ({"built_with": built, "devices": []}, ""))
    library = next(iter(doctor.library_findings()))
    assert library.level == level and named in library.text
    assert bool(library.remedy) == (level != "ok")


@pytest.mark.parametrize(
    ("cores", "features", "total", "free", "levels"),
    [
        (8, AVX2, 32, 16.0, ["ok", "ok"]),
        (1, AVX2, 32, 16.0, ["slow", "ok"]),
        (2, frozenset({"sse2"}), 32, 16.0, ["slow", "ok"]),
        (2, AVX2, 2, 1.5, ["ok", "slow"]),
        (2, AVX2, 2, 0.5, ["ok", "broken"]),
    ],
)
def test_small_machines(
    cores: int,
    features: frozenset[str],
    total: int,
    free: float,
    levels: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One core, no AVX, 2 GB: each a line of its own in the run too."""
    memory = SimpleNamespace(total=total << 30, available=int(free * 2**30))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine, "container_limits", lambda: [])
    monkeypatch.setattr(machine, "usable_cores", lambda: cores)
    monkeypatch.setattr(machine, "processor", lambda: Processor("pretended", features))
    assert [machine.processor_finding().level, machine.memory_finding().level] == levels
    machine.warn_of_machine(Console())
    assert capsys.readouterr().out.count("distill doctor") == sum(level != "ok" for level in levels)


def test_a_container_has_the_memory_that_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both versions of control groups, in the process's own group or at the root; files kept in memory are free."""
    groups = tmp_path / "groups"
    cases = {
        "0::/box\n": ("box/memory.max", "box/memory.current"),
        "0::/not/seen/from/inside\n": ("memory.max", "memory.current"),
        "3:cpu:/\n7:memory:/box\n": ("memory/box/memory.limit_in_bytes", "memory/box/memory.usage_in_bytes"),
    }
    for number, (lines, names) in enumerate(cases.items()):
        groups.write_text(lines, encoding="utf-8")
        root = tmp_path / str(number)
        assert machine.container_limits(groups, root) == []
        for name, value in zip(names, (3 << 30, 1 << 30), strict=True):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"{value}\n", encoding="ascii")
        assert machine.container_limits(groups, root) == [(3 << 30, 1 << 30)]
        stats = "anon 7\ninactive_file 24\n"
        (root / names[0]).with_name("memory.stat").write_text(stats, encoding="ascii")
        assert machine.container_limits(groups, root) == [(3 << 30, (1 << 30) - 24)]
        (root / names[0]).write_text("max\n", encoding="ascii")
        assert machine.container_limits(groups, root) == []
    monkeypatch.setattr(machine, "container_limits", lambda: [(3 << 30, 1 << 30)])
    facts = machine.memory_finding().facts
    assert facts["total_bytes"] <= 3 << 30 and facts["available_bytes"] <= 2 << 30


def test_the_first_lines_need_nothing_heavy() -> None:
    """The examiner comes at once, and asks PyTorch and llama.cpp in processes of their own."""
    code = (
        "import sys, distill.cli, distill.doctor as d; [*d.machine_findings(), *d.package_findings()]; "
        "print(*sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert not {"torch", "transformers", "llama_cpp"} & set(answer.stdout.split())
