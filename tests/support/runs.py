"""Small whole runs, and students to call commands with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import distill.pipeline.stages
from distill.capture.temporary_files.tokenizer_only import tokenizer_entries
from distill.config.loading import load_config
from distill.config.schema import RunConfig
from distill.pipeline.run import run
from distill.runs.audit_log import LOG
from distill.runs.folder import RunFolder, RunPaths
from distill.runtime.progress import Console
from distill.training import checkpoint_timer
from distill.training.engine import train
from students.gguf.metadata import ExportNames
from students.gguf.writer import write_gguf
from students.model.decoder import SO8TForCausalLM
from teachers import example_teacher
from teachers.gguf.file import read_gguf
from tests.support.students import make_student

# Of the built-in ones, so that runs are short.
FEW_PROMPTS = Path(__file__).parent / "few_prompts.jsonl"
# So plain that a head learns them: where one is needed.
PLAIN_PROMPTS = Path(__file__).parent / "plain_prompts.jsonl"
SMALL = [
    f"safety.labels={FEW_PROMPTS}",
    "data.max_length=24",
    "data.held_out=0.2",
    "train.epochs=2",
    "train.learning_rate=0.003",
    "train.batch_size=8",
    "train.evaluations=3",
    "student.init=embeddings",  # a random teacher's own weights could hardly be improved
]


def small_config(teacher: Path, *settings: str, samples: int = 40) -> RunConfig:
    overrides = {"teacher.path": str(teacher), "student.size": "32x1", "data.samples": samples}
    return load_config(None, overrides, [*SMALL, *settings])


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def interrupted(at: int) -> Iterator[None]:
    """Ctrl-C after step ``at`` of training, with a checkpoint before every step; 0: before it."""

    def stopped(job, report, *rest):  # type: ignore[no-untyped-def]
        def stop(step: int, text: str) -> None:
            if step == at:
                raise KeyboardInterrupt

        return train(job, stop, *rest)

    with (
        patch.object(distill.pipeline.stages, "train", stopped if at else interrupt),
        patch.multiple(checkpoint_timer, CHECKPOINT_SECONDS=0.0, SAVING_SHARE=float("inf")),
        pytest.raises(KeyboardInterrupt),
    ):
        yield


def until_training(config: RunConfig, out: Path, *, given: bool = True) -> bool:
    """A run in ``out`` up to its training: whether it has reused its soft targets, as its log says.

    ``given``: as its ``--out``; otherwise the run is to choose it by itself.
    """
    with interrupted(at=0):
        run(config, RunPaths(out=out if given else None), Console())
    lines = map(json.loads, (out / LOG).read_text().splitlines())
    [reused] = [line["content"]["reused"] for line in lines if line["event"] == "captured"]
    return bool(reused)


def times_in(folder: RunFolder) -> dict[Path, int]:
    """When each file of a run was last written."""
    return {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}


def student_with_heads(thresholds: list[float], trust: float) -> SO8TForCausalLM:
    """A student for the example teacher's tokenizer, with heads."""
    vocab_size = len(read_gguf(example_teacher()).value("tokenizer.ggml.tokens"))
    made = make_student(64, 2, vocab_size, seed=3, heads=True)
    with torch.no_grad():
        made.verification_head.output.bias.fill_(5.0)  # a random student is certain of nothing
    made.config.decision_thresholds, made.config.trust = thresholds, trust
    return made


def export(student: SO8TForCausalLM, path: Path, name: str = "judge") -> Path:
    """The student as a file, with the example teacher's tokenizer and chat template."""
    entries = tokenizer_entries(read_gguf(example_teacher()))
    write_gguf(student, path, "f32", entries, ExportNames(name, {}))
    return path
