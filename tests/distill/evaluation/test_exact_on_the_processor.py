"""What has to be exact leaves nothing to a GPU, in a build of llama.cpp that has two."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distill.evaluation import cost, greedy
from distill.evaluation.compare import evaluate_files
from distill.evaluation.inputs.request import Request, TextRequest
from distill.export.proof import expected_of, prove, prove_quantized
from distill.inference.chat import ChatSettings
from distill.inference.chat_screen import chat_with
from distill.inference.judge import Judge
from distill.runs.folder import HeldOut
from distill.runtime.progress import Console
from students.mapped_tensors import MappedTensors
from students.model.decoder import SO8TForCausalLM
from teachers.base import TokenizedLines
from tests.support.llama.recorded import recorded
from tests.support.runs import export, student_with_heads

pytestmark = [pytest.mark.needs_gguf, pytest.mark.usefixtures("llama_here")]
FREE = 24 * 10**9
HELD_OUT = HeldOut([np.arange(5, 20, dtype=np.int32)], TokenizedLines([], []))


def evaluated(file: Path, gpu_layers: int) -> None:
    """The student against itself on few tokens."""
    data = file.with_suffix(".txt")
    data.write_text("One line of text.\n\nAnother line, of more text.\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy, "NEW_TOKENS", 4)
        patch.setattr(cost, "SPEED_NEW_TOKENS", 4)
        patch.setattr(cost, "SPEED_PROMPT_TOKENS", 8)
        text = TextRequest(data, samples=2, max_length=24)
        teacher = shutil.copy(file, file.with_name("teacher.gguf"))
        evaluate_files(
            Request([file], Path(teacher), text, gpu_layers=gpu_layers), Console(stderr=True)
        )


def proved(file: Path, student: SO8TForCausalLM) -> None:
    """Both proofs: of the F32 file, and of one made of it."""
    with MappedTensors(file.parent) as kept:
        expected = expected_of(student, HELD_OUT.sequences, kept)
        _, found = prove(file, expected, HELD_OUT, kept)
        prove_quantized(file, "q8_0", found, HELD_OUT)


EXACT: dict[str, Callable[[Path, SO8TForCausalLM], object]] = {
    "proofs": proved,
    "judge": lambda file, student: Judge(file).judge(["Hello"]),
    "chat": lambda file, student: chat_with(
        file, "Hello", ChatSettings(max_new_tokens=4), safety=True
    ),
    "evaluate": lambda file, student: evaluated(file, 0),
}


def test_nothing_is_computed_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No weights, no cache, no product; TF32 or half precision would fail a proof by hours."""
    student = student_with_heads([0.4, 0.55], 0.5)
    file = export(student, tmp_path / "student.gguf")
    for name, call in EXACT.items():
        with recorded(FREE, FREE) as seen:
            call(file, student)
        assert seen.models and seen.contexts and not seen.opened, name
        for model in seen.models:
            assert (model.gpu_layers, model.devices, model.main_gpu) == (0, [], -1), name
            assert model.split_mode == 0, name
        assert not any(one.op_offload or one.offload_kqv for one in seen.contexts), name
    # So that the above is worth something: with layers on GPUs it would have been seen.
    with recorded(FREE, FREE) as seen:
        evaluated(file, -1)
    assert {tuple(model.devices) for model in seen.models} >= {(0, 1)} and seen.opened == {0, 1}
    assert any(one.op_offload and one.offload_kqv for one in seen.contexts)
