"""Options of the training loop: early stopping, the best weights, less memory, trackers."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker

from distill.config.loading import parse_config
from distill.config.schema import LossConfig, TrainConfig
from distill.errors import UserError
from distill.losses.hidden_states import HiddenStateLoss
from distill.losses.objective import Objective
from distill.runs.folder import latest_checkpoint
from distill.runtime import launch_environment
from distill.training import distributed
from distill.training.data import TrainingData
from distill.training.distributed import TrainingModule
from distill.training.optimizer import build_optimizer, build_schedule, decays, peak_learning_rate
from distill.training.validation import ValidationScore, best_step, is_exhausted, validation_score
from stability.precision import onednn_is_exact
from tests.support.students import make_student
from tests.support.training import (
    GREEDY,
    LOSS,
    PATIENT,
    TRAIN,
    Killed,
    Weights,
    assert_equal,
    copied,
    fresh_student,
    read_metrics,
    run_with,
    save_all_the_time,
)

KLS = ("forward_kl", "reverse_kl", "skewed_forward_kl", "skewed_reverse_kl")


@pytest.fixture
def new_process() -> Iterator[None]:
    """Accelerate as a new process finds it: it keeps the first precision it is given."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# -- early stopping and the best weights ---------------------------------------------------------


def test_the_best_score_and_patience() -> None:
    """The lowest KL, the later one of equals; exhausted after that many worse ones in a row."""
    kls = {0: 3.0, 5: 1.0, 10: 1.0, 15: 2.0, 20: 1.5}
    scores = {step: ValidationScore(kl, 0.0, 0.0) for step, kl in kls.items()}
    assert best_step(scores) == 10
    exhausted = [is_exhausted(scores, patience) for patience in (1, 2, 3, None)]
    assert exhausted == [True, True, False, False]
    assert not is_exhausted({step: scores[step] for step in (0, 5)}, 1)


@pytest.mark.parametrize("config", [GREEDY, PATIENT], ids=["all steps", "patience"])
def test_the_best_weights_are_left_also_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: TrainConfig, data: TrainingData
) -> None:
    """The student ends with the best weights, patience ends the run, a kill changes nothing."""
    save_all_the_time(monkeypatch)
    seen = dict[int, Weights]()
    student, summary = run_with(data, tmp_path / "whole", config, seen=seen)
    kls = {step: found.kl for step, found in summary.scores}
    assert summary.planned == len(data.batches(3, 4)) == 15
    assert summary.best == min(kls, key=lambda step: kls[step])
    assert 0 < summary.best < summary.steps
    after = 3 if config.patience else 15 - summary.best
    assert summary.steps == max(kls) == summary.best + after < 15 + (config.patience is None)
    assert_equal(copied(student), seen[summary.best])
    kept = latest_checkpoint(tmp_path / "whole" / "checkpoints")
    assert kept is not None and kept.name == f"step-{summary.steps:06d}"
    for file, step in (("best", summary.best), ("model", summary.steps)):
        for name, tensor in safetensors.torch.load_file(kept / f"{file}.safetensors").items():
            assert torch.equal(tensor, seen[step][name]), (file, name)

    # One continues from the very checkpoint whose weights are the best, and has to keep them.
    logged = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    for kill_at in (1, summary.best, summary.best + 1, summary.best + 2, summary.steps):
        cut = tmp_path / f"cut-{kill_at}"
        with pytest.raises(Killed):
            run_with(data, cut, config, kill_at=kill_at)
        continued, second = run_with(data, cut, config)
        assert_equal(copied(continued), copied(student))
        assert (second.best, second.steps) == (summary.best, summary.steps), kill_at
        assert second.scores == summary.scores and second.continued_from == kill_at - 1, kill_at
        assert read_metrics(cut / "metrics.jsonl") == logged, kill_at
    again, third = run_with(data, tmp_path / "whole", config)
    assert third.continued_from == summary.steps and third.best == summary.best
    assert_equal(copied(again), copied(student))


def test_where_the_last_weights_are_the_best_they_are_kept_once(
    tmp_path: Path, data: TrainingData
) -> None:
    """No second copy of them in the last checkpoint, and they are what remains."""
    seen = dict[int, Weights]()
    student, summary = run_with(data, tmp_path, TRAIN, seen=seen)
    assert summary.best == summary.steps == summary.planned
    assert_equal(copied(student), seen[summary.steps])
    kept = latest_checkpoint(tmp_path / "checkpoints")
    assert kept is not None and not (kept / "best.safetensors").exists()
    assert_equal(copied(run_with(data, tmp_path, TRAIN)[0]), seen[summary.steps])


