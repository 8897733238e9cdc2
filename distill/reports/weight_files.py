"""Weights in a file, read tensor by tensor: safetensors, or GGUF of any model, dequantised.

The files are untrusted. Headers are checked before any value is read (safetensors by its own library, GGUF by
``teachers.gguf_file``), no pickle is read, and never more than one tensor is held.
"""

from __future__ import annotations

import json
import stat
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
from teachers.gguf_file import read_gguf

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SAFETENSORS, GGUF = "safetensors", "GGUF"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LONGEST_NAME = 512
WHOLE_GGUF = {GGMLQuantizationType[name] for name in ("I8", "I16", "I32", "I64")}


@dataclass(frozen=True)
class Stored:
    """A tensor that can be read: its shape, the type it is stored in, and ``read``, which gives its values.

    Values come in the type they are stored in where PyTorch computes with it, else in float32. A type of whole
    numbers (``whole``) is no weight by itself: packed values, a table, or a counter.
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


def holds_weights(path: Path) -> bool:
    """Whether the path is to be read as weights: a file, or a folder that has some and so is no run's."""
    return bool(_in_folder(path)) if path.is_dir() else path.exists()


@contextmanager
def open_weights(path: Path) -> Iterator[WeightFile]:
    """The weights at ``path``: a file, or a folder with ``model.safetensors`` (whole or in several files).

    Raises:
        UserError: nothing of that kind, empty, cut off, or damaged.
        TeacherFileError: the same of a GGUF file.
    """
    files = _in_folder(path) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} has no {WEIGHTS}; give a folder that has, or a .safetensors or .gguf file")
    for file in files:
        _require_file(file)
    if _is_gguf(files[0]):
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


def _in_folder(path: Path) -> list[Path]:
    """The files with a folder's weights."""
    if (path / WEIGHTS).exists():
        return [path / WEIGHTS]
    index = path / INDEX
    if not index.exists():
        return []
    _require_file(index)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is damaged ({error}); copy it again") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names {name!r}, which is no safetensors file beside it; copy it again")
    return [path / name for name in names]


def _require_file(path: Path) -> None:
    """Refuse what is not a plain file with something in it: a FIFO would make a reader wait for ever."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is not a regular file; give a .safetensors or .gguf file")
    if found.st_size == 0:
        raise UserError(f"{path} is empty; copy it again")
    if path.suffix.lower() in PICKLES:
        raise UserError(
            f"{path} may be a pickle, which runs code when it is read, so it is not; save the weights as .safetensors"
        )


def _is_gguf(path: Path) -> bool:
    """By its name; another file by its first bytes.

    Raises:
        UserError: it is no file of weights.
    """
    suffix = path.suffix.lower()
    if suffix in (".gguf", ".safetensors"):
        return suffix == ".gguf"
    with path.open("rb") as file:
        begin = file.read(9)
    if begin[:4] == b"GGUF":
        return True
    if begin[8:9] == b"{":  # safetensors: eight bytes of length, then JSON
        return False
    raise UserError(f"{path} is no file of weights that can be read; give a .safetensors or .gguf file")


def _open_gguf(path: Path) -> WeightFile:
    file = read_gguf(path, model=False)
    if not file.tensors:
        raise UserError(f"{path} has no tensor in it (a tokenizer alone?); give a model's file")
    found = []
    for name, info in file.tensors.items():
        if info.parameters == 0:
            raise UserError(f"{path} is damaged: tensor {name!r} has the shape {info.shape}")
        read = partial(_dequantised, file.tensor, name)
        found.append(Stored(_plain(name), info.shape, info.type.name, info.type in WHOLE_GGUF, read))
    architecture = file.value("general.architecture")
    return WeightFile(path, GGUF, file.size, architecture if isinstance(architecture, str) else None, found)


def _dequantised(read: Callable[[str], Any], name: str) -> Tensor:
    return torch.from_numpy(read(name))


def _open_safetensors(path: Path, stack: ExitStack) -> Iterator[Stored]:
    try:
        file = stack.enter_context(safe_open(path, framework="pt"))
        names = file.keys()
        parts = [(name, file.get_slice(name)) for name in names]
        described = [(name, tuple(part.get_shape()), str(part.get_dtype())) for name, part in parts]
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error}); copy it again") from None
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
    return "".join(sign if sign.isprintable() else "�" for sign in name[:LONGEST_NAME])
