"""Which GPUs a model is put on, and how much of it on each. Runs inside the worker process."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp.llama_cpp as native
import psutil

from teachers.base import ProcessRank
from teachers.errors import SettingRefused
from teachers.launch import local_place, own_gpu
from teachers.llama_cpp.library import ggml
from teachers.llama_cpp.library.kernels import LoadOptions
from teachers.llama_cpp.sizes import GPU, Sizes, gpu_sizes, shares_by_memory


@dataclass(frozen=True)
class Placement:
    """The GPUs that a model's layers go to, by ggml's ``handles``; none: nothing goes to one."""

    gpus: tuple[GPU, ...] = ()
    handles: tuple[int, ...] = ()

    def now(self) -> list[GPU]:
        """The GPUs with what is free there now."""
        return [
            gpu._replace(free=_free(handle))
            for gpu, handle in zip(self.gpus, self.handles, strict=True)
        ]

    def apply(self, parameters: Any) -> list[Any]:
        """Have llama.cpp's parameters of a model say so; gives what must live until it is loaded.

        An empty list of devices, unlike none, also keeps llama.cpp from large products on a GPU.
        """
        devices = (ctypes.c_void_p * (len(self.handles) + 1))(*self.handles, None)
        parameters.devices = ctypes.addressof(devices)
        shares = (ctypes.c_float * max(native.llama_max_devices(), len(self.gpus)))(
            *(gpu.share for gpu in self.gpus)
        )
        if len(self.gpus) > 1:
            parameters.split_mode, parameters.main_gpu = native.LLAMA_SPLIT_MODE_LAYER, 0
            parameters.tensor_split = shares
        else:
            parameters.split_mode = native.LLAMA_SPLIT_MODE_NONE
            parameters.main_gpu = 0 if self.gpus else -1
        return [devices, shares]


def place(options: LoadOptions) -> tuple[Placement, Sizes | None]:
    """Where a model goes, and the sizes where that is a GPU.

    Raises:
        SettingRefused: to a GPU that is not there, or too small.
    """
    if options.gpu_layers == 0:
        return Placement(), None
    found = ggml.gpu_devices()
    names = [name for _, name in found]
    numbers, processes = _chosen(names, options, local_place())
    if not numbers:
        return Placement(), None
    assert options.shape is not None, "the parent sends it with layers on a GPU"
    handles = [found[number][0] for number in numbers]
    free = [_free(handle) // processes for handle in handles]
    shares: Sequence[float] = [share for share in options.tensor_split if share]
    if not shares:
        shares = shares_by_memory(options.shape, free)
    gpus = [
        (GPU(names[number], room, share / sum(shares)), handle)
        for number, room, share, handle in zip(numbers, free, shares, handles, strict=True)
        if share
    ]
    placement = Placement(tuple(gpu for gpu, _ in gpus), tuple(handle for _, handle in gpus))
    return placement, gpu_sizes(options.shape, placement.gpus, options)


def _chosen(
    names: Sequence[str], options: LoadOptions, process: ProcessRank
) -> tuple[list[int], int]:
    """The numbers of the GPUs to use, and how many processes use each of them."""
    if split := options.tensor_split:
        if len(split) != len(names):
            seen = ", ".join(names) or "none"
            raise SettingRefused(
                f"teacher.tensor_split has {len(split)} shares, llama.cpp sees {len(names)} GPUs "
                f"({seen}); " + ("give each a share, 0 for none of it" if names else "leave it out")
            )
        return [number for number, share in enumerate(split) if share], process.world
    if options.main_gpu is not None or (names and process.world > 1):
        number, processes = own_gpu(names, options.main_gpu, process)
        return [number], processes
    return list(range(len(names))), 1


def _free(handle: int) -> int:
    """Free bytes of a GPU; where it does not say, as on some that share the main memory, of
    that."""
    free, total = ggml.device_memory(handle)
    return free if total else int(psutil.virtual_memory().available)
