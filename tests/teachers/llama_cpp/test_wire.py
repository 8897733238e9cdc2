"""Frames between parent and worker: what is sent comes back, and a cut stream is the end."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from teachers.llama_cpp.wire import (
    MAX_HEADER_BYTES,
    pack_ragged,
    read_frame,
    unpack_ragged,
    write_frame,
)
from teachers.targets.distributions import Arrays


def frame_bytes(message: dict[str, Any], arrays: Arrays) -> bytes:
    """One frame as it goes over the pipe."""
    stream = io.BytesIO()
    write_frame(stream, message, arrays)
    return stream.getvalue()


def test_frames_round_trip() -> None:
    """Messages and arrays of any shape, type and memory order, one frame after another."""
    grid = np.arange(12, dtype=np.int64).reshape(3, 4)
    arrays: Arrays = {
        "transposed": grid.T,
        "ids": np.array([0, 65535], dtype=np.uint16),
        "none": np.empty((0, 5), dtype=np.float32),
        "scalar": np.array(2.5),
    }
    messages = [
        ({"text": "漢字 \n"}, arrays),
        ({}, {}),
        ({"deep": {"list": [1, None, 0.5]}}, {"x": grid}),
    ]
    stream = io.BytesIO(b"".join(frame_bytes(*message) for message in messages))
    for message, sent in messages:
        got, received = read_frame(stream)
        assert got == message and list(received) == list(sent)
        for name, array in sent.items():
            assert received[name].dtype == array.dtype and received[name].shape == array.shape
            assert np.array_equal(received[name], array)
    with pytest.raises(EOFError):
        read_frame(stream)


def test_a_truncated_stream_is_the_end() -> None:
    """Cut after any byte: EOFError, never a partial frame; so is a header of impossible length."""
    whole = frame_bytes({"kind": "x"}, {"a": np.arange(5, dtype=np.int32)})
    for kept in range(len(whole)):
        with pytest.raises(EOFError):
            read_frame(io.BytesIO(whole[:kept]))
    assert read_frame(io.BytesIO(whole))[0] == {"kind": "x"}
    with pytest.raises(EOFError, match="out of step"):
        read_frame(io.BytesIO((MAX_HEADER_BYTES + 1).to_bytes(4, "little") + whole))


def test_ragged_sequences_round_trip() -> None:
    """Sequences of any lengths, empty ones too, come back apart as they were."""
    for lengths in ((), (3,), (2, 0, 4), (0,)):
        sequences = [np.arange(10 * n, 11 * n, dtype=np.int32) for n in lengths]
        back = unpack_ragged(pack_ragged(sequences, "rows"), "rows")
        assert [row.tolist() for row in back] == [row.tolist() for row in sequences], lengths
        assert all(row.dtype == np.int32 for row in back), lengths
