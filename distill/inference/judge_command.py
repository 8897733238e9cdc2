"""``distill judge``: decisions on one prompt or a file of them, as a table."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from distill.inference.judge import Judge, Judgment, shown
from distill.runs.audit_events import record_judgments
from distill.runtime.printable import colored, json_line, markup
from distill.runtime.progress import Console


def judge_one(path: Path, prompt: str, as_json: bool, console: Console) -> None:
    """Judge one prompt and print what comes of it."""
    with Judge(path) as judge:
        judgment = judge.judge([prompt])[0]
        _log(path, [judgment])
        name = judge.model.info.name
    if as_json:
        print(json_line(judgment.to_json()))
        return
    console.rich.print(_table(judgment, name))


def judge_all(path: Path, texts: Sequence[str], as_json: bool, console: Console) -> None:
    """Judge every prompt and print one line each."""
    with Judge(path) as judge:
        judgments = judge.judge(texts)
    _log(path, judgments)
    if as_json:
        for judgment in judgments:
            print(json_line(judgment.to_json()))
        return
    table = Table(title=f"{len(judgments)} prompts", title_justify="left")
    for column in ("decision", "probability", "agreement", "prompt"):
        table.add_column(column)
    for judgment in judgments:
        table.add_row(
            colored(judgment.decision),
            _share(judgment.confidence),
            _agreement(judgment),
            markup(shown(judgment.prompt)),
        )
    console.rich.print(table)


def _log(path: Path, judgments: list[Judgment]) -> None:
    """Log the decisions of a run's student before they are shown; warn where that is forbidden."""
    try:
        record_judgments(path, [judgment.to_audit() for judgment in judgments])
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        Console(stderr=True).warn(
            f"{path.parent} cannot be written to ({error.strerror}): the decision is not in "
            "the run's log"
        )


def _table(judgment: Judgment, name: str) -> Table:
    table = Table(title=markup(name), title_justify="left", show_header=False)
    if judgment.probabilities is not None:
        table.add_row("decision", colored(judgment.decision))
        for decision, chance in judgment.probabilities.items():
            table.add_row(decision, f"{chance:6.1%}  {'█' * round(30 * chance)}")
        table.add_row("confidence", f"{_share(judgment.confidence)} that this is right")
    if judgment.agreement is not None:
        table.add_row("answers as the teacher would", _agreement(judgment))
    return table


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _agreement(judgment: Judgment) -> str:
    if judgment.agreement is None:
        return ""
    advice = "  → ask the teacher" if judgment.ask_teacher else ""
    return f"{_share(judgment.agreement)} of its tokens{advice}"
