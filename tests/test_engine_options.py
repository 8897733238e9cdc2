"""What the training loop may be asked for besides: stopping early, the best weights, saving memory, trackers."""

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

from distill import engine, launched
from distill.checkpoint import latest_checkpoint
from distill.config import LossConfig, TrainConfig, parse_config
from distill.engine import TrainingData, TrainingSummary, train
from distill.errors import UserError
from distill.held_out import HeldOutScore, best_step, held_out_score, is_exhausted
from distill.hidden_loss import HiddenStateLoss
from distill.objective import Objective
from distill.schedule import build_optimizer, build_schedule, decays
from distill.training_module import TrainingModule
from students.model import SO8TForCausalLM
from tests.conftest import make_student
from tests.test_engine import LOSS, TRAIN, Killed, fresh_student, make_data, read_metrics, save_all_the_time

# On this little data the held-out KL is lowest somewhere in the middle.
GREEDY = TRAIN.model_copy(update={"learning_rate": 0.08, "schedule": "wsd", "epochs": 3, "evaluations": 16})
PATIENT = GREEDY.model_copy(update={"patience": 3})
DIVERGENCES = ["forward_kl", "reverse_kl", "jensen_shannon", "skewed_forward_kl", "skewed_reverse_kl"]

Weights = dict[str, torch.Tensor]


def copied(student: SO8TForCausalLM) -> Weights:
    return {name: tensor.clone() for name, tensor in student.state_dict().items()}


def assert_equal(mine: Weights, theirs: Weights) -> None:
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def run_with(
    data: TrainingData,
    folder: Path,
    config: TrainConfig,
    loss: LossConfig = LOSS,
    kill_at: int = -1,
    seen: dict[int, Weights] | None = None,
) -> tuple[SO8TForCausalLM, TrainingSummary]:
    """A training run, killed after a step; ``seen`` gets the weights after every one."""
    student = fresh_student()
    folder.mkdir(exist_ok=True)

    def report(step: int, text: str) -> None:
        if seen is not None:
            seen[step] = copied(student)
        if step == kill_at:
            raise Killed

    return student, train(student, data, Objective(loss), config, folder, report)


