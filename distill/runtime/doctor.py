"""``distill doctor``: whether this machine does the main job, and what to do if not.

Each check is a function that yields findings. What may end a process (llama.cpp, PyTorch on a
processor it was not built for) runs in a child, and nothing heavy is imported here, so that the
first lines come at once.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.runtime.format import human_bytes
from distill.runtime.machine_checks import (
    Finding,
    disk_finding,
    memory_finding,
    processor_finding,
    usable_cores,
)
from teachers import example_teacher
from teachers.errors import LibraryError, TeacherError, WorkerDefect, WorkerDied, ending
from teachers.llama_cpp.library.build import (
    PACKAGE,
    foreign_features,
    library_folder,
    library_version,
    unused_features,
)

if TYPE_CHECKING:
    from teachers.llama_cpp.library.check_record import CheckRecord


PROJECT = "so8t-distill"
CHILD_SECONDS = 180.0
SPEED_PROMPT, SPEED_NEW = 128, 64  # tokens read and written to measure the speed
_LIBRARY = """
from teachers.llama_cpp.library.ggml import describe_library
print(json.dumps(describe_library()))
"""
_PYTORCH = """
import torch
from contextlib import suppress
from distill.runtime.faster_precision import GAIN, MOST_WIDTH, measured_gain, remember
gain = measured_gain(MOST_WIDTH)
with suppress(OSError):
    remember(MOST_WIDTH, gain)
gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
mps = torch.backends.mps.is_available()
print(json.dumps({
    "version": torch.__version__,
    "capability": torch.backends.cpu.get_cpu_capability(),
    "threads": torch.get_num_threads(),
    "bfloat16_gain": gain,
    "precision": "bfloat16" if gain >= GAIN else "float32",
    "width": MOST_WIDTH,
    "sum": float(torch.ones(8, 8).matmul(torch.ones(8, 8)).sum()),
    "gpus": [{"name": gpu.name, "total_bytes": gpu.total_memory} for gpu in gpus]
    + [{"name": "Apple GPU (MPS)", "total_bytes": 0}] * mps,
}))
"""


def examine(teacher: Path, gpu_layers: int = 0) -> Iterator[Finding]:
    """Every finding, as it is made; llama.cpp is tried with ``teacher``, a GGUF file.

    Raises:
        TeacherFileError: ``teacher`` is no GGUF file.
    """
    checks: list[Callable[[], Iterator[Finding]]] = [
        machine_findings,
        package_findings,
        library_findings,
        lambda: self_check_findings(teacher, gpu_layers),
        pytorch_findings,
    ]
    for check in checks:
        try:
            yield from check()
        except ImportError as error:
            yield Finding("packages", "broken", f"{error.name} is not installed", _install_again())


def machine_findings() -> Iterator[Finding]:
    """Processor, memory and disk."""
    yield processor_finding()
    yield memory_finding()
    yield disk_finding()


def package_findings() -> Iterator[Finding]:
    """Python and the packages that the project needs."""
    try:
        needed = [line for line in requires(PROJECT) or [] if "extra ==" not in line]
    except PackageNotFoundError:
        yield Finding("packages", "broken", f"{PROJECT} itself is not installed", _install_again())
        return
    versions: dict[str, str] = {}
    missing = []
    for line in needed:
        name = re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0]
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            missing.append(name)
    shown = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "transformers", "gguf") if name in versions
    )
    text = f"Python {platform.python_version()}; {shown}; {len(versions)} of {len(needed)} there"
    facts = {"python": platform.python_version(), "versions": versions, "missing": missing}
    if missing:
        yield Finding(
            "packages", "broken", f"{text}; missing: {', '.join(missing)}", _install_again(), facts
        )
    else:
        yield Finding("packages", "ok", text, "", facts)


def library_findings() -> Iterator[Finding]:
    """What llama.cpp was built with and for, and the GPUs that it sees."""
    name = f"{PACKAGE} {library_version() or 'is not installed'}"
    if library_folder() is None:
        yield Finding("llama.cpp", "broken", name, rebuild_command())
        return
    facts, problem = ask_child(_LIBRARY)
    if facts is None:
        yield Finding(
            "llama.cpp", "broken", f"{name} cannot be loaded: {problem}", rebuild_command()
        )
        return
    built = facts["built_with"]
    facts["version"] = library_version()
    text = f"{name}, built with {', '.join(built) or 'no features of the processor'}"
    if foreign := foreign_features(built):
        text += f"; this processor has no {', '.join(foreign)}"
        yield Finding("llama.cpp", "broken", text, rebuild_command(), facts)
    elif unused := unused_features(built):
        text += f"; not for this processor's {', '.join(unused)}"
        if "AMX_INT8" in unused:
            text += " (which takes GCC, or a Clang newer than 14)"
        yield Finding("llama.cpp", "slow", text, rebuild_command(), facts)
    else:
        yield Finding("llama.cpp", "ok", text, "", facts)
    yield _gpus("GPUs of llama.cpp", facts["devices"], "gpu_layers stays 0")


def self_check_findings(teacher: Path, gpu_layers: int) -> Iterator[Finding]:
    """The first decode with and without extra buffers, checked anew, and the speed.

    Raises:
        TeacherFileError, TeacherError: the file is at fault, or ``gpu_layers`` are too many.
    """
    import psutil

    from teachers.gguf.file import read_gguf
    from teachers.llama_cpp.library.check_record import change_record, read_record, record_path
    from teachers.llama_cpp.library.kernels import LoadOptions
    from teachers.llama_cpp.worker import Worker

    before = read_record()
    threads = min(psutil.cpu_count(logical=False) or 1, usable_cores())
    file = read_gguf(teacher)
    types = frozenset(tensor.type.name for tensor in file.tensors.values())
    try:
        options = LoadOptions(gpu_layers)
        worker = Worker(file.path, threads=threads, options=options, file=file, anew=True)
        try:
            extra_buffers = worker.options().extra_buffers
            message = {"prompt_tokens": SPEED_PROMPT, "new_tokens": SPEED_NEW}
            speed = worker.ask("speed", message)[0]
        finally:
            worker.close()
    except (LibraryError, WorkerDefect) as error:
        text = str(error).partition(" `distill doctor`")[0].rstrip(".")
        yield Finding("self-check", "broken", text, rebuild_command())
        return
    except TeacherError as error:
        if teacher != example_teacher() and not isinstance(error, WorkerDied):
            raise
        yield Finding("self-check", "broken", str(error), rebuild_command())
        return
    yield _verdict(before, types, file.size, extra_buffers=extra_buffers)
    if problem := _problem_of(lambda: change_record(lambda record: record)):
        remedy = "set XDG_CACHE_HOME to a folder that can be written to"
        yield Finding("check kept", "slow", f"it is made again at every start: {problem}", remedy)
    else:
        yield Finding("check kept", "ok", f"in {record_path()}", "", {"path": str(record_path())})
    text = (
        f"{teacher.name}: reads {speed['prompt']:,.0f} tokens/s, writes {speed['generation']:,.0f}"
    )
    yield Finding("speed", "ok", text, "", dict(speed))


def _verdict(
    before: CheckRecord, types: frozenset[str], size: int, *, extra_buffers: bool
) -> Finding:
    """The self-check's result compared with ``before``; a remembered fault that is gone is
    forgotten."""
    from teachers.llama_cpp.library.check_record import (
        CheckRecord,
        change_record,
        read_record,
        record_path,
    )

    record = read_record()
    facts = {
        "extra_buffers": extra_buffers,
        "reason": record.reason,
        "compared": sorted(record.verified),
    }
    if not extra_buffers:
        text = f"right without llama.cpp's extra CPU buffers; with them it {record.reason}"
        return Finding("self-check", "slow", text, rebuild_command(), facts)
    compared = f"results as without extra buffers: {', '.join(sorted(record.verified))}"
    if not before.reason:
        return Finding("self-check", "ok", f"the first decode works; {compared}", "", facts)
    fault = f"on {before.time[:10]} llama.cpp {before.reason}, with {_file_of(before.failed)}"
    if not before.failed <= types or size < before.from_bytes:
        text = f"{_file_of(types)} works; but {fault}, and such files run without extra buffers"
        remedy = f"try that file again with --teacher, or {rebuild_command()}"
        return Finding("self-check", "slow", text, remedy, facts)
    if problem := _problem_of(lambda: change_record(CheckRecord.without_fault)):
        text = f"works now, but that cannot be remembered ({problem}), so runs stay slow: {fault}"
        return Finding("self-check", "slow", text, f"delete {record_path()}", facts)
    text = f"works now, and what was is forgotten: {fault}; {compared}"
    return Finding("self-check", "ok", text, "", facts)


def _file_of(types: frozenset[str]) -> str:
    """A file by the kinds of its tensors."""
    return f"a file of {', '.join(sorted(types))}"


def _problem_of(action: Callable[[], None]) -> str:
    """Why something about the record could not be written, in words, or nothing."""
    try:
        action()
    except OSError as error:
        return str(error)
    return ""


def pytorch_findings() -> Iterator[Finding]:
    """Whether PyTorch computes here, and the GPUs that it sees."""
    facts, problem = ask_child(_PYTORCH)
    if facts is None:
        remedy = (
            f"install it again: {_pip()} install --force-reinstall --constraint "
            "constraints.txt torch"
        )
        yield Finding("PyTorch", "broken", f"it does not run here: {problem}", remedy)
        return
    text = (
        f"{facts['version']}, {facts['capability']}, {facts['threads']} threads; on the processor "
        f"students {facts['width']} wide train in {facts['precision']} (bfloat16 is "
        f"{facts['bfloat16_gain']:.2g} times as fast)"
    )
    if facts["capability"] in ("DEFAULT", "NO AVX"):
        remedy = "training uses no vector instructions of this processor"
        yield Finding("PyTorch", "slow", text, remedy, facts)
    else:
        yield Finding("PyTorch", "ok", text, "", facts)
    yield _gpus("GPUs of PyTorch", facts["gpus"], "students train on the processor")


def _gpus(name: str, devices: list[dict[str, Any]], none: str) -> Finding:
    """A line about the GPUs of a library; none is no fault."""
    shown = [f"{gpu['name']}, {human_bytes(gpu['total_bytes'])}" for gpu in devices]
    return Finding(name, "ok", "; ".join(shown) or f"none: {none}", "", {"devices": devices})


def ask_child(code: str) -> tuple[dict[str, Any] | None, str]:
    """What a process that runs ``code`` prints as JSON last, or nothing and why."""
    child = f"import json, sys\nsys.path[:] = json.loads(sys.argv[1])\n{code}"
    command = [sys.executable, "-c", child, json.dumps(sys.path)]
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=CHILD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {CHILD_SECONDS:.0f} s"
    except OSError as error:
        return None, f"no process can be started: {error}"
    if answer.returncode != 0 or not answer.stdout.strip():
        last = [line.strip() for line in answer.stderr.splitlines() if line.strip()][-1:]
        return None, "; ".join([ending(answer.returncode), *last])
    facts: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return facts, ""


def _pip() -> str:
    """The command that is this environment's pip."""
    return f"{shlex.quote(sys.executable)} -m pip"


def _install_again() -> str:
    return (
        f"in the project's folder: {_build_setting()} {_pip()} install --constraint "
        "constraints.txt --editable ."
    )


def _build_setting() -> str:
    """The CMAKE_ARGS that compile llama.cpp for this machine, in the system shell's syntax."""
    build = Path(__file__).parents[2] / "teachers" / "llama_cpp" / "library" / "build.cmake"
    setting = f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={build}"
    if sys.platform == "win32":
        return f'set "CMAKE_ARGS=%CMAKE_ARGS% {setting}" &&'
    return f'CMAKE_ARGS="$CMAKE_ARGS {shlex.quote(setting)}"'


def rebuild_command() -> str:
    """The command that compiles llama.cpp again, for one that does not suit this machine."""
    if other := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return f"unset LLAMA_CPP_LIB_PATH, which is {other}"
    if (pinned := library_version()) is None:
        return _install_again()
    options = f"--force-reinstall --no-deps --no-cache-dir --no-binary {PACKAGE}"
    return f"compile it again: {_build_setting()} {_pip()} install {options} {PACKAGE}=={pinned}"
