"""The house's rules, held by reading the source: import direction, sizes, nothing that runs
untrusted data."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Bottom to top: a module imports what stands above it here, or beside it in its own folder.
ORDER = (
    "stability.precision",
    "teachers.errors",
    "teachers.machine",
    "teachers.atomic_files",
    "teachers.targets",
    "teachers",
    "teachers.gguf",
    "teachers.tokenizer",
    "teachers.vocabulary",
    "teachers.store",
    "teachers.llama_cpp.library",
    "teachers.llama_cpp",
    "teachers.huggingface",
    "teachers.reduced",
    "teachers.remote",
    "students.model",
    "students",
    "students.gguf",
    "students.adapter",
    "stability.measures",
    "stability",
    "distill",
    "distill.errors",
    "distill.config",
    "distill.runtime",
    "distill.metrics",
    "distill.runs",
    "distill.losses",
    "distill.capture",
    "distill.heads",
    "distill.training",
    "distill.base_models",
    "distill.initialization",
    "distill.inference",
    "distill.evaluation.inputs",
    "distill.evaluation",
    "distill.reports.document",
    "distill.reports.inputs",
    "distill.reports.verdict",
    "distill.reports.render",
    "distill.reports.weights",
    "distill.reports.run",
    "distill.reports.comparison",
    "distill.reports.build",
    "distill.reports.card",
    "distill.export",
    "distill.trimming",
    "distill.serving",
    "distill.pipeline",
    "distill.commands",
    "distill.cli",
    "distill.__main__",
    "tools",
    "tools.example_teacher",
    "tools.safety_prompts",
    "tools.models",
    "tools.bench",
    "tools.peers",
    "tools.studies",
    "tools.robustness",
    "tools.checks",
    "tests",
)
PACKAGES = ("teachers", "students", "stability", "distill", "tools", "tests")
APART = {"teachers", "students", "stability"}  # these do not import one another, but for
SHARED = "stability.precision"
MOST_FILES = 13  # in one folder, besides its __init__.py
MOST_LINES = 400  # unless the docstring says why ...
REASON = "Over 400 lines because"
MOST_FUNCTION_LINES = 80
MOST_PARAMETERS = 6  # outside the command line, tools and tests, but for these:
MORE_PARAMETERS = {
    ("students.model.config", "__init__"),  # every setting of the model, as transformers wants it
    ("students.model.build", "student_config"),
    ("students.gguf.quantize", "quantize_gguf"),
    ("distill.initialization.start", "begin"),
}


@cache
def modules() -> dict[str, Path]:
    """Every module of the repository by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


def nodes_of(tree: ast.AST, at_once: bool) -> Iterator[ast.AST]:
    """Everything in a tree; ``at_once``: but what waits for a call or for a type checker."""
    waits, left = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda), [tree]
    while left:
        node = left.pop()
        typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not (at_once and (typing or isinstance(node, waits))):
            yield node
            left += ast.iter_child_nodes(node)


@cache
def imported(name: str, at_once: bool = False) -> frozenset[str]:
    """What a module imports, wherever in it or when it is imported: full names, ours as modules."""
    result = set()
    for node in nodes_of(tree_of(name), at_once):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{name}: relative imports hide the direction"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                result.add(submodule if submodule in modules() else node.module)
    return frozenset(result - {name})


def level(name: str) -> int:
    """Where a module stands in ``ORDER``."""
    named = [entry for entry in ORDER if name == entry or name.startswith(entry + ".")]
    assert named, f"{name} has no place in ORDER"
    return ORDER.index(max(named, key=len))


def test_imports_run_downwards() -> None:
    """tools, tests → distill → {teachers, students, stability}; within each, along ``ORDER``."""
    wrong = []
    for name in modules():
        package = name.partition(".")[0]
        for other in imported(name) & modules().keys():
            target = other.partition(".")[0]
            if package == target and name == package:
                continue  # a package's face imports what it shows
            apart = {package, target} <= APART and package != target and other != SHARED
            if apart or level(other) > level(name):
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_no_circle_of_modules() -> None:
    """Modules that import nothing but what is already taken away can be taken away, until none
    is left."""
    left = {name: imported(name) & modules().keys() for name in modules()}
    while free := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not left, f"in or above a circle: {sorted(left)}"


