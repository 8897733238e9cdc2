"""Weights in a file, read tensor by tensor: safetensors, or GGUF of any model, dequantised.

The files are untrusted. Headers are checked before any value is read (safetensors by its own
library, GGUF by ``teachers.gguf.file``), no pickle is read, and never more than one tensor is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.errors import UserError
from distill.reports.inputs import files_of_weights, is_gguf
from distill.runtime.printable import printable_line
from teachers.gguf.file import read_gguf

SAFETENSORS, GGUF = "safetensors", "GGUF"
LONGEST_NAME = 512
WHOLE_GGUF = {GGMLQuantizationType[name] for name in ("I8", "I16", "I32", "I64")}


@dataclass(frozen=True)
class Stored:
    """A tensor that can be read: its shape, the type it is stored in, and ``read``, which gives its
    values.

    Values come in the type they are stored in where PyTorch computes with it, else in float32. A
    type of whole numbers (``whole``) is no weight by itself: packed values, a table, or a counter.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    whole: bool
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class WeightFile:
    """The tensors of one model, in the order they lie in; ``architecture``: as a GGUF names it."""

    path: Path
    format: str
    bytes: int
    architecture: str | None
    tensors: list[Stored]


@contextmanager
def open_weights(path: Path) -> Iterator[WeightFile]:
    """The weights at ``path``: a file, or a folder with ``model.safetensors`` (whole or in several
    files).

    Raises:
        UserError: nothing of that kind, empty, cut off, or damaged.
        TeacherFileError: the same of a GGUF file.
    """
    files = files_of_weights(path)
    if is_gguf(files[0]):
        yield _open_gguf(files[0])
        return
    with ExitStack() as stack:
        tensors = [one for file in files for one in _open_safetensors(file, stack)]
        if not tensors:
            raise UserError(f"{path} has no tensor in it; is it the right file?")
        size = sum(file.stat().st_size for file in files)
        yield WeightFile(path, SAFETENSORS, size, None, tensors)


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name, from the header alone.

    Raises:
        UserError, TeacherFileError: see ``open_weights``.
    """
    with open_weights(path) as file:
        return {one.name: one.shape for one in file.tensors}


def _open_gguf(path: Path) -> WeightFile:
    file = read_gguf(path, model=False)
    if not file.tensors:
        raise UserError(f"{path} has no tensor in it (a tokenizer alone?); give a model's file")
    result = []
    for name, info in file.tensors.items():
        if info.parameters == 0:
            raise UserError(f"{path} is damaged: tensor {name!r} has the shape {info.shape}")
        read = partial(_dequantised, file.tensor, name)
        result.append(
            Stored(_plain(name), info.shape, info.type.name, info.type in WHOLE_GGUF, read)
        )
    architecture = file.value("general.architecture")
    return WeightFile(
        path, GGUF, file.size, architecture if isinstance(architecture, str) else None, result
    )


def _dequantised(read: Callable[[str], Any], name: str) -> Tensor:
    return torch.from_numpy(read(name))


def _open_safetensors(path: Path, stack: ExitStack) -> Iterator[Stored]:
    try:
        file = stack.enter_context(safe_open(path, framework="pt"))
        names = file.keys()
        parts = [(name, file.get_slice(name)) for name in names]
        described = [(name, tuple(part.get_shape()), str(part.get_dtype())) for name, part in parts]
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged or no safetensors file ({error}); copy it again"
        ) from None
    for name, shape, kind in described:
        whole = kind.startswith(("I", "U")) or kind == "BOOL"
        yield Stored(_plain(name), shape, kind, whole, partial(_loaded, file, name, path))


def _loaded(file: Any, name: str, path: Path) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(name)
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: tensor {_plain(name)!r} cannot be read ({error})") from None
    return tensor if tensor.element_size() > 1 or not tensor.is_floating_point() else tensor.float()


def _plain(name: str) -> str:
    """A name that can be printed and written as UTF-8; much longer than any model's, it is cut."""
    return printable_line(name[:LONGEST_NAME])
