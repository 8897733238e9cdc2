"""Fixtures: a tiny GGUF teacher made on the spot, the example teacher, and the shared real ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from distill.exporting import tokenizer_entries
from students.builder import StudentSize, build_student, student_config
from students.export import ExportNames, write_gguf
from students.model import SO8TForCausalLM
from teachers import example_teacher
from teachers.gguf_file import read_gguf
from teachers.gguf_teacher import GGUFTeacher

SHARED = Path(__file__).parent.parent.parent / "shared"


def shared_file(name: str) -> Path:
    """A file of the shared folder beside the project; skips the test where there is none."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name} from the shared folder beside the project, which is not here")
    return path


def make_student(width: int = 32, layers: int = 2, vocab_size: int = 96, seed: int = 0) -> SO8TForCausalLM:
    """A small student with lively weights, so that differences between computations show."""
    config = student_config(
        StudentSize(width, layers), vocab_size=vocab_size, context_length=256, bos=0, eos=1
    )
    student = build_student(config, seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "gate." in name:
                parameter.normal_(generator=generator)
            elif parameter.ndim == 2:
                parameter.mul_(4.0)
    return student


@pytest.fixture(scope="session")
def tiny_teacher_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 64×2 GGUF model with random weights and the example teacher's tokenizer and chat template."""
    example = read_gguf(example_teacher())
    vocab_size = len(example.value("tokenizer.ggml.tokens"))
    student = make_student(64, 2, vocab_size)
    path = tmp_path_factory.mktemp("teacher") / "tiny.gguf"
    write_gguf(student, path, "f32", tokenizer_entries(example), ExportNames("tiny", {}))
    return path


@pytest.fixture(scope="session")
def tiny_teacher(tiny_teacher_path: Path):
    """The tiny teacher, loaded once for all tests."""
    with GGUFTeacher(tiny_teacher_path, threads=1) as teacher:
        yield teacher