def test_sizes() -> None:
    wrong = []
    folders = Counter(
        str(path.parent.relative_to(ROOT))
        for path in modules().values()
        if path.name != "__init__.py"
    )
    wrong += [
        f"{folder} has {count} files" for folder, count in folders.items() if count > MOST_FILES
    ]
    for name, path in modules().items():
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > MOST_LINES and REASON not in (ast.get_docstring(tree_of(name)) or ""):
            wrong.append(f"{name} has {lines} lines and gives no reason for it")
        for node in ast.walk(tree_of(name)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                if length > MOST_FUNCTION_LINES:
                    wrong.append(f"{name}: {node.name} has {length} lines")
                every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len([one for one in every if one.arg not in ("self", "cls")])
                free = name.startswith(("tools", "tests", "distill.commands"))
                if (
                    count > MOST_PARAMETERS
                    and not free
                    and (name, node.name) not in MORE_PARAMETERS
                ):
                    wrong.append(f"{name}: {node.name} has {count} parameters")
    assert not wrong


def test_nothing_executes_untrusted_data() -> None:
    """Stores, checkpoints and teachers are untrusted: no pickle, no torch.load, no remote code,
    no eval."""
    wrong = []
    for name in modules():
        if name.partition(".")[0] == "tests":
            continue
        if {other.partition(".")[0] for other in imported(name)} & {
            "pickle",
            "dill",
            "shelve",
            "marshal",
        }:
            wrong.append(f"{name} imports a pickler")
        for node in ast.walk(tree_of(name)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                keywords = {keyword.arg for keyword in node.keywords}
                if called in {"torch.load", "eval", "exec"} or "trust_remote_code" in keywords:
                    wrong.append(f"{name}:{node.lineno} calls {called}")
    assert not wrong


def test_only_the_workers_modules_touch_llama_cpp() -> None:
    """The native library may abort the process: only modules inside the worker may import it."""
    users = {
        name
        for name in modules()
        if name.partition(".")[0] in {"distill", *APART}
        and any(other.partition(".")[0] == "llama_cpp" for other in imported(name))
    }
    assert users == {
        "teachers.llama_cpp.context",
        "teachers.llama_cpp.library.ggml",
        "teachers.llama_cpp.placement",
        "teachers.llama_cpp.tensor_taps",
        "teachers.llama_cpp.server",
        "students.gguf.quantize_child",
    }


def test_what_a_process_does_not_load() -> None:
    """However indirectly: llama.cpp in the parent process, where a damaged file would end it; and
    what only training needs in the other commands, whose start and memory it would double."""
    parents = ["distill.pipeline.run", "distill.pipeline.plan", "distill.commands.app"]
    parents += ["teachers.huggingface.teacher", "teachers.ensemble"]
    reached = _reached(parents, {"llama_cpp"})
    assert len(reached) > 100 and "teachers.llama_cpp.worker" in reached
    without = ["distill.pipeline.capture", "distill.evaluation.compare", "distill.trimming.trim"]
    without += ["distill.reports.build", "distill.serving.serve", "distill.inference.judge_command"]
    assert "torch" in _reached(without, {"transformers", "accelerate", "torch.distributed"})


def _reached(waiting: list[str], unwanted: set[str]) -> dict[str, str]:
    """The modules that importing some brings, each with one that imports it."""
    reached: dict[str, str] = dict.fromkeys(waiting, "asked for")
    while waiting:
        name = waiting.pop()
        parts = name.split(".")
        packages = {".".join(parts[:count]) for count in range(1, len(parts))}
        for other in packages | imported(name, at_once=True):
            heads = {other.partition(".")[0], ".".join(other.split(".")[:2])}
            assert not heads & unwanted, (name, other, reached[name])
            if other not in reached:
                reached[other] = name
                waiting += [other] * (other in modules())
    return reached


def test_data_files_are_installed() -> None:
    """Every pattern of pyproject's package-data names files that are there, and none is left
    out."""
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    named = set()
    for package, patterns in settings["tool"]["setuptools"]["package-data"].items():
        folder = ROOT / package.replace(".", "/")
        for pattern in patterns:
            files = set(folder.glob(pattern))
            assert files, f"{package}: no file is {pattern}"
            named |= files
    folders = [ROOT / package for package in PACKAGES[:4]]
    files = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    data = {path for path in files if path.suffix not in (".py", ".pyc")}
    assert data <= named, f"not installed: {sorted(data - named)}"
