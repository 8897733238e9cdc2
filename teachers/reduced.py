"""A GGUF teacher over a part of its own vocabulary.

It reads a text as the kept tokens that spell it, by their old ids, so its weights and its states
are what they were. What it says of the token that follows is folded: a dropped token's probability
goes to the first piece that its text falls into, which is how that text begins now. Letters: N
positions, M kept of V tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from teachers.base import (
    Floats,
    GenerationRequest,
    Keep,
    LogitRule,
    Progress,
    Teacher,
    Tokens,
    no_progress,
)
from teachers.gguf.file import GGUFFile, tokenizer_sha256
from teachers.gguf.output import output_name
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.tokenizer.gguf_metadata import read_metadata
from teachers.vocabulary.cut import VocabularyCut
from teachers.vocabulary.pieces import Pieces

if TYPE_CHECKING:
    from teachers.targets.distributions import Arrays
    from teachers.targets.recipe import Recipe
    from teachers.targets.state_codec import Basis


def cut_of(teacher: Teacher) -> VocabularyCut | None:
    """How a teacher's vocabulary was cut; ``None``: it is whole."""
    return teacher.cut if isinstance(teacher, ReducedTeacher) else None


class ReducedTeacher(Teacher):
    """The teacher ``original`` over the vocabulary of ``cut``; all ids here are new ones. Closes
    both models that it is made of."""

    def __init__(
        self,
        original: GGUFTeacher,
        cut: VocabularyCut,
        tokenizer: Teacher,
        file: GGUFFile,
    ) -> None:
        """``tokenizer``: the reduced one, running. ``file``: the original's, cut to the same
        vocabulary (``distill.trimming.file``)."""
        self.original, self.cut, self.vocabulary = original, cut, cut.vocabulary
        self.tokenizer, self.file = tokenizer, file
        own = tokenizer.info
        self.info = replace(
            original.info,
            vocab_size=len(cut.vocabulary),
            bos=own.bos,
            eos=own.eos,
            end_tokens=own.end_tokens,
            add_bos=own.add_bos,
            tokenizer_sha256=tokenizer_sha256(file),
        )

    def _old(self, sequences: Sequence[Tokens]) -> list[Tokens]:
        return [self.vocabulary.kept[tokens].astype(np.int32) for tokens in sequences]

    def tokenize(
        self, texts: Sequence[str], *, add_special: bool, parse_special: bool
    ) -> list[Tokens]:
        return self.tokenizer.tokenize(texts, add_special=add_special, parse_special=parse_special)

    def detokenize(self, sequences: Sequence[Tokens]) -> list[str]:
        return self.tokenizer.detokenize(sequences)

    @property
    def runtime(self) -> str:
        return self.original.runtime

    def memory(self) -> int:
        return self.original.memory() + self.tokenizer.memory()

    def generate(
        self, request: GenerationRequest, progress: Progress = no_progress
    ) -> list[Tokens]:
        """See ``Teacher.generate``: the original writes; what it writes in dropped tokens is
        spelled in the pieces that their texts fall into."""
        prompts = [self._old(prompt) for prompt in request.prompts]
        written = self.original.generate(replace(request, prompts=prompts), progress)
        return [self._spelled(tokens)[: request.sampling.max_length] for tokens in written]

    def _spelled(self, tokens: Tokens) -> Tokens:
        """A sequence of old ids in new ones."""
        new = self.vocabulary.new_ids
        pieces = ([old] if new[old] >= 0 else self._pieces.split(old) for old in tokens.tolist())
        return new[[piece for part in pieces for piece in part]].astype(np.int32)

    @cached_property
    def _pieces(self) -> Pieces:
        metadata = read_metadata(self.original.file.fields)
        return Pieces(metadata, self.vocabulary.kept.tolist())

    def score(
        self,
        sequences: Sequence[Tokens],
        recipe: Recipe,
        bases: Mapping[str, Basis],
        progress: Progress = no_progress,
        keep: Sequence[Keep] | None = None,
    ) -> Arrays:
        """See ``Teacher.score``; the tail's shape is that of kept tokens before anything is folded
        into them, its mass and the top-k are exact."""
        old = self._old(sequences)
        return self.original.score(old, recipe, bases, progress, keep, self.vocabulary)

    def states(
        self,
        sequences: Sequence[Tokens],
        layers: Sequence[int] = (),
        *,
        keep: Sequence[Keep] | None = None,
    ) -> Mapping[str, Floats]:
        return self.original.states(self._old(sequences), layers, keep=keep)

    def output_rows(self, start: int, stop: int) -> Floats:
        self.original.output_rows(0, 1)  # whether logits are a product at all
        return self.file.rows(output_name(self.file), start, stop)

    def product_logits(self, sequences: Sequence[Tokens]) -> Floats:
        """See ``Teacher.product_logits``: those of kept tokens, nothing folded into them."""
        return self.original.logits(self._old(sequences))[:, self.vocabulary.kept]

    def logits(
        self,
        sequences: Sequence[Tokens],
        *,
        exact: bool = False,
        keep: Sequence[Keep] | None = None,
    ) -> Floats:
        old = self._old(sequences)
        return self.original.logits(old, exact=exact, keep=keep, vocabulary=self.vocabulary)

    def logit_rules(self) -> Sequence[LogitRule]:
        return self.original.logit_rules()

    def rounded_states(self, states: Floats) -> Floats:
        return self.original.rounded_states(states)

    def speed(self, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
        return self.original.speed(prompt_tokens, new_tokens)

    def close(self) -> None:
        self.original.close()
        self.tokenizer.close()
