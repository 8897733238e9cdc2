"""The process that llama.cpp's quantizer runs in: it may abort on a bad file, which must end this
process only.

Standard input: one JSON line (``source``, ``target``, ``file_type``, ``threads``, ``labels``), then
the importance matrix as safetensors. Standard output: one JSON line for every tensor that is done,
and ``{"status": …}`` last.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from typing import Any

import llama_cpp as native
import numpy as np
import safetensors.numpy

_DONE = re.compile(r"^\[\s*(\d+)/\s*(\d+)\]")
_TEXT_BYTES = 128  # of a metadata override's key, and of its text
_INTEGER, _TEXT = 0, 3  # llama_model_kv_override_type


def main() -> None:
    """Quantize one file as the parent asks."""
    request = json.loads(sys.stdin.buffer.readline())
    weights = safetensors.numpy.load(sys.stdin.buffer.read())
    answers = sys.stdout

    @native.llama_log_callback
    def log(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        words = text.decode("utf-8", errors="replace")
        if found := _DONE.match(words):
            print(
                json.dumps({"done": int(found[1]), "of": int(found[2])}), file=answers, flush=True
            )
        sys.stderr.write(words)

    native.llama_log_set(log, ctypes.c_void_p(0))
    native.llama_backend_init()
    parameters = native.llama_model_quantize_default_params()
    parameters.ftype = request["file_type"]
    parameters.nthread = request["threads"]
    keep: list[Any] = []  # what llama.cpp reads from this process's memory
    if weights:
        entries = (
            native.llama_model_imatrix_data * (len(weights) + 1)
        )()  # one more, without a name, ends it
        for entry, (name, values) in zip(entries, weights.items(), strict=False):
            array = np.ascontiguousarray(values, dtype=np.float32)
            entry.name = name.encode()
            entry.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = array.size
            keep.append(array)
        parameters.imatrix = ctypes.cast(entries, ctypes.POINTER(native.llama_model_imatrix_data))
        keep.append(entries)
    if request["labels"]:
        overrides = _overrides(request["labels"])
        parameters.kv_overrides = ctypes.cast(overrides, type(parameters.kv_overrides))
        keep.append(overrides)
    status = native.llama_model_quantize(
        bytes.fromhex(request["source"]), bytes.fromhex(request["target"]), ctypes.byref(parameters)
    )
    print(json.dumps({"status": int(status)}), file=answers, flush=True)


def _overrides(labels: dict[str, int | str]) -> Any:
    """Metadata to add, as llama.cpp takes it; an entry with an empty key ends it."""
    overrides = (native.llama_model_kv_override * (len(labels) + 1))()
    for entry, (key, value) in zip(overrides, labels.items(), strict=False):
        entry.key = key.encode()[: _TEXT_BYTES - 1]
        if isinstance(value, int):
            entry.tag, entry.value.val_i64 = _INTEGER, value
        else:
            entry.tag, entry.value.val_str = _TEXT, value.encode()[: _TEXT_BYTES - 1]
    return overrides


if __name__ == "__main__":
    main()
