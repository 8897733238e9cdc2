"""``import students`` costs no PyTorch, and still makes transformers know the architecture."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from students.builder import build_student
from students.config import SO8TConfig

ROOT = Path(__file__).parent.parent
TINY = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student's folder."""
    folder = tmp_path_factory.mktemp("student")
    config = SO8TConfig(**TINY, num_key_value_heads=1, intermediate_size=16)
    build_student(config, seed=0).save_pretrained(folder)
    return folder


def python(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code, *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


@pytest.mark.parametrize(
    "imports",
    [
        "import students, transformers",
        "import transformers, students",
        "import students.config",
        "import students, importlib.util; importlib.util.find_spec('transformers')",
    ],
)
def test_transformers_loads_a_student(imports: str, saved: Path) -> None:
    """Whoever comes first, and also where somebody has only looked whether transformers is there."""
    code = f"import sys; {imports}\nfrom transformers import AutoModelForCausalLM as Auto\n"
    code += "print(type(Auto.from_pretrained(sys.argv[1])).__name__)"
    assert python(code, str(saved)) == "SO8TForCausalLM"


def test_importing_students_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, students, students.shape, students.sizes\n"
    code += "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert python(code) == "[]"


def test_the_hook_is_there_once_and_goes_when_it_has_done_its_work() -> None:
    code = "import sys, importlib, students; importlib.reload(students)\n"
    code += "count = lambda: sum(type(one).__name__ == '_Awaiting' for one in sys.meta_path)\n"
    code += "before = count(); import transformers; print(before, count(), students.SO8TConfig.model_type)"
    assert python(code) == "1 0 so8t"
