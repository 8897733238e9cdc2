"""``import students`` costs no PyTorch, and still makes transformers know the architecture."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from students.model.build import build_student
from students.model.config import SO8TConfig

ROOT = Path(__file__).parents[2]
TINY = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LIGHT = """
import sys, importlib, importlib.util, students, students.model.shape, students.model.sizes
assert not {"torch", "transformers"} & set(sys.modules), "students alone is light"
importlib.reload(students)
count = lambda: sum(type(one).__name__ == "_Awaiting" for one in sys.meta_path)
importlib.util.find_spec("transformers")
assert count() == 1, "the hook is there once, also after somebody has looked for transformers"
import transformers
assert count() == 0, "the hook goes when it has done its work"
assert students.SO8TConfig.model_type == "so8t"
"""
IMPORTS = [LIGHT, "import transformers, students"]
LOAD = """
import sys
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)
"""


def test_transformers_loads_a_student(tmp_path: Path) -> None:
    """Whoever comes first; in the process of the tests a module of ours is what imports it."""
    config = SO8TConfig(**TINY, num_key_value_heads=1, intermediate_size=16)
    build_student(config, seed=0).save_pretrained(tmp_path)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", f"{code}\n{LOAD}", tmp_path],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for code in IMPORTS
    ]
    for code, child in zip(IMPORTS, children, strict=True):
        out, err = child.communicate()
        assert child.returncode == 0 and out.strip() == "SO8TForCausalLM", (code, out, err)
