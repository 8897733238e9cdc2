"""Real teachers from the shared folder, if there: tokenizers survive export, whole runs work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.capture.temporary_files.tokenizer_only import tokenizer_entries
from distill.config.loading import load_config
from distill.export.export import Export, export_proved
from distill.pipeline.run import run
from distill.runs.folder import HeldOut, RunPaths
from distill.runtime.progress import Console
from students.gguf.metadata import ExportNames
from students.model.build import build_student, student_config
from students.model.shape import parse_size
from teachers.base import TokenizedLines
from teachers.llama_cpp.teacher import GGUFTeacher
from tests.support.runs import FEW_PROMPTS
from tests.support.teachers import shared_file

pytestmark = pytest.mark.usefixtures("llama_here")


@pytest.mark.parametrize("name", ["wikiphi-q8_0", "stories260K", "stories260K-q8_0"])
def test_every_line_keeps_its_ids(tmp_path: Path, name: str) -> None:
    """A student with this teacher's tokenizer turns lines of WikiText into the teacher's ids."""
    teacher_path = shared_file(f"teachers/{name}.gguf")
    lines = shared_file("text/wikitext2-valid.txt").read_text(encoding="utf-8").splitlines()
    if "stories" in name:
        lines = lines[::10]  # a vocabulary of 512 makes many tokens
    with GGUFTeacher(teacher_path, threads=1) as teacher:
        shape = student_config(
            parse_size("32x1"), vocab_size=teacher.info.vocab_size, context_length=128
        )
        theirs = teacher.tokenize(lines, add_special=True, parse_special=True)
        names = ExportNames(f"{teacher.info.name} distilled", {})
        tokens = [row[:64] for row in theirs if len(row) > 4][:4]
        held_out = HeldOut(tokens, TokenizedLines([], []))
        path = tmp_path / "student.gguf"
        export = Export(build_student(shape, 0), tokenizer_entries(teacher.file), names, held_out)
        export_proved(export, {"f16": path})
    with GGUFTeacher(path, threads=1) as student:
        ours = student.tokenize(lines, add_special=True, parse_special=True)
    assert len(ours) == len(lines) > 300
    assert all(np.array_equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_a_real_teacher_speaks_and_is_learnt_from(tmp_path: Path) -> None:
    """A short run on the TinyStories teacher: KL falls, the exported student is the trained one."""
    settings = [
        "data.max_length=64",
        "train.evaluations=3",
        "train.batch_size=8",
        "data.held_out=0.1",
        f"safety.labels={FEW_PROMPTS}",
    ]
    overrides = {
        "teacher.path": str(shared_file("teachers/stories260K.gguf")),
        "student.size": "64x1",
        "data.samples": 160,
        "train.epochs": 6,
        "export.quant": "f32",
    }
    folder = run(load_config(None, overrides, settings), RunPaths(out=tmp_path / "run"), Console())
    results = folder.read_results()
    scores = results["evaluation"]
    assert scores["exported"]["kl"] < 0.6 * scores["before"]["kl"]
    assert scores["exported"]["kl"] == pytest.approx(scores["after"]["kl"], abs=1e-3)
    assert results["proof"]["max_logit_difference"] <= 1e-3
    student = AutoModelForCausalLM.from_pretrained(folder.student)
    llama = AutoModelForCausalLM.from_pretrained(
        folder.path, gguf_file="student.gguf", dtype=torch.float32
    )
    tokens = torch.tensor([folder.read_held_out(512).sequences[0].tolist()])
    with torch.no_grad():
        assert (llama(tokens).logits - student(tokens).logits).abs().max() <= 1e-3
