"""Tensors in a file without a name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from students.mapped_tensors import MappedTensors


def test_kept_tensors_are_what_they_were(tmp_path: Path) -> None:
    """Of any dtype and shape, also after the file is closed; a change stays in memory."""
    given = [
        torch.randn(7, 5),
        torch.randn(3).bfloat16(),
        torch.tensor(2.5, dtype=torch.float64),
        torch.randn(4, 6).T,
        torch.arange(5),
    ]
    with MappedTensors(tmp_path) as kept:
        found = [kept.keep(tensor) for tensor in given]
        found[0][0, 0] = 9.0
        again = kept.keep(given[0])
    for tensor, mapped in zip(given[1:], found[1:], strict=True):
        assert mapped.dtype == tensor.dtype and torch.equal(mapped, tensor)
    assert torch.equal(again, given[0]) and found[0][0, 0] == 9.0
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """Where the file cannot grow, the error says where it is."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal = pytest.importorskip("signal")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
        with MappedTensors(tmp_path) as kept, pytest.raises(OSError) as error:
            kept.keep(torch.zeros(1 << 16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.filename == str(tmp_path)
