"""What documents show as code runs as it stands, and prints what they say."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_guard_in_somebody_elses_loop() -> None:
    """The example of docs/stability.md."""
    text = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    printed = re.search(r"It prints one line: `(.*?)`", text)
    assert code is not None and printed is not None
    with redirect_stdout(io.StringIO()) as out:
        exec(code[1], {"__name__": "__main__"})
    assert out.getvalue().strip() == printed[1]
