"""Exported students on safety prompts that nothing was tuned on.

    python -m tools.checks.fresh_safety STUDENT.gguf …

``tools/checks/fresh_safety_prompts.jsonl``: 156 prompts, written before the grammar of
``tools/safety_prompts`` and not looked at while that was made. Whoever looks at which of them fail
has to write others in their place. ``--prompts`` takes other files of the same form.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from distill.heads.prompts import read_prompts
from distill.inference.judge import Judge
from distill.metrics.safety import score_decisions
from distill.reports.run.sections import safety_rows
from students.model.head_decisions import DECISIONS

PROMPTS = Path(__file__).parent / "fresh_safety_prompts.jsonl"
LANGUAGES = ("all", "en", "ja")


def main(students: list[Path], prompts: Annotated[Path, typer.Option()] = PROMPTS) -> None:
    """Every ratio, the expected cost and the calibration error of each student, by language."""
    labelled = read_prompts(prompts, divided=False)
    labels = torch.tensor([prompt.decision for prompt in labelled])
    for path in students:
        with Judge(path) as judge:
            result = judge.judge([prompt.text for prompt in labelled])
        decisions = torch.tensor([DECISIONS.index(one.decision or "") for one in result])
        chances = torch.tensor([list((one.probabilities or {}).values()) for one in result])
        for language in LANGUAGES:
            mine = torch.tensor([language in ("all", prompt.language) for prompt in labelled])
            score = score_decisions(chances[mine], labels[mine], decisions[mine])
            table = Table("", "share", "cases", "95 % interval", title=f"{path}, {language}")
            for row in safety_rows(score):
                table.add_row(*row)
            table.add_row("Calibration Error", f"{score.calibration_error:.3f}", "", "")
            Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
