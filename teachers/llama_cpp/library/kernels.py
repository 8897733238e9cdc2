"""How llama.cpp loads and runs a file: as asked for and as the self-check chose; goes to the
worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides the memory that it takes on a GPU.

    ``cache_values``: numbers that a token leaves in the cache in each layer. ``layer_bytes``: the
    weights of each layer; ``output_bytes``: of the output layer.
    """

    vocab_size: int
    width: int
    ffn_width: int
    heads: int
    cache_values: int
    layer_bytes: tuple[int, ...]
    output_bytes: int

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return len(self.layer_bytes)


@dataclass(frozen=True)
class LoadOptions:
    """How llama.cpp loads and runs a file.

    Attributes:
        gpu_layers: layers on the GPU, the output layer first, -1 for all; without effect where the
            library has no GPU. 0: no GPU is opened, nothing is computed on one.
        main_gpu: the one GPU to use, as llama.cpp numbers them; none: the process's own in a launch
            of several, else all.
        tensor_split: the share of the layers on each GPU; empty: by their free memory.
        cache_type: numbers in the KV cache; none: llama.cpp's own, or float32 where that is faster.
        batch_tokens: tokens of one decode; none: by the memory.
        sequences: decoded together, at most; none: by the memory.
        extra_buffers: weights may be rearranged for the processor (AMX, repacking), the default.
        mapped: the file is mapped instead of read, so that two processes share its memory.
        shape: of the file, where a GPU may be used.
    """

    gpu_layers: int = 0
    main_gpu: int | None = None
    tensor_split: tuple[float, ...] = ()
    cache_type: str | None = None
    batch_tokens: int | None = None
    sequences: int | None = None
    extra_buffers: bool = True
    mapped: bool = False
    shape: ModelShape | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> LoadOptions:
        """The inverse of ``dataclasses.asdict``, also after JSON."""
        shape = content["shape"] and ModelShape(**content["shape"])
        return cls(**{**content, "shape": shape})
