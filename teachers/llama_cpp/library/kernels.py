"""How llama.cpp runs a file: what a worker's process is started with, and the self-check
chooses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Way:
    """How llama.cpp runs a file.

    Attributes:
        gpu_layers: layers on the GPU, -1 for all; without effect where the library has no GPU.
        processor_only: no GPU is opened; else one may compute large products even with no layers on
        it. extra_buffers: whether it may rearrange weights for the processor (AMX, repacking), its
        default. mapped: whether the file is mapped instead of read, so that two processes share its
        memory.
    """

    gpu_layers: int = 0
    processor_only: bool = False
    extra_buffers: bool = True
    mapped: bool = False
