"""The checks for a real GPU, run at tiny sizes on the pretended one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.support.pretended_gpu import DEVICE, training_on_gpu
from tests.support.runs import SMALL
from tools.bench.step import StepJob
from tools.checks import gpu
from tools.checks.gpu import CHECKS, Sizes, run_checks, show
from tools.models.random_teacher import Shape

ROOT = Path(__file__).parents[2]
TINY = Sizes(
    demo=("student.size=32x1", "data.samples=40", *SMALL),
    gpu_layers=0,
    base_width=192,
    base_layers=2,
    four_bits=False,
    length=32,
    step=StepJob(
        size="32x1", batch=2, tokens=9, vocab_size=600, teacher_width=64, precision="fp32"
    ),
    product_rows=64,
    teacher=Shape(width=64, layers=1, feed_forward=96, heads=2, vocab_size=600),
    sequences=4,
)


@pytest.mark.usefixtures("llama_here")
@pytest.mark.parametrize("name", CHECKS)
def test_checks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each runs to its end on another device than the processor, and says what it found."""
    # What the estimate leaves out (adapters' temporaries) is a fifth of a model this small.
    monkeypatch.setattr(gpu, "ESTIMATE_OFF", 0.5)
    with training_on_gpu():
        figures = CHECKS[name][0](TINY, DEVICE, tmp_path)
    assert figures and all(value or value == 0 for value in figures.values())
    if "estimate / peak" in figures:
        assert float(figures["peak"]) > 0


def test_one_that_fails_or_hangs_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each ended with is in the table."""
    monkeypatch.setattr(gpu, "CHECKS", {name: (check, 5.0) for name, (check, _) in CHECKS.items()})
    ends = {
        "demo": "raise SystemExit('it broke')",
        "base": "import time; time.sleep(60)",
        "step": "import os; os.kill(os.getpid(), 9)",
    }

    def command(name: str, answer: Path) -> list[str]:
        writes = f"open({str(answer)!r}, 'w').write('{{\"rate\": 12.5}}')"
        return [sys.executable, "-c", ends.get(name, writes)]

    outcomes = {one.name: one for one in run_checks(tmp_path, command)}
    assert outcomes["demo"].problem == "exit code 1: it broke"
    assert outcomes["base"].problem == "was not done after 5 s"
    assert outcomes["step"].problem == "exit code -9"
    assert outcomes["capture"].problem == "" and outcomes["capture"].figures == {"rate": 12.5}
    console = Console(record=True, width=100)
    show(list(outcomes.values()), console)
    text = console.export_text()
    assert "it broke" in text and "passed" in text and "rate 12.5" in text


def test_without_cuda() -> None:
    """One line, exit code 2."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    command = [sys.executable, "-m", "tools.checks.gpu"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 2 and ended.stdout.count("\n") == 1
    assert "no CUDA device" in ended.stdout
