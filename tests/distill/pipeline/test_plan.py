"""What ``distill plan`` says beforehand against what a run then leaves."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distill.capture.corpus import build_corpus
from distill.capture.teachers import open_teacher
from distill.config.loading import load_config
from distill.config.schema import RunConfig
from distill.errors import UserError
from distill.pipeline.budget.budget import settle
from distill.pipeline.budget.costs import expected_costs
from distill.pipeline.budget.measure import Measured, measure
from distill.pipeline.budget.teacher_copy import TeacherCopy, with_copy
from distill.pipeline.plan import plan_run
from distill.pipeline.preflight import check_plan
from distill.pipeline.run import run
from distill.runs.folder import RunPaths
from distill.runtime.progress import Console
from teachers import example_teacher
from tests.support.real import real_teacher

pytestmark = pytest.mark.usefixtures("llama_here")

QUICK = ["train.epochs=1", "safety.labels=none", "train.evaluations=2", "student.init=random"]


def written(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "name",
    ["example", pytest.param("gemma3", marks=pytest.mark.slow)],
)
def test_disk(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that lies there afterwards, soft targets and what the store keeps of its teacher apart,
    is within 10 %: text of the teacher's own, or given text and a large vocabulary."""
    monkeypatch.chdir(tmp_path)
    settings = {"teacher.path": str(example_teacher()), "student.size": "64x2", "data.samples": 96}
    if name != "example":
        (tmp_path / "data.txt").write_text("The harbour wakes before the town does. " * 300)
        settings |= {
            "teacher.path": str(real_teacher(name)),
            "data.path": "data.txt",
            "data.samples": 24,
        }
    config = load_config(None, settings, [*QUICK, "data.max_length=128"])
    plan = plan_run(config, Console())
    assert {path.name for path in tmp_path.iterdir()} <= {"data.txt"}
    folder = run(config, RunPaths(out=tmp_path / "made" / "run"), Console())
    stores = written(tmp_path / "made" / "stores")
    for what, planned, found in (
        ("store", plan.disk.targets + plan.disk.teacher, stores),
        ("run", plan.disk.total - plan.disk.targets - plan.disk.teacher, written(folder.path)),
        ("all", plan.disk.total, written(tmp_path / "made")),
    ):
        assert planned == pytest.approx(found, rel=0.1), (what, planned, found)
    assert plan.store_bytes <= plan.store_limit


def pretend_speeds(monkeypatch: pytest.MonkeyPatch, f16: float, bf16: float) -> None:
    """Tokens a second with copies of the example teacher; with its file 100."""
    speeds = {"Q8_0": 100.0, "F16": f16, "BF16": bf16}
    monkeypatch.setattr(
        "distill.pipeline.budget.teacher_copy.scoring_speed",
        lambda teacher, sequences: speeds[teacher.computed.tensors["token_embd.weight"].type.name],
    )


def of_orders(
    folder: Path, monkeypatch: pytest.MonkeyPatch, without: Sequence[str] = ()
) -> RunConfig:
    """A run on eight conversations in the ``folder``, quick but for some settings."""
    monkeypatch.chdir(folder)
    rows = [{"prompt": f"Please order {n} boxes. " * 3, "completion": "Ordered."} for n in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"teacher.path": str(example_teacher()), "student.size": "32x1"}
    quick = [one for one in QUICK if one.partition("=")[0] not in without]
    return load_config(None, settings | {"data.path": "rows.jsonl"}, quick)


def test_share_that_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of conversations: the answers' tokens, as the store then holds them. The fastest copy of the
    teacher in floating point is recommended where it is faster by far."""
    pretend_speeds(monkeypatch, f16=180.0, bf16=250.0)
    config = of_orders(tmp_path, monkeypatch)
    plan = plan_run(config, Console())
    with open_teacher(config.teacher) as teacher:
        corpus = build_corpus(config.data, teacher, 0)
    learnt = sum(int(item.keep.sum()) for item in corpus.items if item.keep is not None)
    share = learnt / sum(len(item.segments[0]) for item in corpus.items)
    assert 0.0 < share < 0.5 and plan.trained_share == pytest.approx(share)
    said = " ".join(capsys.readouterr().out.split())
    assert f"{share:.0%} trained on" in said
    assert "2.5 times as fast with --set teacher.weights_as=bf16, which takes 9.6 MB" in said


def test_a_budget_captures_with_what_is_fastest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy that is faster by far is part of what is decided, and of what is reckoned with; the
    evaluation runs the file all the same. What passed since the command began is not to spend."""
    config = of_orders(tmp_path, monkeypatch, without=("train.epochs",))
    data = check_plan(config, budget=600.0).take_data()
    measured: list[Measured] = []

    def measure_once(*given: Any) -> Measured:
        measured[:] = measured or [measure(*given)]
        return measured[0]

    monkeypatch.setattr("distill.pipeline.budget.budget.measure", measure_once)
    for f16, bf16, kind in ((180.0, 250.0, "bf16"), (200.0, 150.0, "f16"), (110.0, 90.0, None)):
        pretend_speeds(monkeypatch, f16, bf16)
        settled, _ = settle(config, 600.0, data, None, Console())
        assert settled.teacher.weights_as == kind
        assert (f"teacher.weights_as={kind}" in capsys.readouterr().out) == (kind is not None)
    with pytest.raises(UserError, match="10 min are too short"):
        settle(config, 600.0, data, None, Console(began=time.time() - 595))
    plain = expected_costs(measured[0], None, 0.0, 600.0)
    copied = with_copy(measured[0], TeacherCopy("bf16", 2.5, 0))
    copying = expected_costs(copied, None, 0.0, 600.0)
    assert copying.capture == pytest.approx(plain.capture / 2.5)
    assert copying.evaluation == pytest.approx(plain.evaluation)
    assert copying.export == pytest.approx(plain.export)
