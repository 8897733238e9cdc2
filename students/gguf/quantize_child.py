"""The process of llama.cpp's quantizer, which may abort on a bad file.

Standard input: one JSON line (``source``, ``target``, ``file_type``, ``rows``, ``requantize``,
``threads``, ``labels``), then the importance matrix as safetensors. Standard output: one JSON line
for every finished tensor, and ``{"status": …}`` last.
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
    request = json.loads(sys.stdin.buffer.readline())
    weights = safetensors.numpy.load(sys.stdin.buffer.read())

    def answer(**values: int) -> None:
        print(json.dumps(values), flush=True)

    @native.llama_log_callback
    def log(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        message = text.decode("utf-8", errors="replace")
        if match := _DONE.match(message):
            answer(done=int(match[1]), of=int(match[2]))
        sys.stderr.write(message)

    native.llama_log_set(log, ctypes.c_void_p(0))
    native.llama_backend_init()
    parameters = native.llama_model_quantize_default_params()
    parameters.ftype = request["file_type"]
    parameters.nthread = request["threads"]
    parameters.allow_requantize = request["requantize"]
    parameters.token_embedding_type = request["rows"].get("embedding", native.GGML_TYPE_COUNT)
    parameters.output_tensor_type = request["rows"].get("output", native.GGML_TYPE_COUNT)
    keep: list[Any] = []  # what llama.cpp reads from this process's memory
    if weights:
        # One more, without a name, ends it.
        entries = (native.llama_model_imatrix_data * (len(weights) + 1))()
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
    answer(status=int(status))


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
