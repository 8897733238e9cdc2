"""On-policy distillation: part of each batch is text the student wrote itself, scored by the
teacher.

A student that only ever reads other people's text never sees its own mistakes (exposure bias; GKD,
Agarwal et al. 2024). Here a share of the sequences of every step keeps a beginning of random
length, the student writes the rest, and the teacher's soft targets for what it wrote take the place
of the stored ones.

Everything random depends on the seed, the step and the sequence alone, so neither micro-batches nor
an interruption change it. Letters: B sequences written together, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from distill.losses.batch import Batch, padded
from distill.training.data import load_batch
from students.model.interface import Student
from teachers.base import Sampling, Teacher, Tokens
from teachers.sampling import sample_rows
from teachers.store.store import SoftTargetStore
from teachers.targets.stored_arrays import join

WHICH, CUT, WORDS = 5, 6, 7  # streams of random numbers


@dataclass(frozen=True)
class OwnWords:
    """Loads batches in which some sequences continue in the student's own words.

    ``share``: of each batch; ``temperature``: the student writes at; ``eos``: the token that ends a
    text, if any.
    """

    teacher: Teacher
    store: SoftTargetStore
    share: float
    temperature: float
    seed: int
    eos: int | None

    def __call__(self, student: Student, indices: list[int], step: int) -> Batch:
        """The sequences ``indices`` of the store for one step, some of them continued by the
        student."""
        chosen = [index for index in indices if self._is_chosen(index, step)]
        if not chosen:
            return load_batch(self.store, indices)
        others = [index for index in indices if index not in chosen]
        originals = [self.store.tokens(index) for index in chosen]
        cuts = [
            self._cut(len(tokens), index, step)
            for tokens, index in zip(originals, chosen, strict=True)
        ]
        uniform = [
            np.random.default_rng([self.seed, WORDS, step, index]).random(len(tokens) - cut)
            for tokens, cut, index in zip(originals, cuts, chosen, strict=True)
        ]
        starts = [tokens[:cut] for tokens, cut in zip(originals, cuts, strict=True)]
        written = continue_texts(student, starts, uniform, self.temperature, self.eos)
        return self._batch(written, cuts, others)

    def _is_chosen(self, index: int, step: int) -> bool:
        return np.random.default_rng([self.seed, WHICH, step, index]).random() < self.share

    def _cut(self, length: int, index: int, step: int) -> int:
        """How many first tokens stay: at least one, and the student writes at least one."""
        return int(np.random.default_rng([self.seed, CUT, step, index]).integers(1, max(2, length)))

    def _batch(self, written: list[Tokens], cuts: list[int], others: list[int]) -> Batch:
        """Written sequences with the teacher's answers first, then stored ones."""
        companion = self.store.companion()
        bases = companion.bases if companion else {}
        arrays = self.teacher.score(written, self.store.manifest.recipe, bases)
        targets = self.store.typed_targets(arrays)
        layers = self.store.typed_layers(arrays)
        rows, given = list(written), list(cuts)
        if others:
            stored = load_batch(self.store, others)
            targets = join([targets, stored.targets])
            layers = {
                layer: torch.cat([states, stored.layers[layer]]) for layer, states in layers.items()
            }
            rows += [self.store.tokens(index) for index in others]
            given += [len(row) for row in rows[len(written) :]]
        tokens, lengths = padded(rows)
        return Batch(tokens, lengths, targets, given=torch.tensor(given), layers=layers)


@torch.no_grad()
def continue_texts(
    student: Student,
    starts: Sequence[Tokens],
    uniform: Sequence[NDArray[np.float64]],
    temperature: float,
    eos: int | None,
) -> list[Tokens]:
    """Let the student continue texts: one token for each number in [0, 1) of ``uniform``, fewer
    after ``eos``.

    All texts grow together, padded on the left. Token number i of a text is the one at which the
    cumulative distribution passes its number i, so a text does not depend on which others it is
    written with.
    """
    was_training = student.training
    sampling = Sampling(temperature=temperature, max_length=0)
    student.eval()
    device = student.device
    longest = max(map(len, starts))
    tokens = torch.zeros(len(starts), longest, dtype=torch.int64)
    mask = torch.zeros(len(starts), longest, dtype=torch.int64)
    for row, start in enumerate(starts):
        tokens[row, longest - len(start) :] = torch.from_numpy(start.astype(np.int64))
        mask[row, longest - len(start) :] = 1
    written: list[list[int]] = [[] for _ in starts]
    cache, newest = DynamicCache(), tokens
    for place in range(max(map(len, uniform))):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -newest.shape[1] :]
        output = student.forward(
            newest.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        assert output.logits is not None
        draws = np.array([row[place] if place < len(row) else 0.0 for row in uniform])
        chosen = sample_rows(output.logits[:, -1].float().cpu().numpy(), draws, sampling)
        for row, token in enumerate(chosen.tolist()):
            ended = eos is not None and written[row][-1:] == [eos]
            if place < len(uniform[row]) and not ended:
                written[row].append(token)
        if all(_is_over(words, row, eos) for words, row in zip(written, uniform, strict=True)):
            break
        newest = torch.from_numpy(chosen.astype(np.int64))[:, None]
        mask = torch.cat((mask, torch.ones_like(newest)), dim=-1)
    student.train(was_training)
    return [
        np.concatenate((start, np.array(words, dtype=np.int32)))
        for start, words in zip(starts, written, strict=True)
    ]


def _is_over(words: list[int], numbers: NDArray[np.float64], eos: int | None) -> bool:
    """Whether nothing more will be written."""
    return len(words) == len(numbers) or (eos is not None and words[-1:] == [eos])
