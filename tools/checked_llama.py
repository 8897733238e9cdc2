"""llama-cpp-python's own interface, run as the project's check found that llama.cpp runs on this
machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as native

from teachers.llama_cpp.teacher import GGUFTeacher


@contextmanager
def llama_cpp_as_checked(path: Path) -> Iterator[None]:
    """Meanwhile llama-cpp-python loads models as the project's own check found that they run on
    this machine.

    ``path``: the GGUF file to check with.
    """
    with GGUFTeacher(path) as teacher:
        extra_buffers = teacher.worker.options().extra_buffers
    defaults = native.llama_model_default_params

    def checked() -> Any:
        parameters = defaults()
        parameters.use_extra_bufts = extra_buffers
        return parameters

    native.llama_model_default_params = checked
    try:
        yield
    finally:
        native.llama_model_default_params = defaults
