"""How llama.cpp loads and runs a file: chosen by the self-check, passed to the worker."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoadOptions:
    """How llama.cpp loads and runs a file.

    Attributes:
        gpu_layers: layers on the GPU, -1 for all; without effect where the library has no GPU.
        processor_only: no GPU is opened; else one may compute large products even without layers.
        extra_buffers: weights may be rearranged for the processor (AMX, repacking), the default.
        mapped: the file is mapped instead of read, so that two processes share its memory.
    """

    gpu_layers: int = 0
    processor_only: bool = False
    extra_buffers: bool = True
    mapped: bool = False
