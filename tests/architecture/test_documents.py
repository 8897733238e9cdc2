"""What documents show as code runs as it stands, and prints what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_guard_in_somebody_elses_loop() -> None:
    """The example of docs/stability.md."""
    text = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    printed = re.search(r"It prints one line: `(.*?)`", text)
    assert code is not None and printed is not None
    answer = subprocess.run(
        [sys.executable, "-c", code[1]], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert answer.stdout.strip() == printed[1]
