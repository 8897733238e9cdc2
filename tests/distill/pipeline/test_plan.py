"""What ``distill plan`` says beforehand against what a run then leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.capture.corpus import build_corpus
from distill.capture.teachers import open_teacher
from distill.config.loading import load_config
from distill.pipeline.plan import plan_run
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


def test_share_that_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of conversations: the answers' tokens, as the store then holds them. A copy of the teacher in
    floating point is recommended where it is faster by far."""
    speeds = {"Q8_0": 100.0, "F16": 250.0}
    monkeypatch.setattr(
        "distill.pipeline.plan.scoring_speed",
        lambda teacher, sequences: speeds[teacher.computed.tensors["token_embd.weight"].type.name],
    )
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Please order {n} boxes. " * 3, "completion": "Ordered."} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"teacher.path": str(example_teacher()), "student.size": "32x1"}
    config = load_config(None, settings | {"data.path": "rows.jsonl"}, QUICK)
    plan = plan_run(config, Console())
    with open_teacher(config.teacher) as teacher:
        corpus = build_corpus(config.data, teacher, 0)
    learnt = sum(int(item.keep.sum()) for item in corpus.items if item.keep is not None)
    share = learnt / sum(len(item.segments[0]) for item in corpus.items)
    assert 0.0 < share < 0.5 and plan.trained_share == pytest.approx(share)
    said = " ".join(capsys.readouterr().out.split())
    assert f"{share:.0%} trained on" in said
    assert "2.5 times as fast with --set teacher.weights_as=f16, which takes 9.6 MB" in said
