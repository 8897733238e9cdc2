"""Checkpoints: random states, what a finished one leaves out, what is refused, and the log that goes with them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from distill.checkpoint import TrainingState, latest_checkpoint, load_checkpoint, save_checkpoint
from distill.errors import UserError
from distill.metrics import MetricsFile
from distill.objective import Objective
from distill.schedule import build_optimizer, build_schedule
from students.model import SO8TForCausalLM
from tests.test_engine import LOSS, TRAIN, fresh_student, make_data, save_all_the_time
from tests.test_engine_options import PATIENT, assert_equal, copied, run_with


def state_of(student: SO8TForCausalLM, step: int = 0) -> TrainingState:
    optimizer = build_optimizer(student, TRAIN, 16)
    return TrainingState(student, optimizer, build_schedule(optimizer, TRAIN, 8), Objective(LOSS), step=step)


def draws() -> list[float]:
    """A number from each library's generator; the normal ones are made in pairs, of which one is kept."""
    torch_draws = [float(torch.rand(1)), float(torch.randn(1))]
    return [random.random(), random.gauss(0, 1), np.random.random(), np.random.normal(), *torch_draws]


@pytest.mark.parametrize("drawn_before", [0, 1])
def test_a_checkpoint_restores_every_random_state(tmp_path: Path, drawn_before: int) -> None:
    """Python's, NumPy's and PyTorch's, also with a normal number kept for later; saving changes none of them."""
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    for _ in range(drawn_before):
        draws()
    path = save_checkpoint(tmp_path, state_of(fresh_student()), "key")
    expected = [draws() for _ in range(3)]
    random.seed(4), np.random.seed(5), torch.manual_seed(6)
    assert all(a != b for a, b in zip(draws(), expected[0], strict=True))
    load_checkpoint(path, state_of(fresh_student()), "key")
    assert [draws() for _ in range(3)] == expected


def test_a_finished_checkpoint_has_no_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained after it; the one before it has them."""
    save_all_the_time(monkeypatch)
    run_with(make_data(tmp_path), tmp_path / "run", TRAIN)
    for path, finished in zip(
        sorted((tmp_path / "run" / "checkpoints").iterdir()), (False, True), strict=True
    ):
        names = safetensors.torch.load_file(path / "training.safetensors").keys()
        content = json.loads((path / "state.json").read_text())
        assert any(name.startswith("optimizer.") for name in names) != finished == content["finished"]
        assert {"objective.rotation_average", "random.0.torch"} <= names


@pytest.mark.parametrize("how", ["cut", "gone"])
def test_damaged_best_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """They are not silently replaced by the last ones."""
    save_all_the_time(monkeypatch)
    data = make_data(tmp_path)
    run_with(data, tmp_path / "run", PATIENT)
    kept = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert kept is not None
    best = kept / "best.safetensors"
    if how == "cut":
        best.write_bytes(best.read_bytes()[:100])
    else:
        best.unlink()
    with pytest.raises(UserError, match=rf"{kept.name} is damaged.*delete that folder"):
        run_with(data, tmp_path / "run", PATIENT)


@pytest.mark.parametrize("change", ["hidden_size", "num_hidden_layers", "intermediate_size"])
def test_a_checkpoint_of_another_student_is_refused(tmp_path: Path, change: str) -> None:
    """Of another width, depth or inner width: nothing has been changed."""
    path = save_checkpoint(tmp_path, state_of(fresh_student(), step=5), "key")
    config = fresh_student().config
    setattr(config, change, 2 * getattr(config, change))
    other = SO8TForCausalLM(config)
    before, state = copied(other), state_of(other)
    with pytest.raises(UserError, match="step-000005"):
        load_checkpoint(path, state, "key")
    assert_equal(copied(other), before)
    assert (state.step, state.scores, state.best) == (0, {}, None) and not state.optimizer.state


def test_metrics_of_a_run_without_a_checkpoint_begin_anew(tmp_path: Path) -> None:
    """Lines of a run that left none are dropped; those up to a checkpoint stay, also one before the first step."""
    path = tmp_path / "metrics.jsonl"
    for from_step, kept in ((None, 0), (None, 0), (0, 1)):
        with MetricsFile(path, from_step) as metrics:
            assert len(path.read_text().splitlines()) == kept
            if from_step is None:
                metrics.write("held_out", 0, {"kl": 1.0})
                metrics.write("train", 1, {"loss": 1.0})
