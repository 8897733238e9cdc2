"""Read a GGUF header from an untrusted file, with every bound checked before anything trusts it.

``gguf.GGUFReader`` maps what the header claims and fails with bare numpy errors on truncated files
(and accepts overlapping tensors); llama.cpp may abort the process on others. So the header is
walked here first, each length compared with what is left of the file. Format: the GGUF
specification in the ggml repository.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import mmap
import stat
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from numpy.typing import NDArray

from teachers.gguf.kinds import why_no_teacher
from teachers.gguf.split import part_paths

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


class TeacherFileError(ValueError):
    """A teacher file that cannot be used; names the file, what is wrong, and what to do."""


@dataclass(frozen=True)
class Field:
    """One metadata entry as it stands in the file: its value and its GGUF type(s)."""

    value: Any
    type: GGUFValueType
    element_type: GGUFValueType | None = None


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: ``shape`` in numpy order (rows first), absolute byte ``offset`` in the
    file at ``path``."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int
    path: Path

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GGUFFile:
    """A checked GGUF header: metadata fields and tensor table of the file at ``path``.

    Of a split model: the first part's path and fields, all parts' bytes and tensors; ``parts``.
    """

    path: Path
    size: int
    fields: dict[str, Field]
    tensors: dict[str, TensorInfo]
    parts: tuple[Path, ...] = ()

    @property
    def architecture(self) -> str:
        """The model architecture (``general.architecture``)."""
        return str(self.fields["general.architecture"].value)

    @property
    def parameters(self) -> int:
        """Number of elements over all tensors."""
        return sum(tensor.parameters for tensor in self.tensors.values())

    @property
    def sha256(self) -> str:
        """SHA-256 of the file's bytes, as hex; of a split model, over those of all its parts."""
        digests = [file_sha256(path) for path in self.parts or (self.path,)]
        joined = hashlib.sha256(" ".join(digests).encode()).hexdigest()
        return joined if self.parts else digests[0]

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key, or ``default`` where the file has none."""
        field = self.fields.get(key)
        return default if field is None else field.value

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Read one tensor and dequantize it to float32, in numpy order."""
        return self.rows(name, 0, self.tensors[name].shape[0])

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start`` to ``stop`` of one tensor, dequantized; no others are read.

        Raises:
            TeacherFileError: the gguf package cannot dequantize this type.
        """
        info = self.tensors[name]
        raw = np.memmap(info.path, np.uint8, "r", offset=info.offset, shape=(info.nbytes,))
        rows = info.shape[0] if len(info.shape) > 1 else 1
        wanted = raw.reshape(rows, -1)
        if len(info.shape) > 1:
            wanted = wanted[start:stop]
        try:
            values = np.require(dequantize(wanted, info.type), np.float32, "W")  # PyTorch writes
        except NotImplementedError:
            raise TeacherFileError(
                f"{self.path}: tensor {name!r} of type {info.type.name} cannot be dequantized; "
                "update the gguf package or convert the file to another quantization"
            ) from None
        if len(info.shape) > 1:
            return values.reshape(-1, *info.shape[1:])
        return values.reshape(-1)[start:stop]


def require_regular_file(path: Path, remedy: str = "give the path of a .gguf file") -> None:
    """Refuse anything but a readable plain file (on a FIFO llama.cpp would wait for ever).

    ``remedy``: what to do where there is none.

    Raises:
        TeacherFileError: missing, a directory, a FIFO, a device, or unreadable.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise TeacherFileError(f"{path} does not exist; {remedy}") from None
    except OSError as error:
        raise TeacherFileError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise TeacherFileError(f"{path} is {kind}; give the path of a .gguf file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise TeacherFileError(
            f"{path} cannot be read: {error.strerror}; check its permissions"
        ) from None


