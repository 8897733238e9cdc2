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
        "ggml_backend_dev_backend_reg": (_POINTER, [_POINTER]),
        "ggml_backend_dev_description": (ctypes.c_char_p, [_POINTER]),
        "ggml_backend_dev_memory": (None, [_POINTER, ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE)]),
    },
)


def gpu_devices() -> list[tuple[int, str]]:
    """The GPUs that llama.cpp may use, as ggml's handle and description, in the order in which
    settings number them; none is opened.

    Those of one backend: another may see the same cards once more. Integrated ones only where there
    are no others.
    """
    registry = _load(
        "ggml",
        {"ggml_backend_dev_count": (_SIZE, []), "ggml_backend_dev_get": (_POINTER, [_SIZE])},
    )
    found = [registry.ggml_backend_dev_get(n) for n in range(registry.ggml_backend_dev_count())]
    kinds = {device: ggml_base.ggml_backend_dev_type(device) for device in found}
    kind = GPU if GPU in kinds.values() else INTEGRATED_GPU
    gpus = [device for device in found if kinds[device] == kind]
    backends = [ggml_base.ggml_backend_dev_backend_reg(device) for device in gpus]
    descriptions = [ggml_base.ggml_backend_dev_description(device) for device in gpus]
    return [
        (device, name.decode("utf-8", errors="replace"))
        for device, backend, name in zip(gpus, backends, descriptions, strict=True)
        if backend == backends[0]
    ]


def device_memory(device: int) -> tuple[int, int]:
    """A GPU's free and total memory in bytes, 0 where it does not say; CUDA opens it for that."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    ggml_base.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value


def describe_library() -> dict[str, Any]:
    """What the library was built with (``AVX2``, …) and the GPUs that it sees."""
    native.llama_backend_init()
    devices = []
    for device, name in gpu_devices():
        free, total = device_memory(device)
        devices.append({"name": name, "free_bytes": free, "total_bytes": total})
    return {
        "built_with": built_with(),
        "gpu": bool(native.llama_supports_gpu_offload()),
        "devices": devices,
    }


def built_with() -> list[str]:
    """Which features of processors the library uses, in llama.cpp's words."""
    text = native.llama_print_system_info().decode("utf-8", errors="replace")
    pairs = (part.rpartition(":")[2].partition("=") for part in text.split("|"))
    return sorted(name.strip() for name, _, value in pairs if value.strip() == "1")