@pytest.fixture
def new_process() -> Iterator[None]:
    """Accelerate as a new process finds it: it keeps the first precision it is given."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# -- early stopping and the best weights -------------------------------------------------------------------


def score(kl: float) -> HeldOutScore:
    return HeldOutScore(kl, 0.0, 0.0)


def test_the_best_score_and_patience() -> None:
    """The lowest KL, the later one of equals; exhausted after that many worse ones in a row."""
    scores = {0: score(3.0), 5: score(1.0), 10: score(1.0), 15: score(2.0), 20: score(1.5)}
    assert best_step(scores) == 10
    assert [is_exhausted(scores, patience) for patience in (1, 2, 3, None)] == [True, True, False, False]
    assert not is_exhausted({0: score(3.0), 5: score(2.0)}, 1)


@pytest.mark.parametrize("config", [GREEDY, PATIENT], ids=["all steps", "patience"])
def test_the_best_weights_are_left_also_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: TrainConfig
) -> None:
    """The student ends with the weights that scored best, patience ends the run, and a kill changes nothing."""
    save_all_the_time(monkeypatch)
    data, seen = make_data(tmp_path), dict[int, Weights]()
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
            assert torch.equal(tensor, seen[step][name])

    # One of them continues from the very checkpoint whose weights are the best, and has to keep them.
    for kill_at in (1, summary.best, summary.best + 1, summary.best + 2, summary.steps):
        cut = tmp_path / f"cut-{kill_at}"
        with pytest.raises(Killed):
            run_with(data, cut, config, kill_at=kill_at)
        continued, second = run_with(data, cut, config)
        assert_equal(copied(continued), copied(student))
        assert (second.best, second.steps, second.scores) == (summary.best, summary.steps, summary.scores)
        assert second.continued_from == kill_at - 1
        assert read_metrics(cut / "metrics.jsonl") == read_metrics(tmp_path / "whole" / "metrics.jsonl")
    again, third = run_with(data, tmp_path / "whole", config)
    assert third.continued_from == summary.steps and third.best == summary.best
    assert_equal(copied(again), copied(student))


def test_where_the_last_weights_are_the_best_they_are_kept_once(tmp_path: Path) -> None:
    """No second copy of them in the last checkpoint, and they are what remains."""
    seen = dict[int, Weights]()
    data = make_data(tmp_path)
    student, summary = run_with(data, tmp_path / "run", TRAIN, seen=seen)
    assert summary.best == summary.steps == summary.planned
    assert_equal(copied(student), seen[summary.steps])
    kept = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert kept is not None and not (kept / "best.safetensors").exists()
    assert_equal(copied(run_with(data, tmp_path / "run", TRAIN)[0]), seen[summary.steps])


# -- memory, speed, precision ------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_nothing_but_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer is computed twice as often in a training step, to the same bits, and not after training."""
    calls = {"count": 0}
    real = type(fresh_student().model.layers[0].mlp).forward

    def counted(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        calls["count"] += self.training
        return real(self, x)

    monkeypatch.setattr(type(fresh_student().model.layers[0].mlp), "forward", counted)
    data = make_data(tmp_path)
    plain, summary = run_with(data, tmp_path / "plain", TRAIN)
    often = calls.pop("count")
    calls["count"] = 0
    saving, other = run_with(
        data, tmp_path / "saving", TRAIN.model_copy(update={"gradient_checkpointing": True})
    )
    assert often == 2 * summary.steps and calls["count"] == 2 * often
    assert_equal(copied(saving), copied(plain))
    assert other.scores == summary.scores and not any(
        layer.gradient_checkpointing for layer in saving.model.layers
    )


def test_held_out_scores_are_float32_also_in_bf16(tmp_path: Path, new_process: None) -> None:
    """What the weights are worth does not depend on what training computes in."""
    data = make_data(tmp_path)
    _, summary = run_with(data, tmp_path / "run", TRAIN.model_copy(update={"precision": "bf16"}))
    module = TrainingModule(fresh_student(), Objective(LOSS))
    expected = held_out_score(module, data.held_out(4, torch.device("cpu")))
    assert summary.precision == "bf16"
    assert vars(summary.scores[0][1]) == pytest.approx(vars(expected), rel=1e-6)  # bfloat16: 1e-3
    assert summary.scores[-1][1].kl < expected.kl


def test_metal_is_not_trained_on(tmp_path: Path, new_process: None) -> None:
    """It lacks float64: training stays on the CPU of such a machine."""
    PartialState().device = torch.device("mps")
    assert engine._accelerator(TRAIN, 16, tmp_path).device.type == "cpu"


@pytest.mark.slow
@pytest.mark.skipif(
    "TEST_COMPILE" not in os.environ or shutil.which("c++") is None,
    reason="compiling takes more than a minute and needs a C++ compiler; set TEST_COMPILE=1",
)
def test_compiled_layers_learn_the_same(tmp_path: Path) -> None:
    """torch.compile, with and without gradient checkpointing: the same losses up to rounding."""
    data = make_data(tmp_path)
    plain, _ = run_with(data, tmp_path / "plain", TRAIN)
    for saving in (False, True):
        update = {"compile": True, "gradient_checkpointing": saving}
        folder = tmp_path / f"compiled-{saving}"
        compiled, _ = run_with(data, folder, TRAIN.model_copy(update=update))
        lines, wanted = (read_metrics(place / "metrics.jsonl") for place in (folder, tmp_path / "plain"))
        for found, expected in zip(lines, wanted, strict=True):
            assert found["step"] == expected["step"]
            name = "loss" if found["kind"] == "train" else "kl"
            assert found[name] == pytest.approx(expected[name], rel=1e-4)
        assert all(layer._compiled_call_impl is None for layer in compiled.model.layers)
        for one, other in zip(compiled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


# -- objective, optimizer and schedule ---------------------------------------------------------------------


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_trains(tmp_path: Path, name: str) -> None:
    """The loss falls, and each one is another loss."""
    loss = LossConfig.model_validate({"temperature": 2.0, "final_from": 1.0, "beta": 0.0, "divergence": name})
    data = make_data(tmp_path)
    config = TRAIN.model_copy(update={"epochs": 6, "learning_rate": 0.03})
    _, summary = run_with(data, tmp_path / "run", config, loss)
    losses = [line["kd"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "kd" in line]
    per_epoch = len(losses) // 6
    assert np.mean(losses[-per_epoch:]) < 0.9 * np.mean(losses[:per_epoch])
    assert summary.scores[-1][1].kl < summary.scores[0][1].kl
    run_with(data, tmp_path / "other", TRAIN, loss.model_copy(update={"divergence": "forward_kl"}))
    first = next(line["kd"] for line in read_metrics(tmp_path / "other" / "metrics.jsonl") if "kd" in line)
    assert (first == losses[0]) == (name == "forward_kl")


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
    height = 1.0 - done if config.schedule == "linear" else (1.0 + math.cos(math.pi * max(0.0, done))) / 2.0
    return low + (1.0 - low) * (height if done > 0 else 1.0)


@pytest.mark.parametrize(
    ("schedule", "decay", "warmup"),
    [
        ("cosine", 0.2, 0.1),
        ("linear", 0.2, 0.1),
        ("linear", 0.2, 0.0),
        ("wsd", 0.25, 0.1),
        ("wsd", 1.0, 0.3),
        ("wsd", 0.0, 0.1),
        ("wsd", 0.5, 1.0),
    ],
)
def test_schedules(schedule: str, decay: float, warmup: float) -> None:
    """The rate of every step, and of the one after the last."""
    settings = {"schedule": schedule, "decay": decay, "warmup": warmup, "learning_rate": 0.01, "min_lr": 0.1}
    config = TrainConfig.model_validate(settings)
    optimizer = build_optimizer(fresh_student(), config, 16)
    rates = build_schedule(optimizer, config, 40)
    for step in range(41):
        assert rates.get_last_lr()[0] == pytest.approx(0.01 * expected_rate(config, step, 40)), step
        optimizer.step()
        rates.step()
    if schedule == "wsd" and decay == 0.25:  # and some values by hand
        by_hand = {0: 0.1, 2: 0.55, 4: 1.0, 29: 1.0, 35: 0.55, 40: 0.1}
        for step, height in by_hand.items():
            assert expected_rate(config, step, 40) == pytest.approx(height)


def test_matrices_and_projectors_decay() -> None:
    """Rotations, norms, embeddings and biases do not; DDP's prefix makes no difference."""
    hidden = HiddenStateLoss([(0, 0)], 16, {0: 4}, {0: 1.0})
    module = TrainingModule(make_student(16, 1, 48), Objective(LOSS, hidden))
    decayed, others = build_optimizer(module, TrainConfig(weight_decay=0.2), 16).param_groups
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert decayed["weight_decay"] == 0.2 and others["weight_decay"] == 0.0
    layer, projector = "student.model.layers.0.", "objective.hidden.projectors.0_to_0."
    matrices = {f"self_attn.{letter}_proj" for letter in "qkvo"}
    matrices |= {f"mlp.{kind}_proj" for kind in ("gate", "up", "down")}
    expected = {f"{layer}{matrix}.weight" for matrix in matrices} | {f"{projector}weight"}
    assert {names[id(p)] for p in decayed["params"]} == expected
    assert {names[id(p)] for p in others["params"]} == set(names.values()) - expected
    assert {f"{projector}bias", f"{layer}self_attn.gate.safety", "student.model.embed_tokens.weight"} <= {
        names[id(p)] for p in others["params"]
    }
    for name in names.values():
        assert decays(f"module.{name}") == decays(name) == (name in expected)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "schedule", "step"),
        ("train", "decay", 1.5),
        ("train", "patience", 0),
        ("train", "evaluations", 1),
        ("train", "on_policy", 1.1),
        ("train", "on_policy_temperature", 0.0),
        ("train", "trackers", ["mlflow"]),
        ("train", "accumulation", 0),
        ("loss", "divergence", "kl"),
        ("loss", "js_mixing", 1.0),
        ("loss", "js_mixing", 0.0),
        ("loss", "skew", 1.0),
        ("loss", "gamma", -0.1),
        ("loss", "layer_map", [[0, -1]]),
        ("loss", "layer_map", [[0, 1, 2]]),
    ],
)
def test_settings_out_of_range_are_refused(section: str, key: str, value: object) -> None:
    """By name."""
    with pytest.raises(UserError, match=rf"{section}\.{key}"):
        parse_config({section: {key: value}})


