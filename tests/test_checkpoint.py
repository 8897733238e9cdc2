"""Checkpoints: random states, what a finished one leaves out, what is refused, and the log that goes with them."""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from distill.checkpoint import TrainingState, checksum, latest_checkpoint, load_checkpoint, save_checkpoint
from distill.engine import TrainingData
from distill.errors import UserError
from distill.metrics import MetricsFile
from distill.objective import Objective
from distill.schedule import build_optimizer, build_schedule
from students.model import SO8TForCausalLM
from tests.test_engine import LOSS, TRAIN, Killed, fresh_student, make_data, save_all_the_time
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
    """They are not silently replaced by the last ones: training continues from the checkpoint before."""
    save_all_the_time(monkeypatch)
    data = make_data(tmp_path)
    expected, _ = run_with(data, tmp_path / "run", PATIENT)
    kept = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert kept is not None
    best = kept / "best.safetensors"
    if how == "cut":
        best.write_bytes(best.read_bytes()[:100])
    else:
        best.unlink()
    again, summary = run_with(data, tmp_path / "run", PATIENT)
    assert_equal(copied(again), copied(expected))
    assert 0 < summary.continued_from < summary.steps
    assert (kept.parent / f"refused-{kept.name}").is_dir() and kept.is_dir()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    event = next(line for line in lines if line["kind"] == "event")
    assert event["action"] == "checkpoint_refused" and kept.name in event["words"]


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


# -- checkpoints that are not what was saved ---------------------------------------------------------------


def cut_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[TrainingData, list[Path]]:
    """A training killed in its seventh step, with the two checkpoints that it leaves."""
    save_all_the_time(monkeypatch)
    monkeypatch.setattr("os.fsync", lambda file: None)
    data = make_data(tmp_path)
    with pytest.raises(Killed):
        run_with(data, tmp_path / "run", TRAIN, kill_at=7)
    return data, sorted((tmp_path / "run" / "checkpoints").iterdir())


def change(path: Path, file: str, name: str, how: str) -> None:
    """Damage one tensor of a checkpoint; the file itself is whole."""
    tensors = safetensors.torch.load_file(path / f"{file}.safetensors")
    flat = tensors[name].view(-1)
    if how == "bit":
        flat[3:4].view(torch.int32).bitwise_xor_(1)  # the last of a weight: finite, and hardly another number
    elif how == "gone":
        del tensors[name]
    else:
        flat[3] = float(how)
    safetensors.torch.save_file(tensors, path / f"{file}.safetensors")


WEIGHT, MOMENT = "model.layers.1.mlp.up_proj.weight", "optimizer.3.exp_avg"
DAMAGE = [
    ("model", WEIGHT, "nan"),
    ("model", WEIGHT, "bit"),
    ("training", MOMENT, "nan"),
    ("training", MOMENT, "inf"),
    ("training", MOMENT, "bit"),
    ("training", MOMENT, "gone"),
    ("training", "objective.rotation_average", "bit"),
]


@pytest.mark.parametrize(("file", "name", "how"), DAMAGE)
def test_a_poisoned_checkpoint_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, name: str, how: str
) -> None:
    """Weights, moments and averages alike: put aside, the tensor named; the one before continues to the same end."""
    data, (before, newest) = cut_run(tmp_path, monkeypatch)
    change(newest, file, name, how)
    student, summary = run_with(data, tmp_path / "run", TRAIN)
    assert summary.continued_from == int(before.name.removeprefix("step-")) == 5
    assert (newest.parent / f"refused-{newest.name}").is_dir()
    expected, whole = run_with(data, tmp_path / "whole", TRAIN)
    assert_equal(copied(student), copied(expected))
    assert summary.scores == whole.scores
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (event,) = [line for line in lines if line["kind"] == "event"]
    assert event["action"] == "checkpoint_refused" and event["step"] == 5
    assert newest.name in event["words"] and name in event["words"]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 11))


def test_where_all_checkpoints_are_damaged_training_does_not_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says which tensor of which checkpoint, and leaves everything where it was."""
    data, paths = cut_run(tmp_path, monkeypatch)
    for path in paths:
        change(path, "model", WEIGHT, "bit")
    with pytest.raises(UserError, match=rf"{paths[0].name} is damaged.*{WEIGHT}"):
        run_with(data, tmp_path / "run", TRAIN)
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == paths


def test_a_checkpoint_without_checksums_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of before there were any, and without what a guard knows: it continues to the same end."""
    data, (_, newest) = cut_run(tmp_path, monkeypatch)
    content = json.loads((newest / "state.json").read_text())
    for key in ("checksums", "guard", "lines_logged"):
        del content[key]
    (newest / "state.json").write_text(json.dumps(content))
    student, summary = run_with(data, tmp_path / "run", TRAIN)
    assert summary.continued_from == 6
    assert_equal(copied(student), copied(run_with(data, tmp_path / "whole", TRAIN)[0]))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_every_bit_counts_in_a_checksum(kind: torch.dtype) -> None:
    """Of any type and shape, however the tensor lies in memory; NaN and the sign of zero too."""
    tensor = (10 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))).clamp(min=0).to(kind)
    assert checksum(tensor) == zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    assert checksum(tensor.T) == checksum(tensor.T.contiguous()) != checksum(tensor)
    content = tensor.view(torch.uint8).view(-1)
    sums = {checksum(tensor)}
    for place in range(0, content.numel(), 7):
        content[place] ^= 1
        sums.add(checksum(tensor))
        content[place] ^= 1
    assert len(sums) == 1 + len(range(0, content.numel(), 7))
    assert checksum(torch.tensor(1.0)) != checksum(torch.tensor(-1.0)) and checksum(torch.zeros(0)) == 0
    assert checksum(torch.tensor(0.0)) != checksum(torch.tensor(-0.0))


def test_a_log_is_cut_to_what_the_checkpoint_knew(tmp_path: Path) -> None:
    """By the number of lines, as steps may come again; lines that a kill cut off do not count."""
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, None) as metrics:
        for step in (0, 1, 2, 3, 1, 2):
            metrics.write("train", step, {"loss": float(step)})
        assert metrics.lines == 6
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    with MetricsFile(path, 1, 5) as metrics:
        assert metrics.lines == 5
        metrics.write("train", 2, {"loss": 9.0})
        assert metrics.lines == 6
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in found[3:]] == [(3, 3.0), (1, 1.0), (2, 9.0)]
    with MetricsFile(None, 1, 5) as metrics:
        metrics.write("train", 1, {})
        assert metrics.lines == 0
