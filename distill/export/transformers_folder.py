"""An SO8T student as a plain transformers folder: ``LlamaForCausalLM``, which needs nothing of
this project."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import PreTrainedModel

from distill.export.student_folder import WEIGHTS, WRITTEN_BY_PYTORCH
from distill.export.transformers_tokenizer import write_plain_tokenizer
from distill.runtime.files import whole_folder
from students.model.decoder import SO8TForCausalLM
from students.model.fold import to_llama
from students.weights import as_safetensors
from teachers.atomic_files import write_whole
from teachers.gguf.file import Field
from teachers.tokenizer.gguf_metadata import TokenizerConversionError, read_roles

_log = logging.getLogger(__name__)


def publish_plain(
    student: SO8TForCausalLM,
    fields: Mapping[str, Field],
    folder: Path,
    *,
    end_tokens: Sequence[int] = (),
    warn: Callable[[str], None] = _log.warning,
) -> int:
    """Fold ``student`` and write it to ``folder`` in float32, with its tokenizer, whole or not at
    all.

    ``fields``: the teacher's ``tokenizer.*`` metadata, and ``general.name``, on which a tokenizer
    may depend. ``end_tokens``: ids at which ``generate`` stops (none: the tokenizer's EOS alone). A
    tokenizer that cannot be carried over is left out, and ``warn`` is told why.

    Returns:
        The bytes of its weights.

    Raises:
        FoldError: the gates cannot be folded exactly.
        OSError: the disk refuses.
    """
    llama = to_llama(student)
    try:
        return save_plain(llama, torch.float32, fields, folder, end_tokens)
    except TokenizerConversionError as error:
        warn(f"{folder} has no tokenizer: {error}")
        return save_plain(llama, torch.float32, None, folder, end_tokens)


SHARD_BYTES = 2_000_000_000


def save_plain(
    model: PreTrainedModel,
    dtype: torch.dtype,
    tokenizer: Mapping[str, Field] | None,
    folder: Path,
    end_tokens: Sequence[int] = (),
) -> int:
    """Write a plain transformers folder, whole or not at all, with a tokenizer made from GGUF
    metadata unless that is ``None``. ``generate`` stops at ``end_tokens``, if any are given.

    Returns:
        The bytes of its weights.

    Raises:
        TokenizerConversionError: that tokenizer cannot be carried over.
        OSError: the disk refuses.
    """
    size = 0
    with whole_folder(folder) as temporary:
        settings: Any = model.config
        generation: Any = model.generation_config
        if tokenizer is not None:
            write_plain_tokenizer(tokenizer, temporary)
            _take_roles(tokenizer, settings, generation)
        if generation is not None and end_tokens:
            generation.eos_token_id = sorted(end_tokens)
        before, settings.dtype = settings.dtype, dtype
        settings.architectures = [type(model).__name__]
        settings.save_pretrained(temporary)
        settings.dtype = before
        if generation is not None:
            generation.save_pretrained(temporary)
        tied = settings.tie_word_embeddings
        state = model.state_dict()
        if tied:
            state.pop("lm_head.weight", None)
        plan = split_torch_state_dict_into_shards(state, max_shard_size=SHARD_BYTES)
        for file, names in plan.filename_to_tensors.items():
            part = {key: state[key] for key in names}
            write_whole(temporary / file, as_safetensors(part, dtype, WRITTEN_BY_PYTORCH))
            size += (temporary / file).stat().st_size
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            content = (json.dumps(index, indent=2) + "\n").encode()
            write_whole(temporary / f"{WEIGHTS}.index.json", content)
    return size


def _take_roles(tokenizer: Mapping[str, Field], *configs: Any) -> None:
    """Set BOS, EOS and padding as the tokenizer has them."""
    roles = read_roles(tokenizer, len(tokenizer["tokenizer.ggml.tokens"].value))
    for config in configs:
        for role in ("bos", "eos", "pad"):
            if config is not None:
                setattr(config, f"{role}_token_id", roles.get(role))
