"""Whether llama.cpp's AMX kernels come out right of a compiler: seen in the machine code, on any
processor.

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xf
    llama_cpp_python-0.3.36.tar.gz python -m tools.checks.amx_build llama_cpp_python-0.3.36
    --compilers g++ clang++-19

``ldtilecfg`` reads 64 bytes: a palette, and from byte 16 on the columns and rows of each tile.
Where the compiler has dropped the stores of those, the first product faults. Needs cmake, ninja and
objdump.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

SETTINGS = (
    Path(__file__).resolve().parents[2] / "teachers" / "llama_cpp" / "library" / "build.cmake"
)
SOURCE = "amx/mmq.cpp"
FEATURES = [
    "SSE42",
    "AVX",
    "F16C",
    "FMA",
    "AVX2",
    "BMI2",
    "AVX512",
    "AVX512_VBMI",
    "AVX512_VNNI",
    "AVX512_BF16",
]
FEATURES += ["AMX_TILE", "AMX_INT8", "AMX_BF16"]
TILES_FROM, CONFIGURATION_BYTES = 16, 64
STORES_BEFORE = 40  # instructions that are looked at before the one that loads


def object_file(
    source: Path, compiler: str, settings: bool, folder: Path
) -> tuple[Path, list[str]]:
    """Compile the one file as a build for such a processor would; also which files' commands
    were changed."""
    options = [f"-DGGML_{name}=ON" for name in FEATURES]
    if settings:
        options.append(f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={SETTINGS}")
    run(
        [
            "cmake",
            "-S",
            source,
            "-B",
            folder,
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            "-DGGML_NATIVE=OFF",
            "-DLLAVA_BUILD=OFF",
            "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
            f"-DSKBUILD_PLATLIB_DIR={folder / 'unused'}",
            f"-DCMAKE_CXX_COMPILER={compiler}",
            *options,
        ]
    )
    commands = json.loads((folder / "compile_commands.json").read_text(encoding="utf-8"))
    [entry] = [entry for entry in commands if entry["file"].endswith(SOURCE)]
    subprocess.run(
        entry["command"], shell=True, cwd=entry["directory"], check=True, capture_output=True
    )
    changed = [
        Path(entry["file"]).name for entry in commands if "-fno-tree-dse" in entry["command"]
    ]
    output = re.search(r" -o (\S+)", entry["command"])
    assert output is not None, entry["command"]
    return Path(entry["directory"], output[1]), changed


def run(command: list[str | Path]) -> str:
    """What a command prints; it has to succeed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def tiles_are_stored(code: str) -> bool | None:
    """Whether disassembled ``code`` stores the tiles' shapes before it loads them; nothing where
    it never does."""
    lines = code.splitlines()
    for number, line in enumerate(lines):
        if load := re.search(r"ldtilecfg\s+(0x[0-9a-f]+)?\((%\w+)\)", line):
            start = int(load[1] or "0", 16)
            stores = re.findall(
                rf"\b\w*mov\w*\s+%\w+,(0x[0-9a-f]+)?\({load[2]}\)",
                "\n".join(lines[max(0, number - STORES_BEFORE) : number]),
            )
            within = [int(place or "0", 16) - start for place in stores]
            return any(TILES_FROM <= place < CONFIGURATION_BYTES for place in within)
    return None


def main() -> None:
    """Compile with each compiler, as the package does by itself and with this project's
    settings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder of llama-cpp-python's unpacked source")
    parser.add_argument("--compilers", nargs="+", default=["g++"])
    options = parser.parse_args()
    table = Table(
        "compiler", "this project's settings", "files compiled otherwise", "tile shapes stored"
    )
    words = {True: "yes", False: "NO: the first product faults", None: "no AMX in it"}
    with tempfile.TemporaryDirectory() as folder:
        for compiler in options.compilers:
            name = run([compiler, "--version"]).splitlines()[0]
            for settings in (False, True):
                place = Path(folder, f"{Path(compiler).name}-{settings}")
                file, changed = object_file(options.source.resolve(), compiler, settings, place)
                stored = tiles_are_stored(run(["objdump", "-d", file]))
                table.add_row(name, "yes" if settings else "no", ", ".join(changed), words[stored])
    Console().print(table)


if __name__ == "__main__":
    main()
