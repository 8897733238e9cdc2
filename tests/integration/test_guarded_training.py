"""The guard in the training loop: batches, log, checkpoints; trouble and kills together."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config.schema import GuardConfig, LossConfig, TrainConfig
from distill.errors import TrainingAborted
from distill.losses.batch import Batch
from distill.losses.objective import Objective
from distill.runs.folder import latest_checkpoint
from distill.training import checkpoint, validation
from distill.training.data import TrainingData, load_batch
from distill.training.engine import TrainingJob, train
from distill.training.summary import TrainingSummary
from students.model.decoder import SO8TForCausalLM
from tests.support.training import (
    LOSS,
    RECIPES,
    TRAIN,
    UNGUARDED,
    Killed,
    fresh_student,
    make_data,
    read_metrics,
    save_all_the_time,
    spoilt,
    weights,
)

GUARD = GuardConfig(snapshot_every=5, snapshots=6, probe_every=10, rewarm=2, recover=5)
LONG = TRAIN.model_copy(update={"epochs": 6, "guard": GUARD})
AS_IT_WAS = GuardConfig(snapshot_every=5, snapshots=6, probe_every=10, rewarm=0, lower=1.0)
EXACT = LONG.model_copy(update={"guard": AS_IT_WAS})

Clean = tuple[dict[str, bytes], TrainingSummary]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return make_data(tmp_path_factory.mktemp("data"))


@dataclass
class Story:
    """A training with trouble; everything that is to be seen is kept, also over a kill.

    ``nan``: steps whose batches are not sound; ``zeroed``: steps before each of which, once, a
    layer is zeroed; ``kill_at``: the step after which it is killed, once.
    """

    data: TrainingData
    folder: Path
    config: TrainConfig = LONG
    nan: tuple[int, ...] = ()
    zeroed: tuple[int, ...] = ()
    kill_at: int = -1
    told: list[str] = field(default_factory=list)
    loaded: list[tuple[int, list[int]]] = field(default_factory=list)
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
        self.on_report(step)
        if step == self.kill_at and step not in self.done:
            self.done.add(step)
            raise Killed

    def run(self, loss: LossConfig = LOSS) -> tuple[SO8TForCausalLM, TrainingSummary]:
        self.folder.mkdir(exist_ok=True)
        student = self.student = fresh_student()
        job = TrainingJob(student, self.data, Objective(loss), self.config, self.folder)
        return student, train(job, self.report, self.batch, self.told.append)

    def lines(self, kind: str) -> list[dict[str, Any]]:
        lines = read_metrics(self.folder / "metrics.jsonl")
        return [line for line in lines if line["kind"] == kind]

    def each(self, kind: str, name: str) -> list[Any]:
        """One figure of all lines of a kind."""
        return [line[name] for line in self.lines(kind)]

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def clean(data: TrainingData, tmp_path_factory: pytest.TempPathFactory) -> Clean:
    """What training ends with if there is no trouble."""
    student, summary = Story(data, tmp_path_factory.mktemp("clean"), EXACT).run()
    return weights(student), summary


def is_finite(student: SO8TForCausalLM) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in student.state_dict().values())


# -- nothing is wrong


@pytest.mark.parametrize(
    ("kind", "accumulation"), [*((kind, 1) for kind in RECIPES), ("sketch", 2)]
)
def test_a_healthy_training_is_what_it_would_be_without(
    tmp_path: Path, kind: str, accumulation: int
) -> None:
    """The same bytes, scores and figures in the log with the guard and without, and no event."""
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


def test_a_probe_and_all_weights_are_in_the_log(data: TrainingData, tmp_path: Path) -> None:
    """The probe where it is due, the weights' own figures with the first validation point and the
    last: so short a training has no time for more."""
    story = Story(data, tmp_path / "run")
    story.run()
    assert story.each("probe", "step") == list(range(0, 30, 5))
    assert {"information", "loss", "hidden_rank:model.layers.0"} <= story.lines("probe")[0].keys()
    scored = story.each("held_out", "step")
    assert story.each("weights", "step") == [0, 30] == [scored[0], scored[-1]] != scored
    matrix = fresh_student().model.layers[0].self_attn.q_proj.weight
    norm = story.lines("weights")[0]["norm:model.layers.0.self_attn.q_proj.weight"]
    assert norm == pytest.approx(float(matrix.detach().norm()), rel=1e-5)


def test_a_long_training_weighs_more_often(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every fourth validation point; and at the one at which a training stops early."""
    monkeypatch.setattr(validation, "WEIGH_SHARE", 1000.0)
    story = Story(data, tmp_path / "long", LONG.model_copy(update={"evaluations": 11}))
    story.run()
    assert story.each("weights", "step") == [0, 12, 24, 30]
    monkeypatch.setattr(validation, "WEIGH_SHARE", 0.0)
    rate = {"learning_rate": 3.0, "patience": 1}
    story = Story(data, tmp_path / "short", TRAIN.model_copy(update=rate))
    _, summary = story.run()
    assert summary.steps < 30 and story.each("weights", "step") == [0, summary.steps]


