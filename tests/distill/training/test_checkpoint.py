"""Checkpoints: random states, what a finished one leaves out, what is refused, and the log."""

from __future__ import annotations

import json
import random
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from distill.errors import UserError
from distill.losses.objective import Objective
from distill.runs.metrics_log import MetricsFile
from distill.training.checkpoint import TrainingState, checksum, load_checkpoint, save_checkpoint
from distill.training.data import TrainingData
from distill.training.optimizer import build_optimizer, build_schedule
from students.model.decoder import SO8TForCausalLM
from tests.support.training import (
    LOSS,
    PATIENT,
    TRAIN,
    Killed,
    Result,
    assert_equal,
    copied,
    fresh_student,
    logged_steps,
    read_metrics,
    run_with,
    save_all_the_time,
)


@pytest.fixture(scope="module", autouse=True)
def at_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        save_all_the_time(patch)
        yield


@pytest.fixture(scope="module")
def killed(data: TrainingData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run killed in its seventh step, which leaves two checkpoints."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(Killed):
        run_with(data, folder, TRAIN, kill_at=7)
    return folder


def copy_of(run: Path, folder: Path) -> tuple[Path, Path]:
    """The last two checkpoints of a copy of a run, the older first."""
    shutil.copytree(run, folder)
    older, newest = sorted((folder / "checkpoints").iterdir())
    return older, newest


def refusal(folder: Path) -> dict[str, Any]:
    """The one event in the log of a run: a checkpoint was refused."""
    lines = read_metrics(folder / "metrics.jsonl")
    (event,) = (line for line in lines if line["kind"] == "event")
    assert event["action"] == "checkpoint_refused"
    return event


def state_of(student: SO8TForCausalLM, step: int = 0) -> TrainingState:
    optimizer = build_optimizer(student, TRAIN, 16)
    schedule = build_schedule(optimizer, TRAIN, 8)
    return TrainingState(student, optimizer, schedule, Objective(LOSS), step=step)


def draws() -> list[float]:
    """A number from each library's generator; normal ones are made in pairs, and one is kept."""
    found = [random.random(), random.gauss(0, 1), np.random.random(), np.random.normal()]
    return [*found, float(torch.rand(1)), float(torch.randn(1))]


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed + 1)
    torch.manual_seed(seed + 2)


def test_a_checkpoint_restores_every_random_state(tmp_path: Path) -> None:
    """Python's, NumPy's and PyTorch's, with a normal number kept too; saving changes none."""
    for drawn_before in (0, 1):
        seed_all(1)
        for _ in range(drawn_before):
            draws()
        path = save_checkpoint(tmp_path / f"{drawn_before}", state_of(fresh_student()), "key")
        expected = [draws() for _ in range(3)]
        seed_all(4)
        assert all(a != b for a, b in zip(draws(), expected[0], strict=True)), drawn_before
        load_checkpoint(path, state_of(fresh_student()), "key")
        assert [draws() for _ in range(3)] == expected, drawn_before


def test_a_finished_checkpoint_has_no_moments(tmp_path: Path, data: TrainingData) -> None:
    """Nothing is trained after it; the one before it has them."""
    run_with(data, tmp_path, TRAIN)
    paths = sorted((tmp_path / "checkpoints").iterdir())
    for path, finished in zip(paths, (False, True), strict=True):
        names = safetensors.torch.load_file(path / "training.safetensors").keys()
        content = json.loads((path / "state.json").read_text())
        has_moments = any(name.startswith("optimizer.") for name in names)
        assert has_moments != finished == content["finished"], path
        assert {"objective.rotation_average", "random.0.torch"} <= names, path


