"""The guard in the training loop: batches, log, checkpoints, and what is left of trouble after a kill."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import checkpoint
from distill.batches import load_batch
from distill.checkpoint import latest_checkpoint
from distill.config import GuardConfig, LossConfig, TrainConfig
from distill.engine import TrainingData, TrainingSummary, train
from distill.errors import TrainingAborted
from distill.objective import Batch, Objective
from students.model import SO8TForCausalLM
from tests.test_engine import (
    LOSS,
    RECIPES,
    TRAIN,
    UNGUARDED,
    Killed,
    fresh_student,
    make_data,
    read_metrics,
    save_all_the_time,
    weights,
)

LONG = TRAIN.model_copy(
    update={
        "epochs": 6,
        "guard": GuardConfig(snapshot_every=5, snapshots=6, probe_every=10, rewarm=2, recover=5),
    }
)
EXACT = LONG.model_copy(
    update={"guard": GuardConfig(snapshot_every=5, snapshots=6, probe_every=10, rewarm=0, lower=1.0)}
)


def spoilt(batch: Batch) -> Batch:
    """One number of the teacher's answers is none."""
    logits = batch.targets.topk_logits.clone()
    logits[1, 0] = math.nan
    return replace(batch, targets=replace(batch.targets, topk_logits=logits))


@dataclass
class Story:
    """A training with trouble. ``nan``: steps whose batches are not sound, whatever sequences they have; ``zeroed``:
    steps before each of which, once, a layer is zeroed. Everything that is to be seen is kept, also over a kill."""

    data: TrainingData
    folder: Path
    config: TrainConfig = LONG
    nan: tuple[int, ...] = ()
    zeroed: tuple[int, ...] = ()
    kill_at: int = -1
    told: list[str] = field(default_factory=list)
    loaded: list[tuple[int, list[int]]] = field(default_factory=list)
    reported: list[int] = field(default_factory=list)
    done: set[int] = field(default_factory=set)
    on_report: Callable[[int], None] = lambda step: None

    @property
    def plan(self) -> list[list[int]]:
        return self.data.batches(self.config.epochs, self.config.batch_size)

    def batch(self, student: SO8TForCausalLM, indices: list[int], step: int) -> Batch:
        self.loaded.append((step, list(indices)))
        if step in self.zeroed and step not in self.done:
            self.done.add(step)
            for parameter in student.model.layers[1].parameters():
                parameter.data.zero_()
        batch = load_batch(self.data.store, indices)
        bad = step in self.nan and set(indices) <= set(self.plan[step])
        return spoilt(batch) if bad else batch

    def report(self, step: int, text: str) -> None:
        self.reported.append(step)
        self.on_report(step)
        if step == self.kill_at and step not in self.done:
            self.done.add(step)
            raise Killed

    def run(self, loss: LossConfig = LOSS) -> tuple[SO8TForCausalLM, TrainingSummary]:
        self.folder.mkdir(exist_ok=True)
        student = self.student = fresh_student()
        arguments = (self.data, Objective(loss), self.config, self.folder, self.report, self.batch)
        return student, train(student, *arguments, tell=self.told.append)

    def lines(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in read_metrics(self.folder / "metrics.jsonl") if line["kind"] == kind]

    def actions(self) -> list[str]:
        return [line["action"] for line in self.lines("event")]


