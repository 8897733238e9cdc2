"""Runs command lines in one process: what each exited with, what it said, and what it imported.

Reads a JSON list of ``[arguments, environment]`` on standard input; writes one object per command
line, and stops at the first that imports one of ``HEAVY``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType

HEAVY = ("torch", "transformers", "accelerate", "peft", "llama_cpp")
ROOT = Path(__file__).parents[3]


class Watch(MetaPathFinder):
    """Finds nothing, and remembers by which of our lines each heavy module was asked for first."""

    def __init__(self) -> None:
        self.asked: dict[str, list[str]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if fullname in HEAVY and fullname not in self.asked:
            ours = [one for one in traceback.extract_stack() if one.filename.startswith(str(ROOT))]
            self.asked[fullname] = [
                f"{Path(one.filename).relative_to(ROOT)}:{one.lineno}" for one in ours[:-1]
            ]


def answer(arguments: list[str], environment: dict[str, str], watch: Watch) -> dict[str, object]:
    """Run one command line as ``distill`` does."""
    from distill.cli import main

    sys.argv = ["distill", *arguments]
    out, err = io.StringIO(), io.StringIO()
    os.environ.update(environment)
    code: object = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        except Exception:  # a defect: the test shows it as what was said
            err.write(traceback.format_exc())
    for name in environment:
        del os.environ[name]
    found = {name: watch.asked[name] for name in HEAVY if name in sys.modules}
    return {"code": code, "said": " ".join(err.getvalue().split()), "imported": found}


if __name__ == "__main__":
    noticed = Watch()
    sys.meta_path.insert(0, noticed)
    sys.path.insert(0, str(ROOT))
    answers = []
    for given, variables in json.load(sys.stdin):
        answers.append(answer(given, variables, noticed))
        if answers[-1]["imported"]:
            break
    print(json.dumps(answers))
