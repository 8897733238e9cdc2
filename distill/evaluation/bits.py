"""Bits per byte of text: what models with different vocabularies are compared by."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from distill.evaluation.scorers import groups, llama_scorer, next_tokens
from distill.losses import divergences
from teachers.base import Teacher, Tokens

TOKENS = 16_384  # of validation text that are scored, at most, but whole sequences


def some_text(sequences: Sequence[Tokens]) -> list[Tokens]:
    """The first sequences, ``TOKENS`` tokens at most, one sequence at least."""
    ends = np.cumsum([len(tokens) for tokens in sequences])
    return list(sequences[: max(1, int((ends <= TOKENS).sum()))])


def bits_per_byte(model: Teacher, sequences: Sequence[Tokens]) -> float:
    """−log2 of the probability of all tokens but each sequence's first, per byte of their text."""
    nats, scorer = 0.0, llama_scorer(model)
    for part in groups(sequences, model.info.vocab_size):
        labels = next_tokens(sequences[part])
        nats += float(divergences.cross_entropy(scorer(sequences[part]), labels).double().sum())
    texts = model.detokenize([tokens[1:] for tokens in sequences])
    return nats / math.log(2) / max(1, sum(len(text.encode()) for text in texts))


def respelled(sequences: Sequence[Tokens], source: Teacher, target: Teacher) -> list[Tokens]:
    """The text of ``source``'s sequences in ``target``'s tokens, a sequence that begins with BOS
    in the one as in the other."""
    result = []
    for tokens in sequences:
        begun = source.info.bos is not None and int(tokens[0]) == source.info.bos
        (text,) = source.detokenize([tokens[1:] if begun else tokens])
        (ids,) = target.tokenize([text], add_special=False, parse_special=True)
        # Some SentencePiece tokenizers put a space before a text, which this one has already.
        if text.startswith(" ") and target.detokenize([ids])[0] == f" {text}":
            (ids,) = target.tokenize([text[1:]], add_special=False, parse_special=True)
        first = [] if not begun or target.info.bos is None else [target.info.bos]
        result.append(np.array([*first, *ids.tolist()], dtype=np.int32))
    return result