def test_a_training_goes_on_in_the_precision_it_began_in(
    tmp_path: Path, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured as faster may be another at the next start; on another processor it counts,
    and what is asked for always does."""
    auto = TRAIN.model_copy(update={"precision": "auto"})
    faster = {16: True}
    monkeypatch.setattr("distill.runtime.device.is_faster_in_bfloat16", faster.__getitem__)
    whole, summary = run_with(data, tmp_path / "whole", auto)
    assert summary.precision == "bf16"
    for row, config, name, precision in (
        ("same", auto, None, "bf16"),
        ("other", auto, "another processor", "fp32"),
        ("asked", TRAIN, None, "fp32"),
    ):
        faster[16] = True
        with pytest.raises(Killed):
            run_with(data, tmp_path / row, auto, kill_at=3)
        faster[16] = False
        if name is not None:
            for path in (tmp_path / row / "checkpoints").glob("*/state.json"):
                content = json.loads(path.read_text())
                path.write_text(json.dumps(content | {"computed": [name, "bf16"]}))
        again, summary = run_with(data, tmp_path / row, config)
        assert summary.precision == precision and summary.continued_from > 0, row
        if row == "same":
            assert_equal(copied(again), copied(whole))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def test_damaged_best_weights_are_refused(tmp_path: Path, data: TrainingData) -> None:
    """The last ones do not silently replace them: training continues from the checkpoint before."""
    expected, _ = run_with(data, tmp_path / "run", PATIENT)
    for damage in (cut_short, Path.unlink):
        folder = tmp_path / damage.__name__
        kept = copy_of(tmp_path / "run", folder)[1]
        damage(kept / "best.safetensors")
        again, summary = run_with(data, folder, PATIENT)
        assert_equal(copied(again), copied(expected))
        assert 0 < summary.continued_from < summary.steps, damage
        assert (kept.parent / f"refused-{kept.name}").is_dir() and kept.is_dir(), damage
        assert kept.name in refusal(folder)["words"], damage


def test_a_checkpoint_of_another_student_is_refused(tmp_path: Path) -> None:
    """Of another width, depth or inner width: nothing has been changed."""
    path = save_checkpoint(tmp_path, state_of(fresh_student(), step=5), "key")
    for change in ("hidden_size", "num_hidden_layers", "intermediate_size"):
        config = fresh_student().config
        setattr(config, change, 2 * getattr(config, change))
        other = SO8TForCausalLM(config)
        before, state = copied(other), state_of(other)
        with pytest.raises(UserError, match="step-000005"):
            load_checkpoint(path, state, "key")
        assert_equal(copied(other), before)
        assert (state.step, state.scores, state.best) == (0, {}, None), change
        assert not state.optimizer.state, change


def change(path: Path, file: str, name: str, how: str) -> None:
    """Damage one tensor of a checkpoint; the file itself is whole."""
    tensors = safetensors.torch.load_file(path / f"{file}.safetensors")
    flat = tensors[name].view(-1)
    if how == "bit":
        flat[3:4].view(torch.int32).bitwise_xor_(1)  # the last: finite, and hardly another number
    elif how == "gone":
        del tensors[name]
    else:
        flat[3] = float(how)
    safetensors.torch.save_file(tensors, path / f"{file}.safetensors")


WEIGHT, MOMENT = "model.layers.1.mlp.up_proj.weight", "optimizer.3.exp_avg"


def test_a_poisoned_checkpoint_is_refused(
    tmp_path: Path, data: TrainingData, whole: Result, killed: Path
) -> None:
    """Quarantined, the tensor named; the one before continues to the same end."""
    for file, name, how in (
        ("model", WEIGHT, "nan"),
        ("model", WEIGHT, "bit"),
        ("training", MOMENT, "nan"),
        ("training", MOMENT, "inf"),
        ("training", MOMENT, "bit"),
        ("training", MOMENT, "gone"),
        ("training", "objective.rotation_average", "bit"),
    ):
        row = f"{file} {name} {how}"
        folder = tmp_path / row
        before, newest = copy_of(killed, folder)
        change(newest, file, name, how)
        student, summary = run_with(data, folder, TRAIN)
        assert summary.continued_from == int(before.name.removeprefix("step-")) == 5, row
        assert (newest.parent / f"refused-{newest.name}").is_dir(), row
        assert_equal(copied(student), copied(whole[0]))
        assert summary.scores == whole[1].scores, row
        event = refusal(folder)
        assert event["step"] == 5 and newest.name in event["words"], row
        assert name in event["words"], row
        assert logged_steps(folder) == list(range(1, 11)), row


def test_where_all_checkpoints_are_damaged_training_does_not_begin_anew(
    tmp_path: Path, data: TrainingData, killed: Path
) -> None:
    """It says which tensor of which checkpoint, and leaves everything where it was."""
    paths = copy_of(killed, tmp_path / "run")
    for path in paths:
        change(path, "model", WEIGHT, "bit")
    with pytest.raises(UserError, match=rf"{paths[0].name} is damaged.*{WEIGHT}"):
        run_with(data, tmp_path / "run", TRAIN)
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == [*paths]


def test_a_checkpoint_without_checksums_is_read(
    tmp_path: Path, data: TrainingData, whole: Result, killed: Path
) -> None:
    """An older one, and without what a guard knows: it continues to the same end."""
    state = copy_of(killed, tmp_path / "run")[1] / "state.json"
    content = json.loads(state.read_text())
    for key in ("checksums", "guard", "lines_logged"):
        del content[key]
    state.write_text(json.dumps(content))
    student, summary = run_with(data, tmp_path / "run", TRAIN)
    assert summary.continued_from == 6
    assert_equal(copied(student), copied(whole[0]))


def test_every_bit_counts_in_a_checksum() -> None:
    """Of any type and shape, however the tensor lies in memory; NaN and the sign of zero too."""
    draw = torch.Generator().manual_seed(0)
    values = (10 * torch.randn(4, 6, generator=draw)).clamp(min=0)
    for kind in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8):
        tensor = values.to(kind)
        content = tensor.view(torch.uint8).view(-1)
        assert checksum(tensor) == zlib.crc32(content.numpy().tobytes()), kind
        assert checksum(tensor.T) == checksum(tensor.T.contiguous()) != checksum(tensor), kind
        sums = {checksum(tensor)}
        positions = range(0, content.numel(), 7)
        for position in positions:
            content[position] ^= 1
            sums.add(checksum(tensor))
            content[position] ^= 1
        assert len(sums) == 1 + len(positions), kind
    assert checksum(torch.tensor(1.0)) != checksum(torch.tensor(-1.0))
    assert checksum(torch.tensor(0.0)) != checksum(torch.tensor(-0.0))
    assert checksum(torch.zeros(0)) == 0


def logged(path: Path) -> list[tuple[int, float | None]]:
    return [(line["step"], line["loss"]) for line in read_metrics(path)]


def test_a_log_is_cut_to_what_the_checkpoint_knew(tmp_path: Path) -> None:
    """By step, or by the number of lines, as steps may come again; cut lines do not count.

    A run without a checkpoint begins anew; values that are not finite become null.
    """
    path = tmp_path / "metrics.jsonl"
    for from_step, kept in ((None, 0), (None, 0), (0, 1)):
        with MetricsFile(path, from_step) as metrics:
            assert len(logged(path)) == kept == metrics.lines, from_step
            for step, loss in ((0, 1.0), (1, float("nan"))) if from_step is None else ():
                metrics.write("train", step, {"loss": loss})
                assert logged(path)[-1] == (step, loss if step == 0 else None)
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
    assert logged(path)[3:] == [(3, 3.0), (1, 1.0), (2, 9.0)]
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    with MetricsFile(path, 1) as metrics:
        metrics.write("train", 2, {"loss": 0.5})
    assert logged(path) == [(0, 0.0), (1, 1.0), (1, 1.0), (2, 0.5)]
    with MetricsFile(None, 1, 5) as metrics:
        metrics.write("train", 1, {})
        assert metrics.lines == 0