# -- batches that are not sound


def test_a_batch_that_is_not_sound_is_left_out(data: TrainingData, tmp_path: Path) -> None:
    """Also in the first step and the last of a training too short for any average.

    The log and one sentence say which sequences; the learning rate goes on as planned.
    """
    healthy = Story(data, tmp_path / "clean", TRAIN)
    healthy.run()
    rates = healthy.each("train", "learning_rate")
    for at, accumulation in ((0, 1), (7, 1), (7, 2), (9, 1)):
        row = f"step {at}, accumulation {accumulation}"
        config = TRAIN.model_copy(update={"accumulation": accumulation})
        story = Story(data, tmp_path / row, config, nan=(at,))
        student, summary = story.run()
        batch, ([event], [sentence]) = story.plan[at], (story.lines("event"), story.told)
        assert (event["action"], event["step"], event["batch"]) == ("skip_step", at, batch), row
        assert "targets.topk_logits" in event["tensor"] and event["value"] is None, row
        assert event["words"] in sentence and all(str(index) in sentence for index in batch), row
        assert summary.steps == summary.planned == 10 and is_finite(student), row
        steps = [step for step in range(1, 11) if step != at + 1]
        assert story.each("train", "step") == steps, row
        assert story.each("train", "learning_rate") == [rates[step - 1] for step in steps], row
        others = [rows for step, rows in enumerate(story.plan) if step != at]
        learnt = sum(load_batch(data.store, rows).count() for rows in others)
        assert summary.tokens_seen == learnt == story.each("train", "tokens_seen")[-1], row


def test_a_batch_that_is_set_aside_is_replaced(data: TrainingData, tmp_path: Path) -> None:
    """After making trouble twice: by an earlier one without, which learns; the log says so."""
    story = Story(data, tmp_path / "run", nan=(12,), zeroed=(22, 26))
    student, _ = story.run()
    actions = ["skip_step", "rollback", "set_aside", "skip_step", "rollback"]
    assert story.each("event", "action") == actions
    aside = story.lines("event")[2]
    assert aside["batch"] == story.plan[12] and aside["value"] == 12.0
    third = [rows for step, rows in story.loaded if step == 12][-1]
    assert third in story.plan[:12] and third != story.plan[12]
    assert 13 in story.each("train", "step") and is_finite(student)


def test_where_nothing_is_sound_training_ends(data: TrainingData, tmp_path: Path) -> None:
    """With words that help, the event in the log, finite weights, and a checkpoint to look at."""
    config = LONG.model_copy(update={"epochs": 8})
    story = Story(data, tmp_path / "run", config, nan=tuple(range(12, 40)))
    with pytest.raises(TrainingAborted, match=r"step \d+: the loss is not finite.*learning_rate"):
        story.run()
    last = story.lines("event")[-1]
    assert last["action"] == "abort" and last["to_step"] is not None
    assert last["words"] in story.told[-1] and is_finite(story.student)
    assert story.each("event", "action").count("rollback") <= 3
    assert latest_checkpoint(story.folder / "checkpoints") is not None


# -- going back


def test_damage_is_undone_without_a_trace(data: TrainingData, clean: Clean, tmp_path: Path) -> None:
    """Done again at the rate it was, training ends with all that one without ends with."""
    for accumulation in (1, 2):
        config = EXACT.model_copy(update={"accumulation": accumulation})
        story = Story(data, tmp_path / f"run-{accumulation}", config, zeroed=(22,))
        student, summary = story.run()
        [event] = story.lines("event")
        at, to = event["step"], event["to_step"]
        assert event["action"] == "rollback" and 22 <= at <= 26, accumulation
        assert to == (at - 10) // 5 * 5, accumulation  # the newest with ten steps after it
        assert "model.layers.1." in event["tensor"] and story.told[0].startswith(event["words"])
        assert story.each("train", "step") == [*range(1, at + 1), *range(to + 1, 31)], accumulation
        if accumulation == 1:
            assert weights(student) == clean[0] and summary.scores == clean[1].scores
            assert summary.tokens_seen == clean[1].tokens_seen


