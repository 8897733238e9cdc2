"""The table at the end of a run, in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.pipeline.final_table import print_table
from distill.runs.folder import RunFolder
from distill.runtime.progress import Console


def test_a_student_may_be_larger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not 0.4 times smaller."""
    folder, scores = RunFolder(tmp_path), {"kl": 1.0, "agreement": 0.5, "perplexity": 2.0}
    student = {"size": "8x1", "quant": "q8_0", "parameters": 100, "file_bytes": 1000}
    for ratio, words in ((6.14, "6.1× smaller"), (1.0, "1.0× smaller"), (0.4, "2.5× larger")):
        folder.write_results(
            {
                "teacher": {"name": "a", "parameters": 123, "file_bytes": 1000 * ratio},
                "student": student,
                "evaluation": {"before": scores, "exported": scores},
                "tokens_per_second": {"student": {"generation": 1.0, "prompt": 1.0}},
            }
        )
        print_table(folder, Console())
        said = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert f"{words} (q8_0)" in said and "1.2× fewer" in said, said