class _Cursor:
    """Reads little-endian values from a buffer and refuses to run past its end."""

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self.buffer = buffer
        self.size = len(buffer)
        self.path = path
        self.at = 0

    def take(self, count: int, what: str) -> bytes:
        if count < 0 or count > self.size - self.at:
            raise TeacherFileError(
                f"{self.path} is truncated or damaged: {what} needs {count} bytes at offset "
                f"{self.at} of a {self.size}-byte file; download or copy it again"
            )
        start, self.at = self.at, self.at + count
        return self.buffer[start : self.at]

    def scalar(self, kind: GGUFValueType, what: str) -> Any:
        code = _SCALARS[kind]
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def string(self, what: str) -> str:
        raw = self.take(self.scalar(GGUFValueType.UINT64, what), what)
        return raw.decode("utf-8", errors="surrogateescape")

    def value_type(self, what: str) -> GGUFValueType:
        number = self.scalar(GGUFValueType.UINT32, what)
        try:
            return GGUFValueType(number)
        except ValueError:
            raise TeacherFileError(
                f"{self.path} is damaged: {what} has unknown value type {number}"
            ) from None

    def field(self, what: str) -> Field:
        kind = self.value_type(what)
        if kind == GGUFValueType.STRING:
            return Field(self.string(what), kind)
        if kind != GGUFValueType.ARRAY:
            return Field(self.scalar(kind, what), kind)
        element, count = self.value_type(what), self.scalar(GGUFValueType.UINT64, what)
        if element == GGUFValueType.STRING:
            self._plausible(count, 8, what)
            return Field([self.string(what) for _ in range(count)], kind, element)
        if element == GGUFValueType.ARRAY:
            raise TeacherFileError(
                f"{self.path}: {what} is an array of arrays, which no model uses"
            )
        code = _SCALARS[element]
        self._plausible(count, struct.calcsize(code), what)
        raw = self.take(count * struct.calcsize(code), what)
        return Field(np.frombuffer(raw, dtype=np.dtype(code)).tolist(), kind, element)

    def _plausible(self, count: int, width: int, what: str) -> None:
        if count * width > self.size - self.at:
            raise TeacherFileError(
                f"{self.path} is truncated or damaged: {what} claims {count} entries, more than "
                "the rest of the file can hold; download or copy it again"
            )


def read_gguf(path: Path, *, model: bool = True) -> GGUFFile:
    """Read and check the header of the GGUF file at ``path``; no tensor data is touched.

    Of a split model any part may be named; all are read. With ``model=False`` a file that is no
    causal language model, such as a tokenizer alone, is accepted too.

    Raises:
        TeacherFileError: not a GGUF file, truncated, damaged, of an unsupported version, a part
            without the others, or no causal language model.
    """
    require_regular_file(path)
    file = _read_file(path)
    if file.value("split.count", 1) != 1:
        file = _joined(file)
    values = {key: field.value for key, field in file.fields.items()}
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    if model and (reason := why_no_teacher(values, shapes)):
        raise TeacherFileError(f"{file.path} {reason}")
    return file


