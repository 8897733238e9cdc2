"""The training loop: the same after an interruption, the same for the same seed, stopped before damage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distill import checkpoint, clock, engine
from distill.batches import split
from distill.config import GuardConfig, LossConfig, TrainConfig
from distill.engine import TrainingData, train
from distill.errors import TrainingAborted, UserError
from distill.held_out import evaluation_steps, held_out_score
from distill.metrics import MetricsFile
from distill.objective import Objective
from distill.schedule import build_optimizer, build_schedule
from distill.training_module import TrainingModule
from students import so8
from students.model import SO8TForCausalLM
from teachers.recipe import Recipe
from teachers.store import SoftTargetStore
from tests.conftest import BigramTeacher, make_student, write_store
from tests.test_losses import reference_bucket_kl

VOCAB, WIDTH = 48, 16
RECIPES = {
    "buckets": Recipe(num_topk=8),
    "sketch": Recipe(num_topk=8, sketch_bytes=10),
    "hidden": Recipe("hidden"),
    "dense": Recipe("dense"),
}
LOSS = LossConfig(temperature=2.0)
TRAIN = TrainConfig(epochs=2, batch_size=4, evaluations=4, learning_rate=0.01, precision="fp32")
UNGUARDED = TRAIN.model_copy(update={"guard": GuardConfig(enabled=False)})


def read_metrics(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_store(folder: Path, seed: int = 0, sequences: int = 24, kind: str = "buckets") -> SoftTargetStore:
    """A store with the answers of a fixed random bigram teacher."""
    random = np.random.default_rng(seed)
    rows = [random.integers(0, VOCAB, size=random.integers(4, 14)).astype(np.int32) for _ in range(sequences)]
    return write_store(folder, BigramTeacher(VOCAB, WIDTH, seed=seed), rows, RECIPES[kind], 10, seed=seed)


def make_data(tmp_path: Path, seed: int = 0, kind: str = "buckets") -> TrainingData:
    store = make_store(tmp_path / f"store-{seed}-{kind}", seed, kind=kind)
    return TrainingData(store, split(store, 0.2, 0), 0)


def fresh_student() -> SO8TForCausalLM:
    return make_student(16, 2, VOCAB)


def weights(student: SO8TForCausalLM) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in student.state_dict().items()}


def run(data: TrainingData, folder: Path, config: TrainConfig = TRAIN, report=lambda step, text: None):
    student = fresh_student()
    folder.mkdir(exist_ok=True)
    return student, train(student, data, Objective(LOSS), config, folder, report)


@pytest.mark.parametrize("kind", RECIPES)
def test_training_learns_and_logs(tmp_path: Path, kind: str) -> None:
    """Held-out KL falls, every step is logged with its parts, rotations stay exact and do not commute."""
    config = TRAIN.model_copy(update={"epochs": 12})
    student, summary = run(make_data(tmp_path, kind=kind), tmp_path / "run", config)
    first, last = summary.scores[0][1], summary.scores[-1][1]
    assert last.kl < first.kl * 0.9 and summary.scores[0][0] == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, summary.steps + 1))
    parts = ("kd", "ce", "pet", "inertia", "non_commutation")
    final = steps[-1]
    assert final["loss"] == pytest.approx(sum(float(final.get(part, 0.0)) for part in parts), rel=1e-4)
    rotations = student.rotations().detach()
    assert float(so8.orthogonality_error(rotations).max()) <= 1e-5
    assert float(so8.commutator_norm(rotations[:, 1], rotations[:, 0]).min()) > 0


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    """Two runs give byte-identical weights."""
    data = make_data(tmp_path)
    assert weights(run(data, tmp_path / "a")[0]) == weights(run(data, tmp_path / "b")[0])


class Killed(BaseException):
    """Stands for a signal that ends the process."""


def save_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint before every step."""
    monkeypatch.setattr(clock, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(clock, "SAVING_SHARE", float("inf"))


@pytest.mark.parametrize(
    ("kill_at", "kind"), [(1, "buckets"), (4, "buckets"), (7, "sketch"), (10, "buckets"), (10, "hidden")]
)
def test_an_interrupted_run_continues_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int, kind: str
) -> None:
    """Killed at any step and started again: the final weights are those of the uninterrupted run."""
    save_all_the_time(monkeypatch)
    data = make_data(tmp_path, kind=kind)
    whole, summary = run(data, tmp_path / "whole")

    def killer(step: int, text: str) -> None:
        if step == kill_at:
            raise Killed

    with pytest.raises(Killed):
        run(data, tmp_path / "cut", report=killer)
    continued, second = run(data, tmp_path / "cut")
    assert weights(continued) == weights(whole)
    assert second.scores == summary.scores
    assert second.continued_from == kill_at - 1
    logged = [
        line["step"] for line in read_metrics(tmp_path / "cut" / "metrics.jsonl") if line["kind"] == "train"
    ]
    assert logged == list(range(1, summary.steps + 1))


def test_a_run_killed_after_training_has_nothing_left_to_train(tmp_path: Path) -> None:
    """Started again after the last step, it returns the same weights and the whole history."""
    data = make_data(tmp_path)
    student, summary = run(data, tmp_path / "run")
    again, second = run(data, tmp_path / "run")
    assert weights(again) == weights(student)
    assert second.scores == summary.scores and second.continued_from == summary.steps


