"""Each rendered document of one run, whole: the terminal's text, the page's text, the model card.

After an intended change, write the files again: ``UPDATE_GOLDEN=1 python -m pytest <this file>``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distill import __version__
from distill.reports.card.card import build_card
from distill.reports.run.report import read_report
from distill.runs.folder import RunFolder
from tests.support.report_runs import finished_run, page, printed, sound_page

GOLDEN = Path(__file__).with_name("golden")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return finished_run(tmp_path_factory.mktemp("golden") / "first")


@pytest.mark.parametrize("name", ["terminal.txt", "page.txt", "card.md"])
def test_document(run: RunFolder, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No path of this machine and no version of a package is in the files."""
    monkeypatch.chdir(run.path.parent)
    run = RunFolder(Path(run.path.name))
    if name == "terminal.txt":
        text = printed(run.path, width=160)
    elif name == "page.txt":
        parsed, _ = sound_page(page(read_report(run.path)))
        text = "\n".join(part.strip() for part in parsed.words if part.strip())
    else:
        text = build_card(run)
    text = text.replace(__version__, "VERSION")
    text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    golden = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8"), f"{golden} differs"
