"""The training loop: the same after an interruption or for a seed, stopped before damage."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.errors import TrainingAborted, UserError
from distill.losses.objective import Objective
from distill.runs import folder
from distill.runtime.cpu import onednn_for_float32
from distill.training import checkpoint, distributed, engine
from distill.training.data import TrainingData
from distill.training.distributed import TrainingModule
from distill.training.engine import TrainingJob, train
from distill.training.optimizer import build_optimizer, build_schedule
from distill.training.validation import evaluation_steps, validation_score, weighing_steps
from students.model import so8
from students.model.decoder import SO8TForCausalLM
from tests.support.references import reference_bucket_kl
from tests.support.teachers import BigramTeacher
from tests.support.training import (
    LOSS,
    RECIPES,
    TRAIN,
    UNGUARDED,
    VOCAB,
    WIDTH,
    Killed,
    Result,
    fresh_student,
    killer,
    logged_steps,
    make_data,
    read_metrics,
    run_with,
    save_all_the_time,
    weights,
)


@pytest.mark.parametrize("kind", RECIPES)
def test_training_learns_and_logs(tmp_path: Path, kind: str) -> None:
    """The validation KL falls, every step is logged, rotations stay exact and do not commute."""
    config = TRAIN.model_copy(update={"epochs": 12})
    student, summary = run_with(make_data(tmp_path, kind=kind), tmp_path / "run", config)
    (begin, first), *_, (_, last) = summary.scores
    assert last.kl < first.kl * 0.9 and begin == 0
    assert logged_steps(tmp_path / "run") == list(range(1, summary.steps + 1))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    final = [line for line in lines if line["kind"] == "train"][-1]
    parts = ("kd", "ce", "pet", "inertia", "non_commutation")
    total = sum(float(final.get(part, 0.0)) for part in parts)
    assert final["loss"] == pytest.approx(total, rel=1e-4)
    rotations = student.rotations().detach()
    assert float(so8.orthogonality_error(rotations).max()) <= 1e-5
    assert float(so8.commutator_norm(rotations[:, 1], rotations[:, 0]).min()) > 0


def test_the_same_run_again(tmp_path: Path, data: TrainingData, whole: Result) -> None:
    """The same bytes elsewhere; nothing left to train in the same folder, with the whole history.

    Other soft targets and a truncated file are refused, and the checkpoint named.
    """
    for continued_from in (0, whole[1].steps):
        student, summary = run_with(data, tmp_path / "run")
        assert weights(student) == weights(whole[0]), continued_from
        assert summary.scores == whole[1].scores, continued_from
        assert summary.continued_from == continued_from
    with pytest.raises(UserError, match="other soft targets"):
        run_with(make_data(tmp_path, seed=1), tmp_path / "run")
    newest = folder.latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    model = newest / "model.safetensors"
    model.write_bytes(model.read_bytes()[:200])
    with pytest.raises(UserError, match=newest.name):
        run_with(data, tmp_path / "run")


@pytest.mark.parametrize(
    ("kind", "kills"), [("buckets", (1, 4, 10)), ("sketch", (7,)), ("hidden", (10,))]
)
def test_an_interrupted_run_continues_bit_for_bit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    kills: tuple[int, ...],
    whole: Result,
) -> None:
    """Killed at any step and started again: the final weights are those of the whole run."""
    save_all_the_time(monkeypatch)
    data = make_data(tmp_path, kind=kind)
    student, summary = whole if kind == "buckets" else run_with(data, tmp_path / "whole")
    for kill_at in kills:
        folder = tmp_path / f"cut-{kill_at}"
        with pytest.raises(Killed):
            run_with(data, folder, kill_at=kill_at)
        continued, second = run_with(data, folder)
        assert weights(continued) == weights(student), kill_at
        assert second.scores == summary.scores, kill_at
        assert second.continued_from == kill_at - 1
        assert logged_steps(folder) == list(range(1, summary.steps + 1)), kill_at


def test_checkpoints_are_also_written_by_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: TrainingData, whole: Result
) -> None:
    """With evaluations far apart, time alone asks for one; the weights stay the same.

    Two are kept. A write that fails midway leaves no visible one and the earlier ones untouched.
    """
    save_all_the_time(monkeypatch)
    saved: list[int] = []
    real = engine.save_checkpoint

    def save(folder: Path, state: checkpoint.TrainingState, *rest: Any, **more: Any) -> Path:
        saved.append(state.step)
        return real(folder, state, *rest, **more)

    monkeypatch.setattr(engine, "save_checkpoint", save)
    student, summary = run_with(data, tmp_path / "run")
    assert saved == list(range(summary.steps + 1)) and weights(student) == weights(whole[0])
    folder = tmp_path / "run" / "checkpoints"
    before = sorted(path.name for path in folder.iterdir())
    assert len(before) == 2
    optimizer = build_optimizer(student, TRAIN, WIDTH)
    schedule = build_schedule(optimizer, TRAIN, 8)
    state = checkpoint.TrainingState(student, optimizer, schedule, Objective(LOSS), step=99)

    def full(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
        if path.name == "training.safetensors":
            raise OSError(28, "No space left on device")
        path.write_bytes(content if isinstance(content, bytes) else b"".join(content))

    monkeypatch.setattr(checkpoint, "write_whole", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save_checkpoint(folder, state, "key")
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_steps_never_reach_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, data: TrainingData
) -> None:
    """Without the guard, NaN at step 3 stops the run with its weights and the checkpoint kept.

    (With it: tests/integration/test_guarded_training.py.)
    """
    before: list[dict[str, bytes]] = []
    real = Objective.forward

    def poisoned(self, student, batch, **rest):  # type: ignore[no-untyped-def]
        loss, parts = real(self, student, batch, **rest)
        before.append(weights(student))
        if len(before) == 4 and where == "loss":
            return loss * float("nan"), parts
        if len(before) == 4:
            parameter = next(student.parameters())
            parameter.register_hook(lambda gradient: gradient * float("inf"))
        return loss, parts

    monkeypatch.setattr(Objective, "forward", poisoned)
    save_all_the_time(monkeypatch)
    student = fresh_student()
    with pytest.raises(TrainingAborted, match=r"step 3.*not finite"):
        train(TrainingJob(student, data, Objective(LOSS), UNGUARDED, tmp_path), killer())
    assert len(before) == 4 and weights(student) == before[3]
    assert folder.latest_checkpoint(tmp_path / "checkpoints") is not None


@pytest.mark.parametrize("kind", RECIPES)
def test_the_score_against_the_reference(tmp_path: Path, kind: str) -> None:
    """KL over k + 1 buckets for compact targets, else over everything; agreement, cross-entropy."""
    data, student = make_data(tmp_path, kind=kind), fresh_student()
    teacher = BigramTeacher(VOCAB, WIDTH, seed=0)
    count = 8 if kind in ("buckets", "sketch") else VOCAB
    kl, agreement, surprise = [], [], []
    for index in data.split.held_out:
        tokens = torch.from_numpy(data.store.tokens(int(index)).astype(np.int64))
        with torch.no_grad():
            mine = student(tokens[None, :-1]).logits[0].double()
        theirs = teacher.answers[tokens[:-1]].double()
        pairs = zip(theirs.numpy(), mine.numpy(), strict=True)
        kl += [reference_bucket_kl(p, q, count, 1.0) for p, q in pairs]
        agreement += (theirs.argmax(-1) == mine.argmax(-1)).tolist()
        surprise += (-mine.log_softmax(-1).gather(-1, tokens[1:, None])).flatten().tolist()
    module = TrainingModule(student, Objective(LOSS))
    found = validation_score(module, data.held_out(3, torch.device("cpu")))
    # Compact logits are kept in half precision, hidden states in eight bits.
    off, other = {"hidden": (5e-3, 0.02), "dense": (1e-5, 1e-9)}.get(kind, (1e-3, 1e-9))
    assert found.kl == pytest.approx(np.mean(kl), abs=off)
    assert found.agreement == pytest.approx(np.mean(agreement), abs=other)
    assert found.cross_entropy == pytest.approx(np.mean(surprise), rel=1e-5)


def test_short_sequences_are_multiplied_by_onednn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: TrainingData
) -> None:
    """On a CPU where that is exact, and for packed rows; long padded ones as PyTorch does it."""
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    with onednn_for_float32():
        quick = settings.fp32_precision
    for longest, packs, wanted in (
        (distributed.SHORT_ON_CPU, False, quick),
        (2, False, before),
        (2, True, quick),
    ):
        monkeypatch.setattr(distributed, "SHORT_ON_CPU", longest)
        monkeypatch.setattr(SO8TForCausalLM, "packs", packs)
        seen, folder = set(), tmp_path / f"{longest}-{packs}"
        folder.mkdir()
        job = TrainingJob(fresh_student(), data, Objective(LOSS), TRAIN, folder)
        train(job, lambda step, text, seen=seen: seen.add(settings.fp32_precision))
        assert seen == {wanted} and settings.fp32_precision == before, (longest, packs)


def test_evaluation_steps() -> None:
    """First and last step are always among them; more evaluations than steps do no harm."""
    assert evaluation_steps(100, 5) == {0, 25, 50, 75, 100}
    assert evaluation_steps(2, 12) == {0, 1, 2}


def test_the_time_beside_the_steps_is_told(data: TrainingData, tmp_path: Path) -> None:
    """Validation and checkpoints took some of the time, and the line says how much."""
    job = TrainingJob(fresh_student(), data, Objective(LOSS), TRAIN, tmp_path)
    summary = train(job, lambda step, text: None)
    assert 0.0 < summary.aside < summary.seconds
    told = f"{summary.aside / summary.seconds:.1%} of the time validation and checkpoints"
    assert told in summary.in_words("validation KL")


def test_matrices_are_weighed_where_training_is_long_enough() -> None:
    """Always at the first and the last point; in between only where that takes a hundredth."""
    points = evaluation_steps(110, 12)
    assert weighing_steps(points, 1.0, 200.0) == {0, 40, 80, 110}
    assert weighing_steps(points, 1.0, 199.0) == {0, 110}
    assert weighing_steps({0, 1, 2}, 1.0, 0.0) == {0, 2}
    assert weighing_steps({0}, 1.0, 0.0) == {0}
