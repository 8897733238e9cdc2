"""The machine and package versions that a run records."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

from teachers.llama_cpp.worker import why_without_extra_buffers


def environment() -> dict[str, Any]:
    """What computed the results."""
    packages = (
        "so8t-distill",
        "torch",
        "transformers",
        "llama-cpp-python",
        "gguf",
        "accelerate",
        "numpy",
    )
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in packages},
    }


def llama_cpp_environment() -> dict[str, Any]:
    """Whether llama.cpp always ran with its extra CPU buffers, and if not, why."""
    reason = why_without_extra_buffers()
    return {"extra_buffers": not reason, "reason": reason}
