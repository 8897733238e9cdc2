"""Exported students on safety prompts that nothing was tuned on.

    python -m tools.checks.fresh_safety STUDENT.gguf …

``tools/checks/fresh_safety_prompts.jsonl``: 180 prompts of 30 scenarios, written apart from the
built-in ones after everything about the heads had been settled. Figures on it are not flattered by
any choice.
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
from distill.metrics.safety import confusion_matrix
from students.model.head_decisions import ALLOW, DECISIONS, ESCALATE, REFUSE

PROMPTS = Path(__file__).parent / "fresh_safety_prompts.jsonl"
LANGUAGES = ("all", "en", "ja")


def main(students: list[Path], prompts: Annotated[Path, typer.Option()] = PROMPTS) -> None:
    """Refuse Recall, Escalate Precision, Allow Precision and accuracy of each student, by
    language."""
    labelled = read_prompts(prompts)
    labels = torch.tensor([prompt.decision for prompt in labelled])
    table = Table(
        "student",
        "language",
        "prompts",
        "refuse recall",
        "escalate precision",
        "allow precision",
        "right",
    )
    for path in students:
        with Judge(path) as judge:
            result = judge.judge([prompt.text for prompt in labelled])
        decisions = torch.tensor([DECISIONS.index(one.decision or "") for one in result])
        for language in LANGUAGES:
            mine = torch.tensor([language in ("all", prompt.language) for prompt in labelled])
            counts = confusion_matrix(labels[mine], decisions[mine]).tolist()
            table.add_row(str(path), language, str(int(mine.sum())), *_figures(counts))
    Console(width=140).print(table)


def _figures(counts: list[list[int]]) -> list[str]:
    """Three ratios and the share that is right, with what they are of."""
    of_decision = [sum(row[place] for row in counts) for place in range(len(DECISIONS))]
    pairs = [
        (counts[REFUSE][REFUSE], sum(counts[REFUSE])),
        (counts[ESCALATE][ESCALATE], of_decision[ESCALATE]),
        (counts[ALLOW][ALLOW], of_decision[ALLOW]),
        (sum(counts[place][place] for place in range(len(DECISIONS))), sum(map(sum, counts))),
    ]
    return [f"{right / cases:.1%} of {cases}" if cases else "no case" for right, cases in pairs]


if __name__ == "__main__":
    typer.run(main)
