"""Training computes the same whatever a process has switched on, and where there is no float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from distill.config.schema import TrainConfig
from distill.losses.objective import Objective
from distill.training.engine import TrainingJob, train
from students.model.decoder import SO8TForCausalLM
from tests.support import pretended_gpu
from tests.support.pretended_gpu import training_on_gpu
from tests.support.pretended_gpu.arithmetic import GPU, rounded_products, without_float64
from tests.support.pretended_gpu.training import job
from tests.support.students import make_student
from tests.support.training import LOSS, TRAIN, VOCAB, make_data, read_metrics, weights

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addmm_", "baddbmm_"}


def trained(folder: Path, config: TrainConfig = TRAIN) -> SO8TForCausalLM:
    """A student with enough blocks for oneDNN to multiply their rotations."""
    student = make_student(64, 2, VOCAB)
    data = make_data(folder)
    (folder / "run").mkdir(parents=True)
    train(TrainingJob(student, data, Objective(LOSS), config, folder / "run"), lambda *_: None)
    return student


def test_a_training_on_the_processor_gives_the_same_bytes(tmp_path: Path) -> None:
    """Where it has AMX, "medium" takes rotations off the group by 1e-2, and the guard gave up."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "rounded").mkdir()
    plain = weights(trained(tmp_path / "plain"))
    with rounded_products():
        assert weights(trained(tmp_path / "rounded")) == plain
    logs = [
        read_metrics(tmp_path / name / "run" / "metrics.jsonl") for name in ("plain", "rounded")
    ]
    assert logs[0] == logs[1]


def test_products_on_a_gpu_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each product of float32 matrices, forward, backward, in the guard's probe and in validation,
    runs while TF32 is switched off."""
    seen: list[str] = []
    record: Any = pretended_gpu._record

    def noting(operation: Any, args: Any, kwargs: Any, result: Any) -> None:
        wide = any(getattr(one, "dtype", None) == torch.float32 for one in tree_leaves(args))
        if operation.overloadpacket.__name__ in PRODUCTS and wide:
            seen.append(GPU.fp32_precision)
        record(operation, args, kwargs, result)

    monkeypatch.setattr(pretended_gpu, "_record", noting)
    with rounded_products(), training_on_gpu():
        train(job(tmp_path, 512, 2), lambda *_: None)
    assert len(seen) > 100 and set(seen) == {"ieee"}


def test_training_needs_no_float64_on_the_device(tmp_path: Path) -> None:
    """Rotations, scores and what the guard reads are computed in it on the processor instead."""
    with without_float64(), training_on_gpu():
        train(job(tmp_path, 512, 2), lambda *_: None)
    kinds = {line["kind"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")}
    assert kinds >= {"train", "probe", "weights", "held_out"}
