"""Calls to ggml, the library under llama.cpp, that the package does not wrap."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp.llama_cpp as native
from llama_cpp._ctypes_extensions import load_shared_library

from teachers.llama_cpp.library.build import library_folder

GPU, INTEGRATED_GPU = 1, 2  # ggml_backend_dev_type; 0 is the processor


def _load(name: str, functions: dict[str, tuple[Any, list[Any]]]) -> Any:
    """One of the package's shared libraries, with the signatures of the functions used here."""
    folder = library_folder()
    assert folder is not None, "llama_cpp was imported above"
    library: Any = load_shared_library(name, folder)
    for function, (result, arguments) in functions.items():
        declared = getattr(library, function)
        declared.restype, declared.argtypes = result, arguments
    return library


_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
ggml_base = _load(
    "ggml-base",
    {
        "ggml_get_name": (ctypes.c_char_p, [_POINTER]),
        "ggml_nbytes": (_SIZE, [_POINTER]),
        "ggml_backend_tensor_get": (None, [_POINTER, _POINTER, _SIZE, _SIZE]),
        "ggml_backend_dev_type": (ctypes.c_int, [_POINTER]),
        "ggml_backend_dev_description": (ctypes.c_char_p, [_POINTER]),
        "ggml_backend_dev_memory": (None, [_POINTER, ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE)]),
    },
)


def devices() -> list[dict[str, Any]]:
    """The GPUs that llama.cpp sees: their description, and free and total memory in bytes."""
    registry = _load(
        "ggml",
        {"ggml_backend_dev_count": (_SIZE, []), "ggml_backend_dev_get": (_POINTER, [_SIZE])},
    )
    result = []
    for number in range(registry.ggml_backend_dev_count()):
        device = registry.ggml_backend_dev_get(number)
        if ggml_base.ggml_backend_dev_type(device) not in (GPU, INTEGRATED_GPU):
            continue
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        ggml_base.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        name = ggml_base.ggml_backend_dev_description(device).decode("utf-8", errors="replace")
        result.append({"name": name, "free_bytes": free.value, "total_bytes": total.value})
    return result


def describe_library() -> dict[str, Any]:
    """What the library was built with (``AVX2``, …) and the GPUs that it sees."""
    native.llama_backend_init()
    return {
        "built_with": built_with(),
        "gpu": bool(native.llama_supports_gpu_offload()),
        "devices": devices(),
    }


def built_with() -> list[str]:
    """Which features of processors the library uses, in llama.cpp's words."""
    text = native.llama_print_system_info().decode("utf-8", errors="replace")
    pairs = (part.rpartition(":")[2].partition("=") for part in text.split("|"))
    return sorted(name.strip() for name, _, value in pairs if value.strip() == "1")
