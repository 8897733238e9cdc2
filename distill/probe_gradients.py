"""One probe batch before the first step: does every trained weight of a student made of a base get a gradient?"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from distill.batches import load_batch
from distill.config import RunConfig
from distill.console import Console
from distill.engine import TrainingData
from distill.gradient_check import GradientReport, check_gradients, gradient_table
from distill.objective import build_objective
from distill.training_module import choose_precision
from students.adapter import AdaptedStudent

SEQUENCES, AMONG = 4, 64  # the longest few of so many: verification looks at some of their positions only


def probe_gradients(
    student: AdaptedStudent, data: TrainingData, config: RunConfig, teacher_layers: int, console: Console
) -> dict[str, Any]:
    """Look at the gradients as training will have them, show them, and return them for ``results.json``.

    Raises:
        GradientsDoNotFlow: a weight gets none, or one of the base does.
    """
    with console.stage("Probe gradients") as stage:
        report = _probe(student, data, config, teacher_layers)
        tensors = sum(row.with_gradient for row in report.kinds)
        stage.finish(f"{tensors} tensors have one, none of them the base's")
    console.rich.print(gradient_table(report))
    return {
        row.kind: {key: value for key, value in asdict(row).items() if key != "kind"} for row in report.kinds
    }


def _probe(
    student: AdaptedStudent, data: TrainingData, config: RunConfig, teacher_layers: int
) -> GradientReport:
    device = student.device
    objective = build_objective(config.loss, data.store, student, teacher_layers, config.seed).to(device)
    lengths = data.store.lengths()
    longest = sorted(data.split.train[:AMONG].tolist(), key=lambda index: -int(lengths[index]))[:SEQUENCES]
    batch = load_batch(data.store, longest)
    if data.prompts is not None:
        batch = replace(batch, prompts=data.prompts.batch(0, data.prompts_together, 0, 1))
    batch = batch.to(device)
    narrow = choose_precision(config.train, student.config.hidden_size, device) == "bf16"

    def loss_of() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=narrow):
            loss: Tensor = objective(student, batch, total=batch.count(), share=1.0, fraction=1.0)[0]
        return loss

    student.checkpoint_activations(bool(config.train.gradient_checkpointing))
    try:
        return check_gradients(student, loss_of)
    finally:
        student.checkpoint_activations(False)
