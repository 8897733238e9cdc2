"""A Python that has TRL: one that is given, or a virtual environment made for it.

TRL is no dependency of this project; its environment has the versions of ``constraints.txt``
otherwise.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from distill.errors import UserError
from tools.machine import ROOT

TRL = "trl==1.16.0"
ENVIRONMENT = ROOT / ".venv-trl"
ENVIRONMENT_PYTHON = ENVIRONMENT / (
    "Scripts/python.exe" if sys.platform == "win32" else "bin/python"
)
TRAINING = ("-m", "tools.peers.trl_training")
BESIDE = ("torch", "transformers", "gguf")


def version_of_trl(python: Path) -> str | None:
    """TRL's version in that Python's environment; ``None`` without it."""
    asked = "import importlib.metadata as m; print(m.version('trl'))"
    try:
        result = subprocess.run([python, "-c", asked], capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def trl_python(given: Path | None) -> Path:
    """``given``, if it has TRL; else that of ``.venv-trl``, made where it is not there.

    Raises:
        UserError: ``given`` has no TRL, or pip cannot install it.
    """
    if given is not None:
        if version_of_trl(given) is None:
            raise UserError(
                f"--trl-python {given} has no TRL; install it there (pip install {TRL}), or leave "
                "the option out and an environment is made"
            )
        return given
    python = ENVIRONMENT_PYTHON
    if version_of_trl(python) is None:
        print(f"installing {TRL} into {ENVIRONMENT.name} ...", flush=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--constraint"]
        try:
            subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
            subprocess.run([*install, str(ROOT / "constraints.txt"), TRL, *BESIDE], check=True)
        except (subprocess.CalledProcessError, OSError) as error:
            raise UserError(
                f"{TRL} cannot be installed: {error}; install it yourself and name that Python "
                "with --trl-python"
            ) from None
    return python
