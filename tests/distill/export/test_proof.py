"""What an F32 file may be off: float32's own rounding, measured where a model magnifies it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.errors import ProofFailed
from distill.export import proof
from distill.export.proof import expected_of, prove
from distill.runs.folder import HeldOut
from distill.runs.proof_record import Proof
from students.mapped_tensors import MappedTensors
from tests.support.training import fresh_student

SEQUENCES = [np.arange(3, 23, dtype=np.int32), np.arange(20, 40, dtype=np.int32)]


def test_rounding_is_measured(tmp_path: Path) -> None:
    """Next to nothing of an ordinary student; a thousand times that where logits are so large."""
    found = []
    for factor in (1.0, 1e3):
        student = fresh_student()
        with torch.no_grad():
            student.model.norm.weight.mul_(factor)
        with MappedTensors(tmp_path) as kept:
            expected = expected_of(student, SEQUENCES, kept)
            found.append(expected.rounding())
        assert next(student.parameters()).dtype == torch.float32
    assert 0.0 < found[0] < 1e-4 and 200 < found[1] / found[0] < 5000, found


@pytest.mark.parametrize(
    ("difference", "kl", "rounding", "message"),
    [
        (9e-4, 1e-9, 0.0, None),
        (1.1e-2, 1e-9, 0.0, "logits differ"),
        (1.1e-2, 1e-9, 2e-3, "logits differ"),
        (1.1e-2, 1e-9, 3e-3, None),
        (1.1e-2, 1e-5, 1.0, "logits differ"),
        (float("nan"), 1e-9, 1.0, "logits differ"),
    ],
)
def test_a_file_may_be_off_as_much_as_rounding_explains(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    difference: float,
    kl: float,
    rounding: float,
    message: str | None,
) -> None:
    """Four times what PyTorch's own is; not where the answers differ on average, and not NaN."""
    made = Proof("f32", 40, difference, kl, 1.0, 1, "PyTorch", 0.0, 0.0, 1.0)
    monkeypatch.setattr(proof, "_prove", lambda *_: made)
    with MappedTensors(tmp_path) as kept:
        expected = replace(expected_of(fresh_student(), SEQUENCES, kept), rounding=lambda: rounding)
        held_out = HeldOut(SEQUENCES, None)  # type: ignore[arg-type]
        if message is None:
            assert prove(tmp_path / "any.gguf", expected, held_out, kept)[0] is made
        else:
            with pytest.raises(ProofFailed, match=message):
                prove(tmp_path / "any.gguf", expected, held_out, kept)