def _read_file(path: Path) -> GGUFFile:
    """The header of one file."""
    size = path.stat().st_size
    if size < 24:
        raise TeacherFileError(f"{path} is not a GGUF file: it has only {size} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        cursor = _Cursor(buffer, path)
        if (magic := cursor.take(4, "magic")) != MAGIC:
            raise TeacherFileError(
                f"{path} is not a GGUF file: it begins with {magic!r} instead of {MAGIC!r}"
            )
        version = cursor.scalar(GGUFValueType.UINT32, "version")
        if version not in SUPPORTED_VERSIONS:
            raise TeacherFileError(
                f"{path} has GGUF version {version}; supported are {SUPPORTED_VERSIONS} "
                "(little-endian); convert it again with a current llama.cpp"
            )
        tensor_count = cursor.scalar(GGUFValueType.UINT64, "tensor count")
        fields = _read_fields(cursor, cursor.scalar(GGUFValueType.UINT64, "metadata count"))
        return GGUFFile(path, size, fields, _read_tensors(cursor, tensor_count, fields))


def _joined(named: GGUFFile) -> GGUFFile:
    """The split model of which ``named`` is a part."""
    paths = part_paths(named.path)
    count, total = named.value("split.count"), named.value("split.tensors.count")
    if len(paths) != count:
        raise TeacherFileError(
            f"{named.path} is a part of {count!r} by its metadata, not by its name; name the parts "
            "model-00001-of-0000N.gguf and so on, as they were written"
        )
    files: list[GGUFFile] = []
    tensors: dict[str, TensorInfo] = {}
    for number, path in enumerate(paths):
        require_regular_file(path, f"put part {number + 1} of {count} beside the others")
        files.append(named if path == named.path else _read_file(path))
        fields, own = files[0].fields, files[-1]
        stated = {key: field.value for key, field in fields.items() if key in own.fields}
        stated |= {"split.no": number, "split.count": count, "split.tensors.count": total}
        wrong = [f"its {key} differs" for key, value in stated.items() if own.value(key) != value]
        wrong += [f"tensor {name!r} is in two" for name in own.tensors.keys() & tensors.keys()]
        if wrong:
            raise TeacherFileError(
                f"{path} does not belong to the other parts of this model, as part {number + 1} of "
                f"{count}: {wrong[0]}; download all parts again"
            )
        tensors |= own.tensors
    if len(tensors) != total:
        raise TeacherFileError(
            f"{paths[0]} and its other parts hold {len(tensors)} tensors instead of {total!r}; "
            "download all parts again"
        )
    size = sum(file.size for file in files)
    return GGUFFile(paths[0], size, files[0].fields, tensors, tuple(paths))


def _read_fields(cursor: _Cursor, count: int) -> dict[str, Field]:
    fields: dict[str, Field] = {}
    for number in range(count):
        key = cursor.string(f"name of metadata entry {number}")
        if key in fields:
            raise TeacherFileError(f"{cursor.path} is damaged: metadata key {key!r} occurs twice")
        fields[key] = cursor.field(f"metadata {key!r}")
    return fields


def _read_tensors(cursor: _Cursor, count: int, fields: dict[str, Field]) -> dict[str, TensorInfo]:
    """The tensor table; offsets become absolute once its end, where data starts, is known."""
    listed = [_read_tensor(cursor, number) for number in range(count)]
    alignment = DEFAULT_ALIGNMENT
    if "general.alignment" in fields:
        alignment = fields["general.alignment"].value
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise TeacherFileError(f"{cursor.path} is damaged: general.alignment is {alignment!r}")
    base = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for relative in listed:
        info = replace(relative, offset=base + relative.offset)
        end, name = info.offset + info.nbytes, info.name
        if end > cursor.size:
            raise TeacherFileError(
                f"{cursor.path} is truncated: tensor {name!r} ends at byte {end}, the file has "
                f"{cursor.size}; download or copy it again"
            )
        if name in tensors:
            raise TeacherFileError(f"{cursor.path} is damaged: tensor {name!r} occurs twice")
        tensors[name] = info
    placed = sorted(tensors.values(), key=lambda tensor: tensor.offset)
    for before, after in itertools.pairwise(placed):
        if before.offset + before.nbytes > after.offset:
            raise TeacherFileError(
                f"{cursor.path} is damaged: tensors {before.name!r} and {after.name!r} overlap"
            )
    return tensors


def _read_tensor(cursor: _Cursor, number: int) -> TensorInfo:
    """One entry of the tensor table, its offset relative to the data's start."""
    name = cursor.string(f"name of tensor {number}")
    what = f"tensor {name!r}"
    dimensions = cursor.scalar(GGUFValueType.UINT32, what)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise TeacherFileError(f"{cursor.path} is damaged: {what} has {dimensions} dimensions")
    shape = tuple(cursor.scalar(GGUFValueType.UINT64, what) for _ in range(dimensions))[::-1]
    type_number = cursor.scalar(GGUFValueType.UINT32, what)
    try:
        kind = GGMLQuantizationType(type_number)
    except ValueError:
        raise TeacherFileError(
            f"{cursor.path}: {what} has unknown type {type_number}; update the gguf package"
        ) from None
    offset = cursor.scalar(GGUFValueType.UINT64, what)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise TeacherFileError(
            f"{cursor.path} is damaged: {what} has rows of {shape[-1]}, not a multiple of the "
            f"{kind.name} block of {block}"
        )
    size = math.prod(shape) // block * block_bytes
    return TensorInfo(name, shape, kind, offset, size, cursor.path)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex; an unchanged file is read once per process."""
    status = path.stat()
    return _file_sha256(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=128)  # a split model has many files
def _file_sha256(path: Path, size: int, modified: int) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tokenizer_fields(model: GGUFFile) -> dict[str, Field]:
    """The metadata of tokenizer and chat template: every ``tokenizer.*`` key, unchanged."""
    return {key: field for key, field in model.fields.items() if key.startswith("tokenizer.")}


def tokenizer_sha256(model: GGUFFile) -> str:
    """Digest of the tokenizer metadata: equal exactly where two files tokenize alike."""
    digest = hashlib.sha256()
    for key, field in sorted(tokenizer_fields(model).items()):
        text = repr((key, int(field.type), field.value))
        digest.update(text.encode("utf-8", errors="surrogateescape"))
    return digest.hexdigest()