def save_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint before every step, without waiting for the disk."""
    save_all_the_time(monkeypatch)
    monkeypatch.setattr("os.fsync", lambda file: None)


def is_finite(student: SO8TForCausalLM) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in student.state_dict().values())


# -- nothing is wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "accumulation"), [*((kind, 1) for kind in RECIPES), ("sketch", 2)])
def test_a_healthy_training_is_what_it_would_be_without(tmp_path: Path, kind: str, accumulation: int) -> None:
    """The same bytes and scores with the guard and without, no event, and the same figures in the log."""
    update = {"epochs": 5, "accumulation": accumulation}
    data, found = make_data(tmp_path, kind=kind), []
    for config in (TRAIN, UNGUARDED):
        story = Story(data, tmp_path / str(config.guard.enabled), config.model_copy(update=update))
        student, summary = story.run()
        steps = [
            {k: v for k, v in line.items() if k not in ("kind", "update_ratio")}
            for line in story.lines("train")
        ]
        found.append((weights(student), summary.scores, steps))
        assert story.told == story.lines("event") == []
        assert len(story.lines("probe")) == (1 if config.guard.enabled else 0)
    assert found[0][:2] == found[1][:2] and len(found[0][2]) == 25
    for one, other in zip(found[0][2], found[1][2], strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_probe_and_all_weights_are_in_the_log(tmp_path: Path) -> None:
    """The probe where it is due, the weights' own figures with every held-out score."""
    story = Story(make_data(tmp_path), tmp_path / "run")
    story.run()
    assert [line["step"] for line in story.lines("probe")] == list(range(0, 30, 5))
    assert {"information", "loss", "hidden_rank:model.layers.0"} <= story.lines("probe")[0].keys()
    assert [line["step"] for line in story.lines("weights")] == [
        line["step"] for line in story.lines("held_out")
    ]
    matrix = fresh_student().model.layers[0].self_attn.q_proj.weight
    first = story.lines("weights")[0]
    name = next(name for name in first if name.startswith("norm:") and "layers.0.self_attn.q_proj" in name)
    assert name == "norm:model.layers.0.self_attn.q_proj.weight"
    assert first[name] == pytest.approx(float(matrix.detach().norm()), rel=1e-5)


# -- batches that are not sound ----------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "accumulation"), [(0, 1), (7, 1), (7, 2), (9, 1)])
def test_a_batch_that_is_not_sound_is_left_out(tmp_path: Path, at: int, accumulation: int) -> None:
    """Also in the first step and the last of a training too short for any average: the log and one sentence say which
    sequences; the learning rate goes on as planned."""
    data = make_data(tmp_path)
    config = TRAIN.model_copy(update={"accumulation": accumulation})
    story = Story(data, tmp_path / "run", config, nan=(at,))
    student, summary = story.run()
    (event,) = story.lines("event")
    assert (event["action"], event["step"], event["batch"]) == ("skip_step", at, story.plan[at])
    assert "targets.topk_logits" in event["tensor"] and event["value"] is None
    (sentence,) = story.told
    assert event["words"] in sentence and all(str(index) in sentence for index in story.plan[at])
    assert summary.steps == summary.planned == 10 and is_finite(student)
    train_lines = story.lines("train")
    assert [line["step"] for line in train_lines] == [step for step in range(1, 11) if step != at + 1]
    clean = Story(data, tmp_path / "clean", config)
    clean.run()
    rates = {line["step"]: line["learning_rate"] for line in clean.lines("train")}
    assert {line["step"]: line["learning_rate"] for line in train_lines}.items() <= rates.items()
    learnt = sum(load_batch(data.store, rows).count() for step, rows in enumerate(story.plan) if step != at)
    assert summary.tokens_seen == learnt == train_lines[-1]["tokens_seen"]


def test_a_batch_that_is_set_aside_is_replaced(tmp_path: Path) -> None:
    """After making trouble twice: by an earlier one without trouble, which learns; the log says so."""
    story = Story(make_data(tmp_path), tmp_path / "run", nan=(12,), zeroed=(22, 26))
    student, _ = story.run()
    assert story.actions() == ["skip_step", "rollback", "set_aside", "skip_step", "rollback"]
    aside = story.lines("event")[2]
    assert aside["batch"] == story.plan[12] and aside["value"] == 12.0
    third = [rows for step, rows in story.loaded if step == 12][-1]
    assert third in story.plan[:12] and third != story.plan[12]
    assert 13 in [line["step"] for line in story.lines("train")] and is_finite(student)


