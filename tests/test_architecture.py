"""The house's rules, held by reading the source: import direction, sizes, nothing that runs untrusted data."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOWER = {"teachers", "students", "stability"}
ALLOWED = {
    "teachers": {"teachers"},
    "students": {"students"},
    "stability": {"stability"},
    "distill": {"distill", *LOWER},
    "tools": {"tools", "distill", *LOWER},
    "tests": {"tests", "tools", "distill", *LOWER},
}
SOURCES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))


def imported_packages(tree: ast.AST) -> set[str]:
    """Top-level names of everything a module imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_direction_and_sizes(path: Path) -> None:
    """tools, tests → distill → {teachers, students, stability}, which never import each other."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    package = path.relative_to(ROOT).parts[0]
    ours = imported_packages(tree) & ALLOWED.keys()
    assert ours <= ALLOWED[package], f"{path.name} imports {sorted(ours - ALLOWED[package])}"
    assert text.count("\n") <= 500, "split the file"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= 80, f"{node.name} has {length} lines"


def test_nothing_executes_untrusted_data() -> None:
    """Stores, checkpoints and teachers are untrusted: no pickle, no torch.load, no remote code, no eval."""
    found = []
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] == "tests":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if imported_packages(tree) & {"pickle", "dill", "shelve", "marshal"}:
            found.append(f"{path.name} imports a pickler")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                keywords = {keyword.arg for keyword in node.keywords}
                if called in {"torch.load", "eval", "exec"} or "trust_remote_code" in keywords:
                    found.append(f"{path.name}:{node.lineno} calls {called}")
    assert not found


def test_only_the_workers_modules_touch_llama_cpp() -> None:
    """The native library may abort the process: only modules inside the worker may import it."""
    users = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] in {"distill", *LOWER}
        and "llama_cpp" in imported_packages(ast.parse(path.read_text(encoding="utf-8")))
    }
    inside = {"teachers/llama_cpp.py", "teachers/ggml.py", "teachers/taps.py", "teachers/server.py"}
    assert users == inside | {"students/quantize_child.py"}


def test_parent_process_does_not_load_llama_cpp() -> None:
    """Importing the parent's side must not pull the native library in."""
    modules = "distill.pipeline, distill.plan, distill.cli, teachers.huggingface, teachers.ensemble"
    code = f"import sys, {modules}; print('llama_cpp' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert answer.stdout.strip() == "False"
