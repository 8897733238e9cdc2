"""How far rounding and wrong kernels are apart, in the measure that the self-check of llama.cpp
uses.

    python -m tools.bench.self_check TEACHER.gguf …

For each file: the mean KL of the first decode between two kinds of cache with plain kernels (the
noise that the bound is made of), the bound, the KL with extra buffers, and the KL of kernels that
leave out rows: the last 16 of every quantised matrix, or one in 32. Those are made by zeroing the
rows in a copy of the file.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from teachers.gguf.file import read_gguf
from teachers.llama_cpp.first_decode import (
    LONG,
    REFERENCE,
    Logits,
    allowed_kl,
    first_logits,
    mean_kl,
)
from teachers.llama_cpp.library.kernels import LoadOptions
from teachers.llama_cpp.worker_process import WorkerProcess

EXACT_TYPES = {"F32", "F16", "BF16"}


def decode(path: Path, way: LoadOptions, *, exact: bool = False) -> Logits:
    """The logits of the self-check's first decode."""
    process = WorkerProcess(path, way, threads=1)
    try:
        return first_logits(process, LONG, exact=exact)
    finally:
        process.close()


def without_rows(path: Path, target: Path, *, last: int = 0, one_in: int = 0) -> Path:
    """A copy of the file in which some rows of every quantised matrix of a layer are zero."""
    shutil.copyfile(path, target)
    with target.open("r+b") as file:
        for name, tensor in read_gguf(path).tensors.items():
            if (
                len(tensor.shape) != 2
                or tensor.type.name in EXACT_TYPES
                or not name.startswith("blk.")
            ):
                continue
            rows = tensor.shape[0]
            size = tensor.nbytes // rows
            for row in range(rows - last, rows) if last else range(0, rows, one_in):
                file.seek(tensor.offset + row * size)
                file.write(bytes(size))
    return target


def main() -> None:
    """Measure every file named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teachers", type=Path, nargs="+")
    options = parser.parse_args()
    table = Table(
        "file", "noise", "bound", "extra buffers", "last 16 rows left out", "one in 32 left out"
    )
    with tempfile.TemporaryDirectory() as folder:
        for path in options.teachers:
            plain, exact = decode(path, REFERENCE), decode(path, REFERENCE, exact=True)
            others = [decode(path, LoadOptions())]
            for rows in ({"last": 16}, {"one_in": 32}):
                copy = without_rows(path, Path(folder) / "copy.gguf", **rows)
                others.append(decode(copy, REFERENCE))
            figures = [
                mean_kl(plain, exact),
                allowed_kl(plain, exact),
                *(mean_kl(plain, row) for row in others),
            ]
            table.add_row(path.name, *(f"{figure:.2g}" for figure in figures))
    Console().print(table)


if __name__ == "__main__":
    main()
