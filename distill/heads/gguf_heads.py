"""The heads that a GGUF file carries in its metadata, and what they say of prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distill.errors import UserError
from students.model.heads import HeadError, Heads, read_heads
from students.model.safety_head import LAST_STATE, prompt_features
from teachers.base import Tokens
from teachers.gguf.file import GGUFFile
from teachers.llama_cpp.teacher import GGUFTeacher

TOGETHER = 32  # prompts whose hidden states are held at once


def heads_in(file: GGUFFile) -> Heads:
    """The heads that a GGUF file carries, if any; ``UserError`` if they are broken."""
    values = {key: field.value for key, field in file.fields.items() if key.startswith("so8t.")}
    blocks = file.value(f"{file.architecture}.block_count")
    try:
        heads = read_heads(values, file.tensors["token_embd.weight"].shape[1])
        if heads.safety is not None and max(heads.safety.shape.layers, default=-1) >= blocks:
            raise HeadError(f"the safety head looks at layers that a model of {blocks} lacks")
    except HeadError as error:
        raise UserError(
            f"{file.path} has broken heads: {error}; export the student again"
        ) from None
    return heads


def chances_of(model: GGUFTeacher, heads: Heads, prompts: Sequence[Tokens]) -> Tensor:
    """The safety head's probabilities of the three decisions on each prompt, ``[N, 3]``, from the
    file's own states."""
    starts = range(0, len(prompts), TOGETHER)
    parts = [prompts[start : start + TOGETHER] for start in starts]
    return torch.cat([heads.probabilities(_features(model, heads, some), some) for some in parts])


def _features(model: GGUFTeacher, heads: Heads, prompts: Sequence[Tokens]) -> Tensor:
    """What the safety head looks at, ``[N, F]``."""
    assert heads.safety is not None
    shape = heads.safety.shape
    if (shape.layers, shape.mean) == (LAST_STATE.layers, LAST_STATE.mean):
        return torch.from_numpy(model.last_states(prompts))
    # What follows a sequence's last token is never computed, so each gets one more.
    longer = [np.append(tokens, tokens[-1]).astype(np.int32) for tokens in prompts]
    states = model.states(longer, shape.layers, exact=True)
    ends = np.cumsum([len(tokens) for tokens in prompts])
    rows = {name: np.split(values, ends[:-1]) for name, values in states.items()}
    return torch.stack(
        [
            prompt_features(
                shape,
                torch.from_numpy(rows["final"][place]),
                {
                    number: torch.from_numpy(rows[f"layer{number}"][place])
                    for number in shape.layers
                },
            )
            for place in range(len(prompts))
        ]
    )
