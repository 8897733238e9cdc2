"""Settings of small whole runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

import distill.pipeline.stages
from distill.config.loading import load_config
from distill.config.schema import RunConfig
from distill.pipeline.run import run
from distill.runs.audit_log import LOG
from distill.runs.folder import RunFolder, RunPaths
from distill.runtime.progress import Console
from distill.training import checkpoint_timer
from distill.training.engine import train

# Of the built-in ones, so that runs are short.
FEW_PROMPTS = Path(__file__).parent / "few_prompts.jsonl"
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