# -- trackers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    """Before anything is trained, with the command that installs it."""
    monkeypatch.setattr(launched, "find_spec", lambda name: None)
    data = make_data(tmp_path)
    with pytest.raises(UserError, match=rf"{tracker}, which is not installed: pip install {tracker}"):
        run_with(data, tmp_path / "run", TRAIN.model_copy(update={"trackers": (tracker,)}))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


class FakeTracker(GeneralTracker):
    """Remembers what it is told."""

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


def test_trackers_are_told_what_metrics_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line of metrics.jsonl under its own name, the settings once, and the end."""
    monkeypatch.setattr(launched, "find_spec", lambda name: SimpleNamespace(name=name))
    asked: list[dict[str, Any]] = []

    def accelerator(**settings: Any) -> Accelerator:
        asked.append(settings)
        return Accelerator(**settings | {"log_with": FakeTracker()})

    monkeypatch.setattr(engine, "Accelerator", accelerator)
    run_with(make_data(tmp_path), tmp_path / "run", TRAIN.model_copy(update={"trackers": ("tensorboard",)}))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    expected = [
        (line["step"], {f"{line['kind']}/{k}": v for k, v in line.items() if k not in ("kind", "step")})
        for line in lines
    ]
    assert FakeTracker.logged == expected and len(expected) > 10
    assert FakeTracker.settings["learning_rate"] == 0.01 and FakeTracker.settings["schedule"] == "cosine"
    assert FakeTracker.finished == [True]
    assert (
        asked[0]["log_with"] == ["tensorboard"] and asked[0]["project_dir"] == tmp_path / "run" / "trackers"
    )


def test_tensorboard(tmp_path: Path) -> None:
    """Where it is installed, its files hold the loss of every step."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TRAIN.model_copy(update={"trackers": ("tensorboard",)})
    run_with(make_data(tmp_path), tmp_path / "run", config)
    losses = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    found: dict[int, float] = {}
    for folder in {path.parent for path in (tmp_path / "run" / "trackers").rglob("events.*")}:
        events = EventAccumulator(str(folder)).Reload()
        if "train/loss" in events.Tags()["scalars"]:
            found |= {event.step: event.value for event in events.Scalars("train/loss")}
    assert found == pytest.approx({line["step"]: line["loss"] for line in losses})
