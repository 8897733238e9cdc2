"""An SO8T student as a plain transformers folder: ``LlamaForCausalLM``, which needs nothing of this project."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from distill.saved_student import save_plain
from students.fold import to_llama
from students.model import SO8TForCausalLM
from teachers.gguf_file import Field
from teachers.tokenizer_json import TokenizerConversionError

_log = logging.getLogger(__name__)


def publish_plain(
    student: SO8TForCausalLM,
    fields: Mapping[str, Field],
    folder: Path,
    *,
    end_tokens: Sequence[int] = (),
    warn: Callable[[str], None] = _log.warning,
) -> int:
    """Fold ``student`` and write it to ``folder`` in float32, with its tokenizer, whole or not at all.

    ``fields``: the teacher's ``tokenizer.*`` metadata, and ``general.name``, on which a tokenizer may depend.
    ``end_tokens``: ids at which ``generate`` stops (none: the tokenizer's EOS alone). A tokenizer that cannot be
    carried over is left out, and ``warn`` is told why.

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
