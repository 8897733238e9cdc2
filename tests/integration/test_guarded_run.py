"""A ``distill run`` of the example teacher with trouble in training: its files and words."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import safetensors.torch
import torch

from distill.losses.batch import Batch
from distill.pipeline import stages
from distill.runs.folder import latest_checkpoint
from distill.training.data import load_batch
from distill.training.engine import train
from students.model.decoder import SO8TForCausalLM
from tests.conftest import Ended, command
from tests.support.report_runs import Page
from tests.support.runs import SMALL
from tests.support.training import spoilt
from tools.robustness.faults import EXPONENT_BIT

pytestmark = pytest.mark.usefixtures("llama_here")

WEIGHT = "model.layers.0.mlp.up_proj.weight"
NAN_AT, FLIP_AT, BACK_TO, STEPS = 9, 37, 25, 48
TARGETS = "batch: targets.topk_logits"

Harm = Callable[[Batch, SO8TForCausalLM, int], Batch]  # what becomes of the batch of a step


def all_spoilt(batch: Batch, student: SO8TForCausalLM, step: int) -> Batch:
    """No batch is sound."""
    return spoilt(batch)


@dataclass
class Wounds:
    """One batch that is not sound, and one bit of a weight that flips."""

    done: bool = False

    def __call__(self, batch: Batch, student: SO8TForCausalLM, step: int) -> Batch:
        if step == FLIP_AT and not self.done:
            self.done = True
            weight = student.get_parameter(WEIGHT).data.view(-1)
            weight[:1].view(torch.int32).bitwise_xor_(1 << EXPONENT_BIT)
        return spoilt(batch) if step == NAN_AT else batch


def run(out: Path, *settings: str, harm: Harm | None = None) -> Ended:
    """A run of the example teacher, 32 wide, 48 steps long."""

    def harmed(job, report, on_policy, *rest):  # type: ignore[no-untyped-def]
        def load(student: SO8TForCausalLM, indices: list[int], step: int) -> Batch:
            return harm(load_batch(job.data.store, indices), student, step)

        return train(job, report, load if harm else on_policy, *rest)

    words = ["--student-size", "32x1", "--samples", "40", "--out", str(out)]
    for setting in (*SMALL, "train.epochs=12", *settings):
        words += ["--set", setting]
    with patch.object(stages, "train", harmed):
        return command("run", *words)


def events_of(out: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "event"]


def words_of(page: Path) -> str:
    return " ".join(" ".join(Page(page.read_text()).words).split())


def assert_sound_checkpoint(out: Path) -> Path:
    found = latest_checkpoint(out / "checkpoints")
    assert found is not None
    tensors = safetensors.torch.load_file(found / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    return found


def assert_one_clean_line(ended: Ended) -> None:
    assert ended.code == 1
    assert ended.complaint.startswith("error: ") and ended.complaint.count("\n") == 1
    assert "Traceback" not in ended.complaint + ended.said


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs lie, and the soft targets that they share."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def wounded(runs: Path) -> tuple[Path, Ended]:
    """A run that was wounded twice."""
    return runs / "wounded", run(runs / "wounded", harm=Wounds())


def test_a_wounded_run_comes_to_its_end(wounded: tuple[Path, Ended]) -> None:
    """Student and results are there, it learnt, and a weight that was 1e36 for a while is not."""
    out, ended = wounded
    assert ended.code == 0 and not ended.complaint
    results = json.loads((out / "results.json").read_text())
    assert results["training"]["steps"] == STEPS
    assert results["evaluation"]["after"]["kl"] < results["evaluation"]["before"]["kl"]
    assert results["proof"]["mean_kl"] <= 5e-3
    weights = safetensors.torch.load_file(out / "student" / "model.safetensors")
    assert max(float(tensor.abs().max()) for tensor in weights.values()) < 100


def test_what_happened_is_logged_and_said(wounded: tuple[Path, Ended]) -> None:
    """Two events, batch and weight named, in metrics.jsonl and word for word on the console."""
    out, ended = wounded
    skipped, undone = events_of(out)
    assert (skipped["step"], skipped["action"], skipped["tensor"]) == (NAN_AT, "skip_step", TARGETS)
    assert len(skipped["batch"]) == 8
    assert (undone["step"], undone["action"], undone["to_step"]) == (FLIP_AT, "rollback", BACK_TO)
    assert undone["tensor"] == WEIGHT
    for event in (skipped, undone):
        shown = ", ".join(map(str, event["batch"][:6]))
        assert f"! {event['words']} (sequences {shown} and 2 more)" in ended.said


def test_the_report_shows_what_happened(wounded: tuple[Path, Ended]) -> None:
    """In the terminal, as JSON and on the run's page: events, what was named, steps taken back."""
    out, _ = wounded
    events = events_of(out)
    with patch.dict("os.environ", {"COLUMNS": "400"}):
        printed = command("report", out).said
    told = json.loads(command("report", out, "--json").said)
    page = words_of(out / "report.html")
    for text in (printed, page):
        assert (
            "1 step skipped, 1 rollback" in text
            and "Training recovered and came to its end." in text
        )
        assert f"rollback to step {BACK_TO}" in text and TARGETS in text and WEIGHT in text
        assert all(event["words"] in text for event in events)
    for ours, theirs in zip(told["events"], events, strict=True):
        assert all(ours[name] == theirs[name] for name in ("step", "action", "tensor"))
    assert told["undone"] == FLIP_AT - BACK_TO and told["state"] == "finished"
    assert told["events"][0]["batch"] == events[0]["batch"]


def test_without_a_sound_batch_a_run_ends_and_is_no_success_the_next_time(runs: Path) -> None:
    """Exit code 1, one line, a report that says so; the same command again makes no student."""
    out = runs / "no-batch"
    first = run(out, harm=all_spoilt)
    assert_one_clean_line(first)
    assert f"not one of {STEPS} steps could be taken" in first.complaint
    assert "batch's targets.topk_logits is not" in first.complaint
    assert_sound_checkpoint(out)
    page = words_of(out / "report.html")
    assert f"{STEPS} steps skipped" in page and "Not one step of training was taken." in page
    second = run(out, harm=all_spoilt)
    assert_one_clean_line(second)
    assert second.complaint == first.complaint and len(events_of(out)) == STEPS
    assert not (out / "results.json").exists() and not (out / "student.gguf").exists()


def test_a_rate_that_always_explodes_ends_a_run_each_time(runs: Path) -> None:
    """Exit code 1, one line, the last good state saved, a report that says so.

    The same command tries from there, and gives up again.
    """
    out = runs / "explodes"
    for times in (1, 2):
        ended = run(out, "train.learning_rate=1e6")
        assert_one_clean_line(ended)
        assert "repeated rollbacks did not help" in ended.complaint
        assert "try a lower train.learning_rate" in ended.complaint
        events = events_of(out)
        assert [event["action"] for event in events].count("abort") == times
        assert events[-1]["words"] in ended.said and events[-1]["words"] in ended.complaint
        saved = assert_sound_checkpoint(out)
        assert int(saved.name.removeprefix("step-")) == events[-1]["to_step"]
        page = words_of(out / "report.html")
        assert f"It gave up at step {events[-1]['step']}." in page
        assert events[-1]["words"] in page
    assert not (out / "results.json").exists()
