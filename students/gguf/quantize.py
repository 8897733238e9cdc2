"""Quantize a GGUF file with llama.cpp's own quantizer, in a process of its own."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from students.gguf.file_types import FILE_TYPES, ROW_TYPES
from students.gguf.metadata import ExportError

LOG_LINES = 3
_FAILED, _WRITE_FAILED = "failed to quantize: ", "iostream error"
# The child runs the one file: importing this package would load PyTorch first.
_CHILD = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "runpy.run_path(sys.argv[2], None, '__main__')"
)
_CHILD_FILE = Path(__file__).with_name("quantize_child.py")


def quantize_gguf(
    source: Path,
    target: Path,
    quant: str,
    *,
    rows: Mapping[str, str] | None = None,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
    labels: Mapping[str, int | str] | None = None,
    requantize: bool = False,
    threads: int = 0,
    progress: Callable[[int, int], None] = lambda done, tensors: None,
) -> None:
    """Write the F32 file ``source`` to ``target`` as another file type; a failure leaves no file.

    ``rows``: what those of the embedding and of the output matrix are stored as (``ROW_TYPES``), by
    ``Quantization.row_types``; none: what llama.cpp takes.
    ``importance``: mean square of each matrix column's input, by the matrix's name, for weighted
    types. ``labels``: metadata to add. ``requantize``: ``source`` may be quantized itself.
    ``threads`` 0: one per processor. ``progress`` gets the tensors done and their total.

    Raises:
        ExportError: llama.cpp refuses the file or dies on it.
        OSError: the disk refuses.
    """
    if quant not in FILE_TYPES:
        raise ExportError(
            f"quant {quant!r} is not supported; choose one of {', '.join(FILE_TYPES)}"
        )
    if target.exists() and target.samefile(source):
        raise ExportError(f"{source} cannot be quantized onto itself")
    request = {
        "source": os.fsencode(source).hex(),  # a name need not be text
        "target": os.fsencode(target).hex(),
        "file_type": int(FILE_TYPES[quant].number),
        "rows": {matrix: int(ROW_TYPES[kind].storage) for matrix, kind in (rows or {}).items()},
        "requantize": requantize,
        "threads": threads,
        "labels": dict(labels or {}),
    }
    weights = dict(importance or {}) if FILE_TYPES[quant].weighted else {}
    message = json.dumps(request).encode() + b"\n" + safetensors.numpy.save(weights)
    target.write_bytes(b"")  # a folder that cannot be written to fails here, with Python's error
    try:
        _run(message, quant, source, target, progress)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _run(
    message: bytes, quant: str, source: Path, target: Path, progress: Callable[[int, int], None]
) -> None:
    status: int | None = None
    with tempfile.TemporaryFile() as log:
        with subprocess.Popen(
            [sys.executable, "-c", _CHILD, json.dumps(sys.path), str(_CHILD_FILE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        ) as child:
            assert child.stdin is not None and child.stdout is not None
            try:
                child.stdin.write(message)
                child.stdin.close()
                for line in child.stdout:
                    answer = json.loads(line)
                    status = answer.get("status", status)
                    if "done" in answer:
                        progress(answer["done"], answer["of"])
            except BrokenPipeError:
                child.wait()  # it died before it had read everything: reported below
            except BaseException:
                child.kill()
                raise
        if status == 0 and child.returncode == 0:
            return
        log.seek(0)
        lines = log.read().decode("utf-8", errors="replace").splitlines()
    reason = " | ".join([line.strip() for line in lines if line.strip()][-LOG_LINES:])
    if _WRITE_FAILED in reason:  # C++ does not give a cause; llama.cpp has computed what it could
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    reason = reason.rpartition(_FAILED)[2] or reason
    how = f"status {status}" if status is not None else _ending(child.returncode)
    raise ExportError(f"llama.cpp could not quantize {source.name} to {quant} ({how}): {reason}")


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    names = {int(number): number.name for number in signal.Signals}
    return f"signal {names.get(-code, -code)}"
