"""llama.cpp in the tests' own process with GPUs that are none: with which parameters it is called.

For modules that use ``llama_here``. The real library computes, on the processor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import llama_cpp.llama_cpp as native
import pytest

from teachers.llama_cpp.library import ggml


class LoadedModel(NamedTuple):
    """What of a model's parameters says where it is computed; ``devices`` by number."""

    gpu_layers: int
    devices: list[int]
    split_mode: int
    main_gpu: int
    tensor_split: list[float]


class MadeContext(NamedTuple):
    """What of a context's parameters says where it is computed, and how much at once."""

    op_offload: bool
    offload_kqv: bool
    cache: tuple[int, int]
    batch: int
    sequences: int
    threads: int


class Recorded(NamedTuple):
    """Every model and context since, and which GPUs were opened to ask for their memory."""

    models: list[LoadedModel]
    contexts: list[MadeContext]
    opened: set[int]


FIRST = 1000  # ggml's handle of GPU 0, which cannot be null
NO_DEVICES = ctypes.c_void_p()


@contextmanager
def recorded(*free: int) -> Iterator[Recorded]:
    """Meanwhile llama.cpp sees a GPU for each number of ``free`` bytes."""
    seen = Recorded([], [], set())
    load, make = native.llama_model_load_from_file, native.llama_init_from_model

    def load_from_file(path: bytes, parameters: Any) -> Any:
        devices = _devices(parameters.devices)
        split = parameters.tensor_split
        seen.models.append(
            LoadedModel(
                parameters.n_gpu_layers,
                devices,
                parameters.split_mode,
                parameters.main_gpu,
                [split[n] for n in range(len(devices))] if split else [],
            )
        )
        parameters.devices = ctypes.addressof(NO_DEVICES)
        return load(path, parameters)

    def init_from_model(model: Any, parameters: Any) -> Any:
        seen.contexts.append(
            MadeContext(
                parameters.op_offload,
                parameters.offload_kqv,
                (parameters.type_k, parameters.type_v),
                parameters.n_ubatch,
                parameters.n_seq_max,
                parameters.n_threads,
            )
        )
        return make(model, parameters)

    def memory(handle: int) -> tuple[int, int]:
        seen.opened.add(handle - FIRST)
        return free[handle - FIRST], 80 << 30

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(native, "llama_model_load_from_file", load_from_file)
        changed.setattr(native, "llama_init_from_model", init_from_model)
        gpus = [(FIRST + number, f"GPU {number}") for number in range(len(free))]
        changed.setattr(ggml, "gpu_devices", lambda: gpus)
        changed.setattr(ggml, "device_memory", memory)
        yield seen


def _devices(address: int | None) -> list[int]:
    assert address, "a null pointer lets llama.cpp use all GPUs that there are"
    found = []
    while handle := ctypes.c_void_p.from_address(address).value:
        found.append(handle - FIRST)
        address += ctypes.sizeof(ctypes.c_void_p)
    return found
