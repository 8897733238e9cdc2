"""Where a transformers teacher runs, and how much it computes there at once.

On the processor by constants, which were measured; on a GPU by its free memory.
"""

from __future__ import annotations

from typing import Any

import torch

from teachers.launch import local_place, own_gpu

BATCH_TOKENS = 2048  # of one forward pass, padding included
LOGITS_BYTES = 256 << 20  # one pass's logits stay below this (one sequence always fits)
CACHE_BYTES = 2 << 30  # the KV cache stays below this (one sequence always fits)
# On a GPU.
GPU_BATCH_TOKENS = 1 << 14
GPU_SHARE = 0.5  # of what is free, for a pass's numbers, or for the cache
LOGIT_COPIES = 6  # a pass's logits, those that are wanted, and what top-k and tail are made of
STATE_COPIES = 4  # a layer's states and feed-forward values in float32


def teacher_device(main_gpu: int | None) -> torch.device:
    """The device of this process's teacher.

    Raises:
        SettingRefused: ``main_gpu`` is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count and main_gpu is None:
        return torch.device("cpu")
    names = [torch.cuda.get_device_name(number) for number in range(count)]
    return torch.device("cuda", own_gpu(names, main_gpu, local_place()).number)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this process may still take on a GPU; nothing on the processor."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def batch_room(config: Any, vocab_size: int, longest: int, free: int | None) -> int:
    """Tokens of a forward pass, padding included, of sequences of at most ``longest`` tokens;
    ``config``: of the model's text; ``free`` bytes of a GPU, or none."""
    if free is None:
        return min(BATCH_TOKENS, LOGITS_BYTES // (4 * vocab_size))
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    attention = 2 * config.num_attention_heads * longest  # where no kernel does without
    states = STATE_COPIES * (inner + 4 * width)
    each = 4 * (LOGIT_COPIES * vocab_size + states + attention)
    return min(GPU_BATCH_TOKENS, int(GPU_SHARE * free) // each)


def cache_room(free: int | None) -> int:
    """Bytes of the KV cache."""
    return CACHE_BYTES if free is None else int(GPU_SHARE * free)