def test_checkpoints_are_also_written_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With evaluations far apart, time alone asks for a checkpoint; the weights stay the same."""
    data = make_data(tmp_path)
    expected = weights(run(data, tmp_path / "a")[0])
    save_all_the_time(monkeypatch)
    saved: list[int] = []
    real = engine.save_checkpoint
    monkeypatch.setattr(
        engine,
        "save_checkpoint",
        lambda folder, state, key, finished: (
            saved.append(state.step) or real(folder, state, key, finished=finished)
        ),
    )
    student, summary = run(data, tmp_path / "b")
    assert saved == list(range(summary.steps + 1)) and weights(student) == expected


def test_accumulation_gives_the_same_trajectory(tmp_path: Path) -> None:
    """One batch of 4 and four micro-batches of 1 end at the same weights (float32 rounding)."""
    data = make_data(tmp_path)
    whole, _ = run(data, tmp_path / "a")
    parts, _ = run(data, tmp_path / "b", TRAIN.model_copy(update={"accumulation": 4}))
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(one, other, atol=2e-4)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_steps_never_reach_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Without the guard, a NaN loss or gradient at step 3 stops the run with the weights of step 3 and the checkpoint
    kept. (With it: tests/test_guarded_training.py.)"""
    seen: dict[str, object] = {}
    real = Objective.forward

    def poisoned(self, student, batch, **rest):  # type: ignore[no-untyped-def]
        loss, parts = real(self, student, batch, **rest)
        seen["calls"] = int(seen.get("calls", 0)) + 1  # type: ignore[call-overload]
        if seen["calls"] == 4:
            seen["before"] = weights(student)
            if where == "loss":
                return loss * float("nan"), parts
            parameter = next(student.parameters())
            parameter.register_hook(lambda gradient: gradient * float("inf"))
        return loss, parts

    monkeypatch.setattr(Objective, "forward", poisoned)
    save_all_the_time(monkeypatch)
    student = fresh_student()
    (tmp_path / "run").mkdir()
    with pytest.raises(TrainingAborted, match=r"step 3.*not finite"):
        train(
            student,
            make_data(tmp_path),
            Objective(LOSS),
            UNGUARDED,
            tmp_path / "run",
            lambda step, text: None,
        )
    assert weights(student) == seen["before"]
    assert checkpoint.latest_checkpoint(tmp_path / "run" / "checkpoints") is not None


def test_checkpoints_are_whole_and_only_two_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails midway leaves no visible checkpoint and the earlier ones untouched."""
    save_all_the_time(monkeypatch)
    data = make_data(tmp_path)
    run(data, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    before = sorted(path.name for path in folder.iterdir())
    assert len(before) == 2
    student = fresh_student()
    optimizer = build_optimizer(student, TRAIN, WIDTH)
    schedule = build_schedule(optimizer, TRAIN, 8)
    state = checkpoint.TrainingState(student, optimizer, schedule, Objective(LOSS), step=99)

    def full(path: Path, content: bytes) -> None:
        if path.name == "training.safetensors":
            raise OSError(28, "No space left on device")
        path.write_bytes(content)

    monkeypatch.setattr(checkpoint, "write_whole", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save_checkpoint(folder, state, "key")
    assert sorted(path.name for path in folder.iterdir()) == before


def test_damaged_or_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    """A truncated file and a checkpoint of other soft targets: one clear refusal, the folder named."""
    run(make_data(tmp_path), tmp_path / "run")
    with pytest.raises(UserError, match="other soft targets"):
        run(make_data(tmp_path, seed=1), tmp_path / "run")
    newest = checkpoint.latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    model = newest / "model.safetensors"
    model.write_bytes(model.read_bytes()[:200])
    with pytest.raises(UserError, match=newest.name):
        run(make_data(tmp_path), tmp_path / "run")


@pytest.mark.parametrize("kind", RECIPES)
def test_the_held_out_score_is_what_it_says(tmp_path: Path, kind: str) -> None:
    """KL over k + 1 buckets for compact targets and over everything for others, agreement and cross-entropy."""
    data, student = make_data(tmp_path, kind=kind), fresh_student()
    teacher = BigramTeacher(VOCAB, WIDTH, seed=0)
    kl, agreement, surprise = [], [], []
    for index in data.split.held_out:
        tokens = torch.from_numpy(data.store.tokens(int(index)).astype(np.int64))
        with torch.no_grad():
            mine = student(tokens[None, :-1]).logits[0].double()
        theirs = teacher.answers[tokens[:-1]].double()
        pairs = zip(theirs.numpy(), mine.numpy(), strict=True)
        count = 8 if kind in ("buckets", "sketch") else VOCAB
        kl += [reference_bucket_kl(p, q, count, 1.0) for p, q in pairs]
        agreement += (theirs.argmax(-1) == mine.argmax(-1)).tolist()
        surprise += (-mine.log_softmax(-1).gather(-1, tokens[1:, None])).flatten().tolist()
    found = held_out_score(TrainingModule(student, Objective(LOSS)), data.held_out(3, torch.device("cpu")))
    # Compact logits are kept in half precision, hidden states in eight bits.
    assert found.kl == pytest.approx(np.mean(kl), abs={"hidden": 5e-3, "dense": 1e-5}.get(kind, 1e-3))
    assert found.agreement == pytest.approx(np.mean(agreement), abs=0.02 if kind == "hidden" else 1e-9)
    assert found.cross_entropy == pytest.approx(np.mean(surprise), rel=1e-5)


def test_evaluation_steps() -> None:
    """First and last step are always among them; more evaluations than steps do no harm."""
    assert evaluation_steps(100, 5) == {0, 25, 50, 75, 100}
    assert evaluation_steps(2, 12) == {0, 1, 2}


def test_metrics_survive_a_cut_line(tmp_path: Path) -> None:
    """A line cut off by a kill is dropped; values that are not finite become null."""
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, from_step=0) as metrics:
        metrics.write("train", 1, {"loss": 1.0})
        metrics.write("train", 2, {"loss": float("nan")})
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    with MetricsFile(path, from_step=1) as metrics:
        metrics.write("train", 2, {"loss": 0.5})
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1.0, 0.5]