def test_where_nothing_is_sound_training_ends(tmp_path: Path) -> None:
    """With words that help, the event in the log, finite weights, and a checkpoint to look at."""
    config = LONG.model_copy(update={"epochs": 8})
    story = Story(make_data(tmp_path), tmp_path / "run", config, nan=tuple(range(12, 40)))
    with pytest.raises(TrainingAborted, match=r"step \d+: the loss is not finite.*learning_rate"):
        story.run()
    last = story.lines("event")[-1]
    assert last["action"] == "abort" and last["to_step"] is not None and last["words"] in story.told[-1]
    assert is_finite(story.student) and story.actions().count("rollback") <= 3
    assert latest_checkpoint(story.folder / "checkpoints") is not None


# -- going back --------------------------------------------------------------------------------------------


def test_damage_is_undone_without_a_trace(tmp_path: Path) -> None:
    """Done again at the learning rate it was, training ends with the weights, scores and tokens of one without."""
    data = make_data(tmp_path)
    clean, expected = Story(data, tmp_path / "clean", EXACT).run()
    for accumulation in (1, 2):
        config = EXACT.model_copy(update={"accumulation": accumulation})
        story = Story(data, tmp_path / f"run-{accumulation}", config, zeroed=(22,))
        student, summary = story.run()
        (event,) = story.lines("event")
        assert event["action"] == "rollback" and 22 <= event["step"] <= 26
        assert event["to_step"] == (event["step"] - 10) // 5 * 5  # the newest with ten steps after it
        assert "model.layers.1." in event["tensor"] and story.told[0].startswith(event["words"])
        if accumulation == 1:
            assert weights(student) == weights(clean)
            assert (summary.scores, summary.tokens_seen) == (expected.scores, expected.tokens_seen)
        again = [line["step"] for line in story.lines("train")]
        assert again == [*range(1, event["step"] + 1), *range(event["to_step"] + 1, 31)]


def test_the_log_is_only_added_to(tmp_path: Path) -> None:
    """Also where training goes back: what was logged stays."""
    story, seen = Story(make_data(tmp_path), tmp_path / "run", zeroed=(22,)), [""]

    def look(step: int) -> None:
        now = (story.folder / "metrics.jsonl").read_text()
        assert now.startswith(seen[-1]) and len(now) > len(seen[-1])
        seen.append(now)

    story.on_report = look
    story.run()
    assert len(seen) > 31 and story.actions() == ["rollback"]


def test_checkpoints_of_what_is_undone_are_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and the state that was gone back to is saved before another step is taken."""
    save_always(monkeypatch)
    story = Story(make_data(tmp_path), tmp_path / "run", zeroed=(22,))
    folders: dict[int, list[str]] = {}

    def look(step: int) -> None:
        if story.told and not folders:
            folders[step] = sorted(path.name for path in (story.folder / "checkpoints").iterdir())

    story.on_report = look
    story.run()
    (event,) = story.lines("event")
    at, to = event["step"], event["to_step"]
    undone = [f"undone-step-{step:06d}" for step in (at - 1, at)]
    assert folders == {to + 1: [f"step-{to:06d}", *undone]}
    left = sorted(path.name for path in (story.folder / "checkpoints").iterdir())
    assert left == ["step-000029", "step-000030", *undone]


@pytest.mark.parametrize("after", [0, 3])
def test_killed_after_going_back_training_ends_as_it_would_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """So many steps after: the same weights, scores and log as without the kill, the lowered rate included."""
    save_always(monkeypatch)
    data = make_data(tmp_path)
    whole = Story(data, tmp_path / "whole", zeroed=(22,))
    expected, summary = whole.run()
    to = whole.lines("event")[0]["to_step"]
    cut = Story(data, tmp_path / "cut", zeroed=(22,))

    def killer(step: int) -> None:
        if cut.told and step == to + 1 + after and -1 not in cut.done:
            cut.done.add(-1)
            raise Killed

    cut.on_report = killer
    with pytest.raises(Killed):
        cut.run()
    student, second = cut.run()
    assert second.continued_from == to + after
    assert weights(student) == weights(expected) and second.scores == summary.scores
    for kind in ("train", "held_out", "event"):
        assert cut.lines(kind) == whole.lines(kind)
    assert len({line["learning_rate"] for line in cut.lines("train") if line["step"] == to + 1}) == 2


def test_killed_while_saving_what_it_went_back_to_training_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between putting later checkpoints aside and the new one being whole there is always one to continue from."""
    save_always(monkeypatch)
    story = Story(make_data(tmp_path), tmp_path / "run", zeroed=(22,))
    real = checkpoint._write

    def write(final: Path, *rest: Any) -> None:
        if story.told and -1 not in story.done:
            story.done.add(-1)
            raise Killed
        real(final, *rest)

    monkeypatch.setattr(checkpoint, "_write", write)
    with pytest.raises(Killed):
        story.run()
    student, summary = story.run()
    assert summary.continued_from > 0 and is_finite(student)


