"""What ``tests/test_distributed.py`` starts in several processes: training runs on a store that exists.

python -m tests.train_child STORE FOLDER SETTINGS.json

SETTINGS.json holds the settings of each run by name; a run's results lie in FOLDER/NAME.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import safetensors.torch
from accelerate import PartialState

from distill import clock
from distill.batches import split
from distill.checkpoint import plain_weights
from distill.config import LossConfig, TrainConfig
from distill.engine import TrainingData, train
from distill.objective import build_objective
from distill.prompt_set import PromptSet
from distill.safety_prompts import SafetyPrompt
from teachers.manifest import read_manifest
from teachers.store import SoftTargetStore
from tests.conftest import make_student

LOSS = LossConfig(temperature=2.0, gamma=1.0)


OURS = ("stop_at", "untied", "heads")


class Stopped(Exception):
    """Stands for the end of all processes of a launch."""


def make_prompts(vocab_size: int) -> PromptSet:
    """Seven prompts of different lengths, labelled in turn."""
    labels = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.1, 0.2, 0.7)]
    tokens = [np.arange(3, 5 + n, dtype=np.int32) * (n + 1) % vocab_size for n in range(7)]
    return PromptSet([SafetyPrompt(str(n), str(n), "", labels[n % 3]) for n in range(7)], tokens, 1)


def run(store_folder: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Train a student that is 16 wide, and let the first process write what came of it.

    ``stop_at`` among the settings: only until after that step, with a checkpoint before every one; ``untied``: a
    student with an output matrix of its own; ``heads``: one with both heads, and prompts in every step.
    """
    stop_at, untied, heads = (
        settings.get("stop_at"),
        settings.get("untied", False),
        settings.get("heads", False),
    )
    store = SoftTargetStore(store_folder, read_manifest(store_folder))
    vocab_size = int(store.manifest.identity["vocab_size"])
    prompts = make_prompts(vocab_size) if heads else None
    data = TrainingData(store, split(store, 0.2, 0), 0, prompts, 1, 3)
    student = make_student(16, 2, vocab_size, tied=not untied, heads=heads)
    objective = build_objective(LOSS, store, student, teacher_layers=2, seed=0)
    config = TrainConfig.model_validate({k: v for k, v in settings.items() if k not in OURS})

    def report(step: int, text: str) -> None:
        if step == stop_at:
            raise Stopped

    folder.mkdir(parents=True, exist_ok=True)
    how_often = {"CHECKPOINT_SECONDS": 0.0, "SAVING_SHARE": float("inf")} if stop_at else {}
    try:
        with patch.multiple(clock, **how_often) if how_often else nullcontext():
            summary = train(student, data, objective, config, folder, report)
    except Stopped:
        return
    if PartialState().is_main_process:
        safetensors.torch.save_file(plain_weights(student), folder / "final.safetensors")
        content = {"best": summary.best, "steps": summary.steps, "continued_from": summary.continued_from}
        (folder / "summary.json").write_text(json.dumps(content))


def main() -> None:
    """All runs of the settings file, one after another."""
    store, folder, settings = (Path(argument) for argument in sys.argv[1:])
    PartialState(cpu=True)
    for name, values in json.loads(settings.read_text()).items():
        run(store, folder / name, values)


if __name__ == "__main__":
    main()
