"""Comparisons with other toolkits: one judge for both, the same beginning, errors; TRL itself where
it is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from distill.errors import UserError
from distill.pipeline.run import run
from distill.runs.folder import RunFolder, RunPaths
from distill.runtime.progress import Console
from tests.support.runs import small_config
from tools.machine import child_environment
from tools.peers import equal_time, headline, judge
from tools.peers.judge import folder_scorer, reported
from tools.peers.our_side import prepared_again, write_beginning
from tools.peers.pace import WARMUP, Pace, rate_factor
from tools.peers.trl_environment import ENVIRONMENT_PYTHON, TRAINING, trl_python, version_of_trl

pytestmark = pytest.mark.usefixtures("llama_here")


def tiny_llama(folder: Path, width: int = 16, vocab_size: int = 60) -> Path:
    """A random Llama, saved."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tiny_teacher_path: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with a store beside it, exported without rounding."""
    out = tmp_path_factory.mktemp("peers") / "run"
    config = small_config(tiny_teacher_path, "student.init=teacher", "export.quant=f32")
    return run(config, RunPaths(out=out), Console(quiet=True))


def test_the_judge_agrees_with_the_report_and_both_begin_alike(
    finished: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the exported student through ``transformers`` alone, and of the student before training,
    made again from the run's settings and written for the other side; held-out text stays out."""
    tokens, first = tmp_path / "tokens.json", tmp_path / "first"
    write_beginning(finished.path, tokens, first)
    scores = judge.judge(finished.path, {"ours": finished.plain, "first": first})
    for name, stage in (("ours", "exported"), ("first", "before")):
        expected = reported(finished.path, stage)
        assert scores[name].kl == pytest.approx(expected.kl, rel=1e-3)
        assert scores[name].agreement == pytest.approx(expected.agreement, abs=0.01)
    trained = {tuple(ids) for ids in json.loads(tokens.read_text())}
    held_out = finished.read_held_out(scores_vocabulary(finished)).sequences
    assert trained and not trained & {tuple(ids.tolist()) for ids in held_out}
    judge.main([str(finished.path), str(first)])
    assert "as its report says" in capsys.readouterr().out


def scores_vocabulary(folder: RunFolder) -> int:
    """How many tokens the run's teacher has."""
    return int(folder.read_results()["teacher"]["vocab_size"])


def test_what_cannot_be_compared_is_refused(
    finished: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what, where, and what to do."""
    (tmp_path / "empty").mkdir()
    other = tiny_llama(tmp_path / "other")
    for call, words in (
        (lambda: judge.judge(tmp_path / "empty", {}), "not a finished run"),
        (lambda: prepared_again(tmp_path / "empty"), "not a finished run"),
        (lambda: folder_scorer(tmp_path / "empty", 60), "no transformers model"),
        (lambda: folder_scorer(other, 61), "60 tokens, the teacher 61"),
        (lambda: trl_python(tmp_path / "nothing"), "pip install trl"),
    ):
        with pytest.raises(UserError, match=words):
            call()
    gguf = str(finished.gguf)
    for arguments, words in (
        (["gone.gguf", "--data", gguf, "--out", "x"], "gone.gguf is not there"),
        ([gguf, "--data", gguf, "--out", "x", "--rates", "3"], "--rates"),
        ([gguf, "--data", gguf, "--out", "x", "--trl-python", sys.executable], "has no TRL"),
    ):
        with pytest.raises(SystemExit):
            equal_time.main(arguments)
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        headline.main(["--only", "trl", "--trl-python", str(tmp_path / "nothing")])
    assert "has no TRL" in capsys.readouterr().err


def test_the_rate_rises_and_falls_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the peak after the warm-up and to zero at the end, of the steps or of the seconds."""
    assert rate_factor(WARMUP) == pytest.approx(1.0) and rate_factor(1.0) == pytest.approx(0.0)
    assert 0 < rate_factor(0.0) < rate_factor(WARMUP / 2) < 1
    assert Pace(None, None).progress(5, 20) == 0.25 and not Pace(None, None).over()
    monkeypatch.setattr("tools.peers.pace.time.time", lambda: 140.0)
    monkeypatch.setattr("tools.peers.pace.time.process_time", lambda: 60.0)
    for pace, share in (
        (Pace(110, 100.0, 10.0), 0.3),
        (Pace(110, None, 10.0), 0.5),
        (Pace(30, None, 10.0), 1.0),
    ):
        assert pace.progress(5, 20) == pytest.approx(share) and pace.over() == (share == 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("random_seed", [None, 1])
def test_trls_own_trainer_learns(random_seed: int | None, tmp_path: Path) -> None:
    """A student that begins at its teacher's weights has no loss, another one loses less at the
    end; the file can be loaded."""
    if version_of_trl(ENVIRONMENT_PYTHON) is None:
        pytest.skip(f"TRL is not installed in {ENVIRONMENT_PYTHON.parent.parent.name}")
    teacher = tiny_llama(tmp_path / "teacher")
    (tmp_path / "tokens.json").write_text(json.dumps([[1, 5, 9, 2, 7], [3, 4, 8], [6, 1, 2, 3]]))
    job: dict[str, Any] = {
        "tokens": str(tmp_path / "tokens.json"),
        "teacher": str(teacher),
        "student": str(teacher),
        "random_seed": random_seed,
        "out": str(tmp_path / "student"),
        "marks": str(tmp_path / "marks.json"),
        "epochs": 20,
        "batch_size": 2,
        "learning_rate": 0.01 if random_seed else 1e-9,
        "precision": "fp32",
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [ENVIRONMENT_PYTHON, *TRAINING, tmp_path / "job.json"]
    subprocess.run(command, check=True, env=child_environment(1))
    marks = json.loads((tmp_path / "marks.json").read_text())
    assert marks["steps"] == 40 and (tmp_path / "student" / "model.safetensors").exists()
    first, last = marks["losses"][0], marks["losses"][-1]
    assert last < first if random_seed else last == pytest.approx(0.0, abs=1e-6)