def test_what_is_known_of_batches_survives_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those set aside stay so: continued, training goes on as it would have."""
    save_always(monkeypatch)
    data = make_data(tmp_path)
    whole = Story(data, tmp_path / "whole", nan=(12,), zeroed=(22, 26))
    expected, _ = whole.run()
    cut = Story(data, tmp_path / "cut", nan=(12,), zeroed=(22, 26), kill_at=28)
    with pytest.raises(Killed):
        cut.run()
    saved = latest_checkpoint(cut.folder / "checkpoints")
    assert saved is not None
    state = json.loads((saved / "state.json").read_text())["guard"]
    assert state["set_aside"] == [12] and [12, 2] in state["blamed"]
    student, _ = cut.run()
    assert weights(student) == weights(expected) and cut.lines("event") == whole.lines("event")


def test_continued_without_the_guard_and_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of the one kind continues as the other, to the same bytes where nothing is wrong."""
    save_always(monkeypatch)
    data = make_data(tmp_path)
    expected, _ = Story(data, tmp_path / "whole", TRAIN).run()
    for number, (first, second) in enumerate(((TRAIN, UNGUARDED), (UNGUARDED, TRAIN))):
        story = Story(data, tmp_path / f"cut-{number}", first, kill_at=5)
        with pytest.raises(Killed):
            story.run()
        story.config = second
        student, summary = story.run()
        assert summary.continued_from == 4 and weights(student) == weights(expected)


def test_a_learning_rate_of_zero_is_no_trouble(tmp_path: Path) -> None:
    """Half of training is warm-up, whose first step has none."""
    config = LONG.model_copy(update={"warmup": 0.5, "min_lr": 0.0})
    story = Story(make_data(tmp_path), tmp_path / "run", config)
    story.run()
    assert story.lines("train")[0]["learning_rate"] == 0.0 and story.told == []


def test_rotations_that_are_none_are_undone(tmp_path: Path) -> None:
    """One result of the kernel off the group: found in that step, the gate named, nothing of it left."""
    data = make_data(tmp_path)
    expected, _ = Story(data, tmp_path / "clean", EXACT).run()
    story = Story(data, tmp_path / "run", EXACT)

    def harm(step: int) -> None:
        gate = story.student.model.layers[1].self_attn.gate
        if step == 21 and not story.done:
            story.done.add(step)

            def wrong() -> torch.Tensor:
                del gate.forward
                return 1.01 * gate()

            gate.forward = wrong

    story.on_report = harm
    student, _ = story.run()
    (event,) = story.lines("event")
    assert (event["step"], event["signal"]) == (21, "rotation_error")
    assert event["tensor"] == "model.layers.1.self_attn.gate"
    assert weights(student) == weights(expected)
