"""The metadata of a reduced tokenizer, made from that of the whole one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teachers.gguf.file import Field
from teachers.tokenizer.gguf_metadata import SENTENCEPIECE, read_metadata
from teachers.vocabulary.reduced import ReducedVocabulary, VocabularyError

TOKENS = "tokenizer.ggml.tokens"
PER_TOKEN = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")
MERGES = "tokenizer.ggml.merges"
_WHOLE = "tokenizer.huggingface.json"  # the uncut tokenizer once more


def reduced_fields(fields: Mapping[str, Field], vocabulary: ReducedVocabulary) -> dict[str, Field]:
    """GGUF metadata of the kept tokens: lists cut, merges of kept tokens, ids renumbered.

    A copy of the uncut tokenizer in another format (``tokenizer.huggingface.json``) is left out.

    Raises:
        TokenizerConversionError: malformed metadata.
        VocabularyError: a token with a role is not kept.
    """
    metadata = read_metadata(fields)
    kept = vocabulary.kept.tolist()
    new = vocabulary.new_ids
    result = {key: field for key, field in fields.items() if key != _WHOLE}
    # As llama.cpp spells them: an empty one's name is its number, which is no longer that.
    result[TOKENS] = replace(fields[TOKENS], value=[metadata.tokens[old] for old in kept])
    for key in PER_TOKEN:
        if key in fields and fields[key].value:
            result[key] = replace(fields[key], value=[fields[key].value[old] for old in kept])
    if metadata.model != SENTENCEPIECE:
        known = set(result[TOKENS].value)
        merges = [
            f"{left} {right}"
            for left, right in metadata.merges
            if left in known and right in known and left + right in known
        ]
        result[MERGES] = replace(fields[MERGES], value=merges)
    for key, field in fields.items():
        if key.endswith(".vocab_size"):
            result[key] = replace(field, value=len(vocabulary))
        elif key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
            result[key] = replace(field, value=_renumbered(key, field.value, new))
    return result


def _renumbered(key: str, old: Any, new: NDArray[np.int64]) -> Any:
    """A token's new id; what names none (an id beyond the vocabulary) stays so."""
    if type(old) is not int or not 0 <= old < len(new):
        return old
    if new[old] < 0:
        raise VocabularyError(f"{key} is {old}, a token that is not kept; keep it")
    return int(new[old])
