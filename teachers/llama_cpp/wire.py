"""Frames between parent and worker: a JSON header and raw arrays, no pickle.

A frame is a little-endian uint32 length, that many bytes of JSON, then the bytes of each array the
header lists, in order.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.generic]]
MAX_HEADER_BYTES = 64 << 20


def write_frame(stream: BinaryIO, message: dict[str, Any], arrays: Arrays | None = None) -> None:
    """Write one frame and flush it."""
    arrays = arrays or {}
    listed = [
        {"name": name, "dtype": array.dtype.str, "shape": list(array.shape)}
        for name, array in arrays.items()
    ]
    header = json.dumps({"message": message, "arrays": listed}).encode()
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(f"a message of {len(header)} bytes is more than {MAX_HEADER_BYTES}")
    stream.write(struct.pack("<I", len(header)) + header)
    for array in arrays.values():
        stream.write(np.ascontiguousarray(array).data)
    stream.flush()


def read_frame(stream: BinaryIO) -> tuple[dict[str, Any], Arrays]:
    """Read one frame.

    Raises:
        EOFError: the other side closed the stream, in between frames or within one.
    """
    (length,) = struct.unpack("<I", _read_exactly(stream, 4))
    if length > MAX_HEADER_BYTES:
        raise EOFError(f"frame header of {length} bytes: the stream is out of step")
    header = json.loads(_read_exactly(stream, length))
    arrays: Arrays = {}
    for entry in header["arrays"]:
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        raw = _read_exactly(stream, dtype.itemsize * int(np.prod(shape, dtype=np.int64)))
        arrays[entry["name"]] = np.frombuffer(raw, dtype=dtype).reshape(shape)
    return header["message"], arrays


def _read_exactly(stream: BinaryIO, count: int) -> bytearray:
    data = bytearray(count)
    view, got = memoryview(data), 0
    while got < count:
        read = stream.readinto(view[got:])  # type: ignore[attr-defined]
        if not read:
            raise EOFError("the stream ended")
        got += read
    return data


def pack_ragged(sequences: Sequence[NDArray[np.int32]], name: str) -> Arrays:
    """Sequences of different lengths as one flat array and their lengths."""
    flat = np.concatenate(sequences) if sequences else np.empty(0, dtype=np.int32)
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    return {name: flat.astype(np.int32), f"{name}_lengths": lengths}


def unpack_ragged(arrays: Arrays, name: str) -> list[NDArray[np.int32]]:
    """The inverse of ``pack_ragged``."""
    lengths = arrays[f"{name}_lengths"].astype(np.int64)
    return np.split(arrays[name].astype(np.int32), np.cumsum(lengths)[:-1]) if len(lengths) else []