def test_the_log_is_only_added_to_and_checkpoints_are_put_aside(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, and the state that was gone back to is saved before another step is taken."""
    save_all_the_time(monkeypatch)
    story, seen = Story(data, tmp_path / "run", zeroed=(22,)), [""]
    folders: dict[int, list[str]] = {}

    def look(step: int) -> None:
        now = (story.folder / "metrics.jsonl").read_text()
        assert now.startswith(seen[-1]) and len(now) > len(seen[-1])
        seen.append(now)
        if story.told and not folders:
            folders[step] = story.checkpoints()

    story.on_report = look
    story.run()
    [event] = story.lines("event")
    at, to = event["step"], event["to_step"]
    assert len(seen) > 31 and event["action"] == "rollback"
    undone = [f"undone-step-{step:06d}" for step in (at - 1, at)]
    assert folders == {to + 1: [f"step-{to:06d}", *undone]}
    assert story.checkpoints() == ["step-000029", "step-000030", *undone]


def test_killed_after_going_back_training_ends_as_it_would_have(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights, scores and log as without the kill, the lowered rate included."""
    save_all_the_time(monkeypatch)
    whole = Story(data, tmp_path / "whole", zeroed=(22,))
    expected, summary = whole.run()
    to = whole.lines("event")[0]["to_step"]
    for after in (0, 3):
        cut = Story(data, tmp_path / f"cut-{after}", zeroed=(22,))

        def killer(step: int, cut: Story = cut, at: int = to + 1 + after) -> None:
            if cut.told and step == at and -1 not in cut.done:
                cut.done.add(-1)
                raise Killed

        cut.on_report = killer
        with pytest.raises(Killed):
            cut.run()
        student, second = cut.run()
        assert second.continued_from == to + after and second.scores == summary.scores, after
        assert weights(student) == weights(expected), after
        for kind in ("train", "held_out", "event"):
            assert cut.lines(kind) == whole.lines(kind), (after, kind)
        again = [line["learning_rate"] for line in cut.lines("train") if line["step"] == to + 1]
        assert len(set(again)) == 2, after


def test_killed_while_saving_what_it_went_back_to_training_is_not_lost(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While later checkpoints are put aside and the new one is written, one is left."""
    save_all_the_time(monkeypatch)
    story = Story(data, tmp_path / "run", zeroed=(22,))
    real = checkpoint.write_whole

    def write(path: Path, data: bytes) -> None:
        if story.told and -1 not in story.done:
            story.done.add(-1)
            raise Killed
        real(path, data)

    monkeypatch.setattr(checkpoint, "write_whole", write)
    with pytest.raises(Killed):
        story.run()
    student, summary = story.run()
    assert summary.continued_from > 0 and is_finite(student)


def test_what_is_known_of_batches_survives_a_kill(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those set aside stay so: continued, training goes on as it would have."""
    save_all_the_time(monkeypatch)
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


def test_continued_without_the_guard_and_with_it(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of one kind continues as the other, to the same bytes if nothing is wrong."""
    save_all_the_time(monkeypatch)
    expected, _ = Story(data, tmp_path / "whole", TRAIN).run()
    for number, (first, second) in enumerate(((TRAIN, UNGUARDED), (UNGUARDED, TRAIN))):
        story = Story(data, tmp_path / f"cut-{number}", first, kill_at=5)
        with pytest.raises(Killed):
            story.run()
        story.config = second
        student, summary = story.run()
        assert summary.continued_from == 4 and weights(student) == weights(expected)


def test_a_learning_rate_of_zero_is_no_trouble(data: TrainingData, tmp_path: Path) -> None:
    """Half of training is warm-up, whose first step has none."""
    config = LONG.model_copy(update={"warmup": 0.5, "min_lr": 0.0})
    story = Story(data, tmp_path / "run", config)
    story.run()
    assert story.each("train", "learning_rate")[0] == 0.0 and story.told == []


def test_rotations_that_are_none_are_undone(
    data: TrainingData, clean: Clean, tmp_path: Path
) -> None:
    """One result of the kernel off the group: found at once, the gate named, nothing left."""
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
    [event] = story.lines("event")
    assert (event["step"], event["signal"]) == (21, "rotation_error")
    assert event["tensor"] == "model.layers.1.self_attn.gate"
    assert weights(student) == clean[0]
