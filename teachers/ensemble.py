"""Several teachers with one vocabulary as one: p = Σ w_i · p_i, distributions mixed at T = 1.

Its "logits" are log p, so a temperature tempers the mixture, not its members. A mixture has no
hidden state.

Letters: N positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from teachers.base import (
    Floats,
    GenerationRequest,
    Keep,
    Progress,
    Teacher,
    TeacherInfo,
    Tokens,
    budget_slices,
    no_progress,
)
from teachers.names import ordinary_name
from teachers.targets.distributions import Arrays
from teachers.targets.recipe import Recipe
from teachers.targets.state_codec import Basis
from teachers.targets.stored_arrays import Answer, reduce

GROUP_BYTES = 32 << 20  # of one member's logits; with mixture and intermediates four times that
TEXTS_TOGETHER = 4096  # tokens whose texts are compared together
REMEDY = "use --targets compact --set targets.sketch_bytes=0, or --targets dense"


class EnsembleError(ValueError):
    """Teachers that cannot be mixed, or something that a mixture does not have."""


class EnsembleTeacher(Teacher):
    """A mixture of teachers. The first one tokenizes and generates. Use as a context manager."""

    def __init__(self, teachers: Sequence[Teacher], weights: Sequence[float]) -> None:
        """Check that the teachers can be mixed; ``weights`` need not add up to 1.

        The ensemble closes its members.

        Raises:
            EnsembleError: no teacher, weights that are no proportions, or different vocabularies.
        """
        if not teachers:
            raise EnsembleError("an ensemble needs at least one teacher")
        if len(weights) != len(teachers):
            raise EnsembleError(
                f"{len(teachers)} teachers have {len(weights)} weights; give one weight to each"
            )
        for teacher, weight in zip(teachers, weights, strict=True):
            if not (math.isfinite(weight) and weight > 0):
                raise EnsembleError(
                    f"teacher {teacher.info.name} has weight {weight:g}; give a positive number"
                )
        for other in teachers[1:]:
            _require_same_vocabulary(teachers[0], other)
        self.teachers = tuple(teachers)
        total = math.fsum(weights)
        self.weights = tuple(weight / total for weight in weights)
        self.info = self._info()

    def _info(self) -> TeacherInfo:
        infos = [teacher.info for teacher in self.teachers]
        members = [(info.sha256, weight) for info, weight in zip(infos, self.weights, strict=True)]
        return replace(
            infos[0],
            name=" + ".join([infos[0].name, *(ordinary_name(info.name) for info in infos[1:])]),
            parameters=sum(info.parameters for info in infos),
            file_bytes=sum(info.file_bytes for info in infos),
            context_length=min(info.context_length for info in infos),
            sha256=hashlib.sha256(repr(members).encode()).hexdigest(),
        )

    def tokenize(
        self, texts: Sequence[str], *, add_special: bool, parse_special: bool
    ) -> list[Tokens]:
        return self.teachers[0].tokenize(
            texts, add_special=add_special, parse_special=parse_special
        )

    def detokenize(self, sequences: Sequence[Tokens]) -> list[str]:
        return self.teachers[0].detokenize(sequences)

    def generate(
        self, request: GenerationRequest, progress: Progress = no_progress
    ) -> list[Tokens]:
        """See ``Teacher.generate``: the first teacher writes alone; all score what it wrote."""
        return self.teachers[0].generate(request, progress)

    @property
    def runtime(self) -> str:
        return "; ".join(teacher.runtime for teacher in self.teachers)

    def memory(self) -> int:
        return sum(teacher.memory() for teacher in self.teachers)

    def generate_and_score(
        self,
        request: GenerationRequest,
        recipe: Recipe,
        bases: Mapping[str, Basis],
        progress: Progress = no_progress,
    ) -> tuple[list[Tokens], Arrays]:
        """See ``Teacher.generate_and_score``; refuses a recipe before anything is written."""
        self._require_logits_alone(recipe)
        return super().generate_and_score(request, recipe, bases, progress)

    def score(
        self,
        sequences: Sequence[Tokens],
        recipe: Recipe,
        bases: Mapping[str, Basis],
        progress: Progress = no_progress,
        keep: Sequence[Keep] | None = None,
    ) -> Arrays:
        """See ``Teacher.score``; a few sequences at a time, which bounds memory.

        Raises:
            EnsembleError: the recipe keeps hidden states.
        """
        self._require_logits_alone(recipe)
        parts: list[Arrays] = []
        done = 0
        for part in self._groups(sequences):
            mixed = self._mixed(sequences[part], exact=False, keep=keep and keep[part])
            try:
                parts.append(reduce(Answer(logits=mixed), recipe, bases))
            except ValueError as error:
                raise EnsembleError(f"{self.info.name}: {error}") from None
            done += sum(len(tokens) - 1 for tokens in sequences[part])
            progress(done)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _require_logits_alone(self, recipe: Recipe) -> None:
        if recipe.needs_states or recipe.layers:
            states = "a sketch" if recipe.has_sketch else f"targets of kind {recipe.kind}"
            what = "layers" if recipe.layers else states
            raise EnsembleError(f"{what} cannot be kept: {self._no_states()}")

    def states(
        self,
        sequences: Sequence[Tokens],
        layers: Sequence[int] = (),
        *,
        keep: Sequence[Keep] | None = None,
    ) -> Mapping[str, Floats]:
        """Raises:
        EnsembleError: always; a mixture has none.
        """
        raise EnsembleError(self._no_states())

    def output_rows(self, start: int, stop: int) -> Floats:
        """Raises:
        EnsembleError: always; a mixture has none.
        """
        raise EnsembleError(self._no_states())

    def _no_states(self) -> str:
        return (
            f"{self.info.name} is a mixture of {len(self.teachers)} teachers, which has no "
            f"hidden state; {REMEDY}"
        )

    def logits(
        self,
        sequences: Sequence[Tokens],
        *,
        exact: bool = False,
        keep: Sequence[Keep] | None = None,
    ) -> Floats:
        """See ``Teacher.logits``: log-probabilities of the mixture."""
        groups = [
            self._mixed(sequences[part], exact=exact, keep=keep and keep[part])
            for part in self._groups(sequences)
        ]
        return torch.cat(groups).numpy()

    def _groups(self, sequences: Sequence[Tokens]) -> list[slice]:
        """Consecutive sequences whose logits fit ``GROUP_BYTES``; one sequence at least."""
        room = GROUP_BYTES // (4 * self.info.vocab_size)
        sizes = [len(tokens) - 1 for tokens in sequences]
        return list(budget_slices(sizes, room))

    def _mixed(
        self, sequences: Sequence[Tokens], *, exact: bool, keep: Sequence[Keep] | None
    ) -> Tensor:
        """log Σ w_i p_i of all positions, float32 ``[N, V]``, in nats; −∞ where every p_i is 0."""
        mixed: Tensor | None = None
        for teacher, weight in zip(self.teachers, self.weights, strict=True):
            logits = torch.from_numpy(teacher.logits(sequences, exact=exact, keep=keep))
            weighted = logits.log_softmax(dim=-1).add_(math.log(weight))
            if bool(torch.isnan(weighted).any()):
                raise EnsembleError(
                    f"the answer of {teacher.info.name} is not finite; its weights are damaged"
                )
            mixed = weighted if mixed is None else torch.logaddexp(mixed, weighted)
        assert mixed is not None
        return mixed

    def speed(self, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
        """See ``Teacher.speed``: the members work one after another, so their times add up."""
        speeds = [teacher.speed(prompt_tokens, new_tokens) for teacher in self.teachers]
        prompt, new = (
            1.0 / sum(1.0 / speed for speed in each) for each in zip(*speeds, strict=True)
        )
        return prompt, new

    def close(self) -> None:
        for teacher in self.teachers:
            teacher.close()


def _require_same_vocabulary(first: Teacher, other: Teacher) -> None:
    """Every token id must mean the same text to both; none at all (filling) contradicts nothing."""
    sizes = (first.info.vocab_size, other.info.vocab_size)
    if sizes[0] == sizes[1] and first.info.tokenizer_sha256 == other.info.tokenizer_sha256:
        return
    if differs := next(_differences(first, other, min(sizes)), None):
        token, one, two = differs
        where = f"token {token} is {one!r} to the first and {two!r} to the second"
    elif sizes[0] != sizes[1]:
        longer, which = (first, "first") if sizes[0] > sizes[1] else (other, "second")
        (text,) = longer.detokenize([np.array([min(sizes)], dtype=np.int32)])
        where = f"token {min(sizes)} is {text!r} to the {which} alone"
    else:
        return
    raise EnsembleError(
        f"{first.info.name} and {other.info.name} have different vocabularies of {sizes[0]} and "
        f"{sizes[1]} tokens: {where}; an ensemble needs teachers with the same tokenizer"
    )


def _differences(first: Teacher, other: Teacher, size: int) -> Iterator[tuple[int, str, str]]:
    """Tokens below ``size`` that have different texts, and both texts."""
    for start in range(0, size, TEXTS_TOGETHER):
        stop = min(size, start + TEXTS_TOGETHER)
        single = list(np.arange(start, stop, dtype=np.int32)[:, None])
        texts = zip(first.detokenize(single), other.detokenize(single), strict=True)
        for token, (one, two) in zip(itertools.count(start), texts, strict=False):
            if one and two and one != two:
                yield token, one, two
