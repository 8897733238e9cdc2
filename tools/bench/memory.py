"""Peak memory of a capture from a teacher of the Phi-3.5-mini shape: 3.8 B random parameters in
Q4_0.

    python -m tools.bench.memory [TEACHER.gguf]

Without a file the teacher is made in a temporary folder (2.2 GB). Linux only: the peaks are the
kernel's.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.store.capture import fit_shared_codec
from teachers.targets.recipe import compact_recipe
from tools.models.random_teacher import PRESETS, write


def peak(process: int | str) -> int:
    """Most memory a process has had at once, in bytes, mapped file included."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("this system does not tell a process's peak memory")


def measure(path: Path, sequences: int, length: int) -> None:
    """Capture a few sequences and print the peaks."""
    before = peak("self")
    random = np.random.default_rng(0)
    begin = time.monotonic()
    with GGUFTeacher(path) as teacher:
        info = teacher.info
        data = [
            random.integers(300, info.vocab_size, length + 1).astype(np.int32)
            for _ in range(sequences)
        ]
        recipe = compact_recipe(16, info.vocab_size, info.width)
        bases = fit_shared_codec(teacher, data, recipe).bases
        fitted = time.monotonic()
        teacher.score(data, recipe, bases)
        seconds = time.monotonic() - fitted
        worker, size = peak(teacher.worker.process_id), path.stat().st_size
    table = Table("", "bytes", show_header=False)
    for name, value in (
        ("teacher's file", f"{size / 1e9:.2f} GB"),
        ("peak of the teacher's process", f"{worker / 1e9:.2f} GB"),
        ("beyond the file", f"{(worker - size) / 1e9:.2f} GB"),
        (
            "peak of the process that asks",
            f"{peak('self') / 1e9:.2f} GB ({before / 1e9:.2f} GB before)",
        ),
        ("fitting", f"{fitted - begin:.0f} s"),
        ("capture", f"{sequences * length / seconds:.1f} tokens/s"),
    ):
        table.add_row(name, value)
    Console().print(
        f"{info.name}: {info.parameters / 1e9:.2f} B parameters, {sequences} × {length} tokens",
        table,
    )


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", type=Path, nargs="?")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.teacher or Path(folder) / "phi.gguf"
        if options.teacher is None:
            write(path, PRESETS["phi-3.5-mini"], "q4_0", 0)
        measure(path, options.sequences, options.length)


if __name__ == "__main__":
    main()