# -- memory, speed, precision --------------------------------------------------------------------


def test_gradient_checkpointing_changes_nothing_but_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: TrainingData
) -> None:
    """A training step computes every layer twice, to the same bits; not after training."""
    feed_forward = type(fresh_student().model.layers[0].mlp)
    real, calls = feed_forward.forward, [0]

    def counted(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        calls[-1] += self.training
        return real(self, x)

    monkeypatch.setattr(feed_forward, "forward", counted)
    plain, summary = run_with(data, tmp_path / "plain", TRAIN)
    calls.append(0)
    config = TRAIN.model_copy(update={"gradient_checkpointing": True})
    saving, other = run_with(data, tmp_path / "saving", config)
    assert calls == [2 * summary.steps, 4 * summary.steps]
    assert_equal(copied(saving), copied(plain))
    assert other.scores == summary.scores
    assert not any(layer.gradient_checkpointing for layer in saving.model.layers)


def test_scores_in_bf16_are_those_in_float32_but_for_rounded_layers(
    tmp_path: Path, new_process: None, data: TrainingData
) -> None:
    """Layers compute as in training; logits do not, as rounded ones would tie."""
    _, summary = run_with(data, tmp_path / "run", TRAIN.model_copy(update={"precision": "bf16"}))
    student = fresh_student()
    module = TrainingModule(student, Objective(LOSS))
    exact = validation_score(module, data.held_out(4, torch.device("cpu")))
    assert summary.precision == "bf16"
    found = summary.scores[0][1]
    assert found != exact and vars(found) == pytest.approx(vars(exact), rel=1e-3)
    surprise = []
    for batch in data.held_out(4, torch.device("cpu"), student.packs):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            hidden = batch.run(student, with_logits=False).last_hidden_state
        logits = batch.at_valid(hidden).double() @ student.output_matrix().detach().double().T
        surprise.append(torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none"))
    # With AMX both factors of a logit are rounded, as the layers round theirs.
    off = 1e-6 if onednn_is_exact() else 1e-4
    assert found.cross_entropy == pytest.approx(float(torch.cat(surprise).mean()), rel=off)
    assert summary.scores[-1][1].kl < exact.kl


def test_metal_is_not_trained_on(tmp_path: Path, new_process: None, data: TrainingData) -> None:
    """It lacks float64: training stays on the CPU of such a machine."""
    PartialState().device = torch.device("mps")
    assert run_with(data, tmp_path, TRAIN)[0].device.type == "cpu"


@pytest.mark.slow
@pytest.mark.skipif(
    "TEST_COMPILE" not in os.environ or shutil.which("c++") is None,
    reason="compiling takes more than a minute and needs a C++ compiler; set TEST_COMPILE=1",
)
def test_compiled_layers_learn_the_same(tmp_path: Path, data: TrainingData) -> None:
    """torch.compile, with and without gradient checkpointing: the same losses up to rounding."""
    plain, _ = run_with(data, tmp_path / "plain", TRAIN)
    wanted = read_metrics(tmp_path / "plain" / "metrics.jsonl")
    for saving in (False, True):
        update = {"compile": True, "gradient_checkpointing": saving}
        folder = tmp_path / f"compiled-{saving}"
        compiled, _ = run_with(data, folder, TRAIN.model_copy(update=update))
        for found, expected in zip(read_metrics(folder / "metrics.jsonl"), wanted, strict=True):
            assert found["step"] == expected["step"]
            name = "loss" if found["kind"] == "train" else "kl"
            assert found[name] == pytest.approx(expected[name], rel=1e-4)
        assert all(layer._compiled_call_impl is None for layer in compiled.model.layers)
        for one, other in zip(compiled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


# -- objective, optimizer and schedule -----------------------------------------------------------


def test_every_divergence_trains(tmp_path: Path, data: TrainingData) -> None:
    """The loss falls, and each one is another loss."""
    config = TRAIN.model_copy(update={"epochs": 6, "learning_rate": 0.03})
    first = set()
    for name in (*KLS, "jensen_shannon"):
        settings = {"temperature": 2.0, "final_from": 1.0, "beta": 0.0, "divergence": name}
        loss = LossConfig.model_validate(settings)
        _, summary = run_with(data, tmp_path / name, config, loss)
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        losses = [line["kd"] for line in lines if "kd" in line]
        per_epoch = len(losses) // 6
        assert np.mean(losses[-per_epoch:]) < 0.9 * np.mean(losses[:per_epoch]), name
        assert summary.scores[-1][1].kl < summary.scores[0][1].kl, name
        assert losses[0] not in first, name
        first.add(losses[0])


def expected_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The formula: up to the peak, level, and down to min_lr of it."""
    warmup, low = round(config.warmup * steps), config.min_lr
    falling = steps - warmup
    if config.schedule == "wsd":
        falling = min(falling, round(config.decay * steps))
    if step < warmup:
        start = 0.0 if config.schedule == "cosine" else low
        return start + (1.0 - start) * step / warmup
    done = (step - (steps - falling)) / falling if falling else float(step >= steps)
    if config.schedule == "linear":
        height = 1.0 - done
    else:
        height = (1.0 + math.cos(math.pi * max(0.0, done))) / 2.0
    return low + (1.0 - low) * (height if done > 0 else 1.0)


def rates(config: TrainConfig, steps: int) -> list[float]:
    """The learning rate of every step, and of the one after the last."""
    optimizer = build_optimizer(fresh_student(), config, 16)
    schedule = build_schedule(optimizer, config, steps)
    found = [float(schedule.get_last_lr()[0])]
    for _ in range(steps):
        optimizer.step()
        schedule.step()
        found.append(float(schedule.get_last_lr()[0]))
    return found


def test_schedules() -> None:
    """The formula and values by hand; without a whole step of warm-up the first is at the peak."""
    for schedule, decay, warmup, by_hand in (
        ("cosine", 0.2, 0.1, {0: 0.0, 2: 0.5, 4: 1.0, 22: 0.55, 40: 0.1}),
        ("linear", 0.2, 0.1, {0: 0.1, 4: 1.0, 22: 0.55, 40: 0.1}),
        ("linear", 0.2, 0.0, {0: 1.0, 20: 0.55, 40: 0.1}),
        ("wsd", 0.25, 0.1, {0: 0.1, 2: 0.55, 4: 1.0, 29: 1.0, 35: 0.55, 40: 0.1}),
        ("wsd", 1.0, 0.3, {}),
        ("wsd", 0.0, 0.1, {}),
        ("wsd", 0.5, 1.0, {}),
    ):
        settings = {"schedule": schedule, "decay": decay, "warmup": warmup}
        config = TrainConfig.model_validate(settings | {"learning_rate": 0.01, "min_lr": 0.1})
        found = rates(config, 40)
        for step, rate in enumerate(found):
            height = expected_rate(config, step, 40)
            assert rate == pytest.approx(0.01 * height), (settings, step)
        for step, height in by_hand.items():
            assert found[step] == pytest.approx(0.01 * height), (settings, step)
    for steps in (1, 2, 5):
        assert rates(TrainConfig(learning_rate=0.01), steps)[0] == pytest.approx(0.01), steps
    # The peak is as configured, or 0.5 / width.
    assert peak_learning_rate(TrainConfig(learning_rate=0.5), 256) == 0.5
    for width in (64, 512):
        assert peak_learning_rate(TrainConfig(), width) == pytest.approx(0.5 / width), width


def test_matrices_and_projectors_decay() -> None:
    """Rotations, norms, embeddings and biases do not; DDP's prefix makes no difference."""
    hidden = HiddenStateLoss([(0, 0)], 16, {0: 4}, {0: 1.0})
    module = TrainingModule(make_student(16, 1, 48), Objective(LOSS, hidden))
    decayed, others = build_optimizer(module, TrainConfig(weight_decay=0.2), 16).param_groups
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert decayed["weight_decay"] == 0.2 and others["weight_decay"] == 0.0
    assert decayed["fused"] and others["fused"]  # else the same seed would give other bytes
    matrices = {f"self_attn.{letter}_proj" for letter in "qkvo"}
    matrices |= {f"mlp.{kind}_proj" for kind in ("gate", "up", "down")}
    expected = {f"student.model.layers.0.{matrix}.weight" for matrix in matrices}
    expected.add("objective.hidden.projectors.0_to_0.weight")
    assert {names[id(p)] for p in decayed["params"]} == expected
    kept = {names[id(p)] for p in others["params"]}
    assert kept == set(names.values()) - expected
    for part in ("projectors.0_to_0.bias", "self_attn.gate.safety", "model.embed_tokens.weight"):
        assert any(name.endswith(part) for name in kept), part
    for name in names.values():
        assert decays(f"module.{name}") == decays(name) == (name in expected)


def refusal(section: str, key: str, value: object) -> str:
    """What the settings say to a value, or nothing if they take it."""
    try:
        parse_config({section: {key: value}})
    except UserError as error:
        return str(error)
    return ""


def test_settings_out_of_range_are_refused() -> None:
    """By name."""
    for section, key, *values in (
        ("train", "schedule", "step"),
        ("train", "decay", 1.5),
        ("train", "patience", 0),
        ("train", "evaluations", 1),
        ("train", "on_policy", 1.1),
        ("train", "on_policy_temperature", 0.0),
        ("train", "trackers", ["mlflow"]),
        ("train", "accumulation", 0),
        ("loss", "divergence", "kl"),
        ("loss", "js_mixing", 1.0, 0.0),
        ("loss", "skew", 1.0),
        ("loss", "gamma", -0.1),
        ("loss", "layer_map", [[0, -1]], [[0, 1, 2]]),
    ):
        for value in values:
            assert f"{section}.{key}" in refusal(section, key, value), (section, key, value)


# -- trackers ------------------------------------------------------------------------------------


def test_a_tracker_that_is_not_installed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: TrainingData
) -> None:
    """Before anything is trained, with the command that installs it."""
    monkeypatch.setattr(launch_environment, "find_spec", lambda name: None)
    for tracker in ("tensorboard", "wandb"):
        message = rf"{tracker}, which is not installed: pip install {tracker}"
        with pytest.raises(UserError, match=message):
            run_with(data, tmp_path, TRAIN.model_copy(update={"trackers": (tracker,)}))
        assert not (tmp_path / "metrics.jsonl").exists(), tracker


class FakeTracker(GeneralTracker):
    """Keeps what it receives."""

    name = "tensorboard"
    requires_logging_directory = False
    tracker = None
    settings: ClassVar[dict[str, Any]] = {}
    logged: ClassVar[list[tuple[int, dict[str, float]]]] = []
    finished: ClassVar[list[bool]] = []

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings.update(values)

    def log(self, values: dict[str, float], step: int | None = None, **_: object) -> None:
        assert step is not None
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished.append(True)


def test_trackers_receive_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: TrainingData
) -> None:
    """Every line of metrics.jsonl under its own name, the settings once, and the end."""
    monkeypatch.setattr(launch_environment, "find_spec", lambda name: SimpleNamespace(name=name))
    asked: list[dict[str, Any]] = []

    def accelerator(**settings: Any) -> Accelerator:
        asked.append(settings)
        return Accelerator(**settings | {"log_with": FakeTracker()})

    monkeypatch.setattr(distributed, "Accelerator", accelerator)
    run_with(data, tmp_path, TRAIN.model_copy(update={"trackers": ("tensorboard",)}))
    expected = []
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        kind, step = line.pop("kind"), line.pop("step")
        expected.append((step, {f"{kind}/{name}": value for name, value in line.items()}))
    assert FakeTracker.logged == expected and len(expected) > 10
    assert FakeTracker.settings["learning_rate"] == 0.01
    assert FakeTracker.settings["schedule"] == "linear" and FakeTracker.finished == [True]
    assert asked[0]["log_with"] == ["tensorboard"]
    assert asked[0]["project_dir"] == tmp_path / "trackers"


def test_tensorboard(tmp_path: Path, data: TrainingData) -> None:
    """Where it is installed, its files hold the loss of every step."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_with(data, tmp_path, TRAIN.model_copy(update={"trackers": ("tensorboard",)}))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    found: dict[int, float] = {}
    for folder in {path.parent for path in (tmp_path / "trackers").rglob("events.*")}:
        events = EventAccumulator(str(folder)).Reload()
        if "train/loss" in events.Tags()["scalars"]:
            found |= {event.step: event.value for event in events.Scalars("train/loss")}
    expected = {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
    assert found == pytest.approx(expected)
