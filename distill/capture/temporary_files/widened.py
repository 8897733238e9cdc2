"""A quantised teacher's weights written out as floating point, for llama.cpp to compute with.

llama.cpp's kernels for some quantised types do about half as many products in a second as those for
floating point on a processor without AMX (docs/machines.md). The weights are the same numbers
either way; what differs is that llama.cpp rounds activations to 8 bits for quantised weights, and
to the copy's type for these.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
from gguf import GGML_QUANT_SIZES

from distill.errors import UserError
from distill.runtime.format import human_bytes
from students.gguf.metadata import ExportError
from students.gguf.quantize import quantize_gguf
from teachers.base import Teacher, Tokens
from teachers.errors import TeacherError
from teachers.gguf.file import GGUFFile
from teachers.targets.recipe import Recipe

BYTES = {"f16": 2, "bf16": 2, "f32": 4}
MOST_OF_MEMORY, MOST_BYTES = 0.25, 4 << 30  # for a copy that nobody asked for
COMPARED_TOKENS, PIECE_TOKENS = 512, 256  # that file and copy are timed with, of a sequence
WARMING_TOKENS = 16


def copy_bytes(file: GGUFFile, kind: str) -> int:
    """About how large a copy is."""
    return BYTES[kind] * file.parameters


def is_quantised(file: GGUFFile) -> bool:
    """Whether there are blocks of numbers in it that share a scale."""
    return any(GGML_QUANT_SIZES[one.type][0] > 1 for one in file.tensors.values())


def is_cheap(file: GGUFFile) -> bool:
    """Whether a copy is small enough to be tried without being asked for."""
    size, memory = copy_bytes(file, "f16"), psutil.virtual_memory().available
    return is_quantised(file) and size < min(MOST_OF_MEMORY * memory, MOST_BYTES)


def scoring_speed(teacher: Teacher, sequences: Sequence[Tokens]) -> float:
    """Tokens a second at which the teacher scores the beginnings of some of these together, as a
    capture does."""
    pieces = [one[:PIECE_TOKENS] for one in sequences]
    count = 1 + int((np.cumsum([len(one) for one in pieces]) < COMPARED_TOKENS).sum())
    some, recipe = pieces[:count], Recipe("compact", 16, 0)
    teacher.score([some[0][:WARMING_TOKENS]], recipe, {})  # the first decode sets things up
    start = time.perf_counter()
    teacher.score(some, recipe, {})
    return sum(map(len, some)) / (time.perf_counter() - start)


def require_room(file: GGUFFile, kind: str, folder: Path) -> None:
    """Raise ``UserError`` unless a copy of the file is of use, and fits into memory and folder."""
    what = f"teacher.weights_as = {kind}"
    if not is_quantised(file):
        raise UserError(f"{what} is for quantised teachers; {file.path.name} is none: leave it out")
    size, memory = copy_bytes(file, kind), psutil.virtual_memory().available
    if size > memory:
        raise UserError(
            f"{what} takes about {human_bytes(size)} of memory, and {human_bytes(memory)} are "
            "free; leave it out"
        )
    if size > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"{what} takes about {human_bytes(size)} in {folder}, where {human_bytes(free)} are "
            "free; make room, or name another folder in TMPDIR"
        )


@contextmanager
def widened(file: GGUFFile, kind: str) -> Iterator[Path]:
    """A copy of a quantised file with its matrices as ``kind``, for as long as it is needed.

    Raises:
        UserError: it would be of no use, or does not fit. TeacherError: llama.cpp cannot write it.
        OSError: the disk refuses.
    """
    with TemporaryDirectory(prefix="distill-teacher-", ignore_cleanup_errors=True) as folder:
        require_room(file, kind, Path(folder))
        path = Path(folder) / f"{file.path.stem}-{kind}.gguf"
        try:
            quantize_gguf(file.path, path, kind, requantize=True)
        except ExportError as error:
            raise TeacherError(str(error)) from None
        yield path
